"""A digest that tells whether a model folder still holds the same weights."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SAMPLE = 256  # bytes from the middle of each tensor
QUANTISATION = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def model_digest(folder: Path, *, code: bool = False) -> str:
    """Return the sha256, in hexadecimal, of what decides a model's outputs; takes about a second.

    It covers config.json, quantisation settings, and the name, size, header and some bytes of every tensor of
    each safetensors file: enough to tell the weights of two training runs apart. With ``code`` it covers the
    folder's Python files too.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    scripts = folder.glob("*.py") if code else []
    settings = (folder / name for name in QUANTISATION if (folder / name).is_file())
    for path in sorted([*scripts, *settings]):
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        for part in _samples(path):
            digest.update(part)
    return digest.hexdigest()


def _samples(path: Path) -> Iterator[bytes]:
    """Yield a safetensors file's header, then bytes from the middle of each tensor."""
    with path.open("rb") as file:
        size = file.read(8)
        raw = file.read(struct.unpack("<Q", size)[0]) if len(size) == 8 else b""
        yield raw
        try:
            header: dict[str, Any] = json.loads(raw)
        except ValueError:  # loading the weights will report it
            return
        for name in sorted(header.keys() - {"__metadata__"}):
            begin, end = header[name]["data_offsets"]
            file.seek(8 + len(raw) + max(begin, (begin + end - SAMPLE) // 2))
            yield file.read(min(SAMPLE, end - begin))
