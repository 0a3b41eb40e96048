"""SHA256SUMS: the digests of a folder's files, by which damage is found; ``sha256sum -c`` reads them too."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

from ddk_cache.util import durable

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  ([^/\x00-\x1f\x7f]+)\n")
MAX_BYTES = 1 << 20  # of SHA256SUMS
THREADS = min(8, os.cpu_count() or 1)


def write_sums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the sha256 of each file, in hexadecimal, by its name; what they cover must be on disk already."""
    durable.write(folder / SUMS, "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))


def damage(folder: Path) -> Iterator[str]:
    """Yield a line for each file that is missing or not as it was written; reads every byte."""
    try:
        with _open(folder / SUMS) as file:
            lines = file.read(MAX_BYTES).decode().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        yield f"{SUMS}: {_reason(error)}"
        return
    matches = [LINE.fullmatch(line) for line in lines]
    digests = {match[2]: match[1] for match in matches if match}
    if not digests or len(digests) < len(lines):
        yield f"{SUMS}: is not a list of digests"
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for name, problem in zip(
            digests, pool.map(lambda item: _check(folder, *item), digests.items()), strict=True
        ):
            if problem:
                yield f"{name}: {problem}"
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in digests:
            yield f"{path.name}: is not in {SUMS}"


def file_digest(path: Path) -> str:
    """Return the sha256 of a regular file, in hexadecimal; raises OSError."""
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(folder: Path, name: str, digest: str) -> str | None:
    try:
        return None if file_digest(folder / name) == digest else "is damaged: not what was written"
    except OSError as error:
        return _reason(error)


def _reason(error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return (error.strerror or str(error)) if isinstance(error, OSError) else "is not text"


def _open(path: Path) -> BufferedReader:
    return open(durable.open_regular(path, os.O_RDONLY, follow=True), "rb")
