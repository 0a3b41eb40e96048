"""Damage one object of a cache at random; reading must give the same rows or an error, and verify name it.

Documents are damaged as bytes, and as JSON with a digest that is right again.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_cache.cache.info import info
from ddk_cache.cache.reader import open_cache
from ddk_cache.cache.verify import verify
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.format.layout import ATTRIBUTE, digest
from tools.torture.subject import Objects, Subject, stored

ODD: tuple[Any, ...] = (None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, 0.5, "", "x", "../x", [], [0], {})
Rows = list[dict[str, NDArray[Any]]]


def torture(subject: Subject, seed: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Damage objects until the time is over; return counts by outcome, and a line for each failure."""
    target = _Target(subject)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        chance = random.Random(f"{seed}/{target.counts['trials']}")
        key = chance.choice(target.keys)
        as_json = key.endswith("zarr.json") and chance.random() < 0.7
        damaged = (_change_json if as_json else _change_bytes)(target.objects[key], chance)
        target.attempt(key, damaged, f"seed {seed}", must_be_found=not as_json)
    return target.counts, target.failures


def torture_bits(subject: Subject, seed: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Flip one bit after another, in random order, until all are flipped or the time is over."""
    target = _Target(subject)
    bits = [(key, bit) for key in target.keys for bit in range(8 * len(target.objects[key]))]
    target.counts["bits"] = len(bits)
    random.Random(seed).shuffle(bits)
    deadline = time.monotonic() + seconds
    for key, bit in bits:
        if time.monotonic() > deadline:
            break
        damaged = bytearray(target.objects[key])
        damaged[bit // 8] ^= 1 << bit % 8
        target.attempt(key, bytes(damaged), f"bit {bit}", must_be_found=True)
    return target.counts, target.failures


class _Target:
    """The finished cache, and what has come of damaging it."""

    def __init__(self, subject: Subject) -> None:
        self.counts, self.failures = Counter[str](), list[str]()
        self._cache = subject.reference
        self.objects = stored(self._cache)
        self._expected = _read(self._cache)
        # Checkpoints of the build and the card are not part of the cache.
        self.keys = sorted(key for key in self.objects if "/ddk." not in key and key != "README.md")

    def attempt(self, key: str, damaged: bytes, name: str, *, must_be_found: bool) -> None:
        """Read and verify the cache with a damaged object, and put it back."""
        self.counts["trials"] += 1
        if damaged == self.objects[key]:
            return
        (self._cache / key).write_bytes(damaged)
        try:
            self.counts[_outcome(self._cache, self._expected)] += 1
            if not _describe(self._cache) and must_be_found:
                raise AssertionError("verify finds nothing")
        except Exception as error:
            self.failures.append(f"{name}, trial {self.counts['trials']}: {key}: {error!r}")
        _restore(self._cache, self.objects)


def _outcome(cache: Path, expected: Rows) -> str:
    try:
        rows = _read(cache)
    except (CacheError, ConfigError):
        return "refused"
    for part, before in zip(rows, expected, strict=True):
        for name, values in before.items():
            np.testing.assert_array_equal(part[name], values)
    return "read as before"


def _read(cache: Path) -> Rows:
    opened = open_cache(cache)
    splits = (split for domain in opened.values() for split in (domain.train, domain.validation))
    return [split.read(range(len(split))).arrays() for split in splits]


def _describe(cache: Path) -> str | None:
    """Return a problem that info or verify names."""
    try:
        info(str(cache))
        return next(map(str, list(verify(str(cache)))), None)
    except (CacheError, ConfigError) as error:
        return str(error)


def _restore(cache: Path, objects: Objects) -> None:
    now = stored(cache)
    for key in now.keys() - objects.keys():
        (cache / key).unlink()
    for key, data in objects.items():
        if now.get(key) != data:
            (cache / key).parent.mkdir(parents=True, exist_ok=True)
            (cache / key).write_bytes(data)


def _change_bytes(data: bytes, chance: random.Random) -> bytes:
    start, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: data[:start] + bytes([data[start - 1] ^ 1 << chance.randrange(8)]) + data[start + 1 :],
        lambda: data[:start],
        lambda: data[:start] + data[end:],
        lambda: data[:end] + data[start:],
        lambda: data[:start] + bytes(end - start) + data[end:],
        lambda: data + chance.randbytes(end - start),
        lambda: data[:start] + chance.randbytes(end - start) + data[end:],
    )
    return chance.choice(changes)()


def _change_json(data: bytes, chance: random.Random) -> bytes:
    """Change one value of a document, or remove it; correct the digest of a cache's attribute."""
    document = json.loads(data)
    node, options = document, list[tuple[Any, Any]]()
    pending = [node]
    while pending:
        node = pending.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            options.append((node, key))
            if isinstance(value, dict | list):
                pending.append(value)
    node, key = chance.choice(options)
    if chance.random() < 0.2:
        del node[key]
    else:
        node[key] = chance.choice(ODD)
    attributes = document.get("attributes")
    content = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    if isinstance(content, dict) and key != "sha256":
        content.pop("sha256", None)
        content["sha256"] = digest(content)
    return json.dumps(document, indent=2, ensure_ascii=False).encode()
