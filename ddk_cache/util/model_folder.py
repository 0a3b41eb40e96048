"""A model's folder: whether it can be loaded, and its identity, the digest of all of its files.

Large files that have not changed are read once.
"""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from ddk_cache.errors import ConfigError, brief
from ddk_cache.util import durable
from ddk_cache.util.progress import meter

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
SETTINGS = ("config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json")
REMEMBERED = 16 << 20  # bytes; smaller files are read each time
SETTLED = 2.0  # seconds since a file's last change: no other can follow in the same tick of its clock
LONG = 4 << 30  # bytes; reading more shows progress
MOST_LAYERS = 10_000  # models of 2026 have up to about 130


def check_layers(key: str, settings: Any) -> None:
    """Raise ConfigError for a number of layers that no model has: making their objects would take forever.

    ``settings`` is a Hugging Face configuration.
    """
    layers = getattr(settings.get_text_config(), "num_hidden_layers", None)
    if layers is not None and not 0 < layers <= MOST_LAYERS:
        raise ConfigError(
            f"{key}: its config.json asks for {layers:,} layers; 1 to {MOST_LAYERS:,} are possible"
        )


def check_model(key: str, name: str) -> None:
    """Raise ConfigError if ``name`` can only be a folder and there is none, or if its config.json is wrong.

    A hub id has at most one slash.
    """
    folder = Path(name)
    if (name[0] in "./" or name.count("/") > 1) and not folder.is_dir():
        raise ConfigError(f"{key}: {name}: there is no such folder")
    path = folder / "config.json"
    if path.is_file() and (problem := _config_problem(path)):
        raise ConfigError(f"{key}: {path}: {problem}")


def _config_problem(path: Path) -> str | None:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return "is not valid JSON"
    if not isinstance(config, dict):
        return "must hold keys and values"
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    heads = [part.get("num_attention_heads") for part in parts]
    if any(isinstance(count, int) and count < 1 for count in heads):
        return "num_attention_heads: must be at least 1"  # transformers divides by it
    return None


def load_failure(name: str, error: Exception) -> str:
    """Return why a model, its configuration or its tokenizer did not load from a folder or the hub."""
    if isinstance(error, ImportError) or (Path(name) / "config.json").is_file():
        return brief(error)
    if Path(name).is_dir():
        return "the folder holds no model: no config.json"
    return f"there is no folder {name} here, and as a hub id: {brief(error)}"


def model_digest(folder: Path, *, code: bool = False) -> str:
    """Return the sha256, in hexadecimal, of the files that decide a model's outputs.

    These are config.json, quantisation settings and safetensors files; with ``code`` the Python files too.
    The digests of large files are remembered in the user's cache folder, by path, size, times and inode.
    """
    patterns = (*SETTINGS, *WEIGHTS, *(["*.py"] if code else []))
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    digests = _file_digests([path.resolve() for path in files])
    lines = (f"{path.name} {digest}\n" for path, digest in zip(files, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digests(paths: list[Path]) -> list[str]:
    """Return the sha256 of each file, read in parallel unless remembered."""
    memory = _read_memory()
    stamps = {path: _stamp(path) for path in paths}
    digests = {
        path: memory[str(path)][1] for path in paths if memory.get(str(path), [None])[0] == stamps[path]
    }
    new = [path for path in stamps if path not in digests]
    size = sum(stamps[path][0] for path in new)
    show = meter("digest of the weights", "bytes", size) if size > LONG else nullcontext()
    with show as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, digest in zip(new, pool.map(_sha256, new), strict=True):
            digests[path] = digest
            if progress is not None:
                progress.advance(stamps[path][0])
    latest = time.time() - SETTLED
    large = {
        str(path): [stamps[path], digests[path]]
        for path in new
        if stamps[path][0] > REMEMBERED
        and max(stamps[path][1:3]) / 1e9 < latest
        and _stamp(path) == stamps[path]
    }
    if large:
        _write_memory(memory | large)
    return [digests[path] for path in paths]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> list[int]:
    """Return a file's size, its times of change in nanoseconds, and its inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _memory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ddk-cache" / "file-digests.json"


def _read_memory() -> dict[str, list[Any]]:
    """Return stamp and digest of each remembered file, by path; nothing if there is no valid memory."""
    try:
        memory = json.loads(_memory().read_bytes())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home folder
        return {}
    if not isinstance(memory, dict):
        return {}
    return {path: entry for path, entry in memory.items() if isinstance(entry, list) and len(entry) == 2}


def _write_memory(memory: dict[str, list[Any]]) -> None:
    """Replace the memory at once; a folder that cannot be written costs reading again."""
    with suppress(OSError, RuntimeError):
        durable.make_folder(_memory().parent)
        durable.write(_memory(), json.dumps(memory))
