"""Read lines that are spread over a file of any size: a sample that keeps the shape of a plot."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ddk_cache.storage.folder import Folder

WHOLE_BYTES = 1 << 22  # of a file that is read completely
PART_BYTES = 1 << 14  # read for each line of a larger one; a longer line is passed over


class Excerpt(NamedTuple):
    """Lines of a file, in its order; the last complete one is among them."""

    lines: list[tuple[str, bytes]]  # where it is, such as "line 3", and its content without the newline
    is_whole: bool


def read_excerpt(folder: Folder, name: str, size: int, most: int) -> Excerpt:
    """Read at most ``most`` lines of a file of ``size`` bytes; a line without a newline is being written.

    Raises OSError and OverflowError, as ``Folder`` does.
    """
    if size > WHOLE_BYTES:
        return Excerpt(list(_spread(folder, name, size, most)), is_whole=False)
    lines = (folder.read(name, WHOLE_BYTES) or b"").split(b"\n")[:-1]
    chosen = range(len(lines))
    if len(lines) > most:
        chosen = np.linspace(0, len(lines) - 1, most).round().astype(int).tolist()
    return Excerpt([(f"line {index + 1}", lines[index]) for index in chosen], len(lines) <= most)


def _spread(folder: Folder, name: str, size: int, most: int) -> Iterator[tuple[str, bytes]]:
    """Yield lines at about equal distances, each once."""
    starts = np.linspace(0, size - PART_BYTES, most).round().astype(int).tolist()
    parts = folder.read_ranges(name, [(start, start + PART_BYTES) for start in starts])
    last = -1
    for start, part in zip(starts, parts, strict=True):
        if start == starts[-1]:
            end = part.rfind(b"\n")
            begin = part.rfind(b"\n", 0, max(end, 0)) + 1
        else:
            begin = part.find(b"\n") + 1 if start else 0
            end = part.find(b"\n", begin)
        is_complete = end >= begin and (begin > 0 or start == 0)
        if is_complete and start + begin > last:
            last = start + begin
            yield f"the line at byte {last:,}", part[begin:end]
