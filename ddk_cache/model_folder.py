"""A model's folder by what decides its numbers: enough to tell other weights under the same path."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SAMPLE = 256  # bytes from the middle of each tensor that go into the digest
QUANTISATION = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # beside the weights


def model_digest(folder: Path, *, code: bool = False) -> str:
    """sha256, in hexadecimal, of a folder's config.json, of what else decides how weights are taken (its own
    ``code``, a quantisation's description) and, for each safetensors file, of its name, size and header and
    some bytes of every tensor: enough to tell one training run's weights from another's in a second.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    own = folder.glob("*.py") if code else []
    for path in sorted([*own, *(folder / name for name in QUANTISATION if (folder / name).is_file())]):
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        for part in _samples(path):
            digest.update(part)
    return digest.hexdigest()


def _samples(path: Path) -> Iterator[bytes]:
    """A safetensors file's header, and bytes from the middle of each tensor."""
    with path.open("rb") as file:
        size = file.read(8)
        raw = file.read(struct.unpack("<Q", size)[0]) if len(size) == 8 else b""
        yield raw
        try:
            header: dict[str, Any] = json.loads(raw)
        except ValueError:  # whoever loads the weights says what is wrong
            return
        for name in sorted(header.keys() - {"__metadata__"}):
            begin, end = header[name]["data_offsets"]
            file.seek(8 + len(raw) + max(begin, (begin + end - SAMPLE) // 2))
            yield file.read(min(SAMPLE, end - begin))
