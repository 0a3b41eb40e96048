"""Find a domain's files and the builder of ``datasets`` that reads them."""

import re
from collections import Counter
from glob import glob, has_magic
from pathlib import Path, PurePath
from typing import Any

from ddk_build.config import SourceConfig

COMPRESSED = {".gz", ".zst", ".xz", ".bz2"}
BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Builder by suffix; other files are read as text."""
ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar"}
DOCUMENTS = {".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".pptx", ".xlsx"}
FORMATS = {*BUILDERS.values(), "text"}  # builders that ``path`` may name
NOT_DATA = ("README", "LICENSE", "dataset_info", ".")  # beginnings of the names of other files


class FilesError(Exception):
    """The files of a domain cannot be read as configured; the message is one line."""


def is_saved(path: str) -> bool:
    """Return whether the folder was written by ``save_to_disk``."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def find(domain: SourceConfig) -> dict[str, Any]:
    """Return the arguments for ``datasets.load_dataset``.

    Raises FilesError if a file does not exist, the files are of several kinds, or a folder needs a glob.
    """
    source = {"name": domain.name, "data_dir": domain.data_dir, "revision": domain.revision}
    if domain.data_files is not None:
        return source | _named_files(domain, _flat(domain.data_files))
    return source | _by_path(domain.path, domain.data_dir or "")


def _by_path(path: str, data_dir: str) -> dict[str, Any]:
    """Return how to read ``path``, a file, a glob, a folder or a hub id, without ``data_files``."""
    if Path(path).is_file():
        return _with_builder(path, [path])
    if Path(path).is_dir():
        _check_folder(Path(path) / data_dir)
    elif "://" in path:
        raise FilesError(
            f"path: {path!r} is a URL; give it as data_files, with path json, csv, parquet or text"
        )
    elif path in FORMATS:
        raise FilesError(f"data_files: is missing; path {path} is only the format of the files")
    elif has_magic(path):
        matches = sorted(glob(path, recursive=True))
        return _with_builder(path, [file for file in matches if Path(file).is_file()])
    elif _is_local(path):
        raise FilesError(f"path: there is no file or folder {path!r}")
    return {"path": path}


def _named_files(domain: SourceConfig, names: list[str]) -> dict[str, Any]:
    """Return how to read ``data_files``; the local ones must exist."""
    folder = Path(domain.path)
    if folder.is_dir() or domain.path in FORMATS:
        base = (folder if folder.is_dir() else Path()) / (domain.data_dir or "")
        for name in names:
            path = base / name
            if "://" not in name and not path.exists() and not glob(str(path), recursive=True):
                problem = "no file matches" if has_magic(name) else "there is no file"
                raise FilesError(f"data_files: {problem} {str(path)!r}")
    tabs = domain.path == "csv" and {_suffix(name) for name in names} == {".tsv"}
    return {"path": domain.path, "data_files": domain.data_files} | ({"sep": "\t"} if tabs else {})


def _with_builder(path: str, files: list[str]) -> dict[str, Any]:
    """Return how to read local files of one kind."""
    if not files:
        raise FilesError(f"path: no file matches {path!r}; check the path or quote the glob")
    suffixes = Counter(map(_suffix, files))
    _check_kinds(path, {*suffixes})
    kinds = {(BUILDERS.get(suffix, "text"), suffix == ".tsv") for suffix in suffixes}
    if len(kinds) > 1:
        raise FilesError(
            f"path: {path!r} matches files of several kinds ({_summary(suffixes)}); give one kind"
        )
    [(builder, tabs)] = kinds
    return {"path": builder, "data_files": files} | ({"sep": "\t"} if tabs else {})


def _check_kinds(path: str, suffixes: set[str]) -> None:
    for kinds, problem in (
        (ARCHIVES, "matches archives ({}); unpack them first"),
        (DOCUMENTS, "matches {}; save their text as text files"),
    ):
        if refused := suffixes & kinds:
            raise FilesError(f"path: {path!r} {problem.format(', '.join(sorted(refused)))}")


def _check_folder(folder: Path) -> None:
    """Raise FilesError if ``datasets`` would skip files: it reads only one kind in a folder."""
    suffixes = Counter(
        _suffix(path.name)
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(NOT_DATA) for part in path.relative_to(folder).parts)
    )
    builders = {BUILDERS.get(suffix, "text") for suffix in suffixes if suffix in {*BUILDERS, ".txt"}}
    other_text = not BUILDERS.keys() & suffixes.keys() and suffixes.keys() - {".txt"}
    if other_text or (len(builders) > 1 and not _is_described(folder)):
        [(most_common, _)] = suffixes.most_common(1)
        _check_kinds(str(folder), {most_common})
        raise FilesError(
            f"path: the folder {str(folder)!r} holds {_summary(suffixes)}; choose with a glob, such as "
            f"{str(folder / '**' / f'*{most_common}')!r}"
        )


def _is_described(folder: Path) -> bool:
    """Return whether a dataset card says which files are the data."""
    card = folder / "README.md"
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    return re.search(r"^[ -]*data_files:", text, re.MULTILINE) is not None


def _is_local(path: str) -> bool:
    """Return whether a path cannot be a hub id, which has one or two parts and no file's suffix."""
    is_file = PurePath(path).suffix.lower() in {*BUILDERS, *COMPRESSED, *ARCHIVES, ".txt", ".md"}
    return is_file or path.startswith(("/", ".", "~")) or len(PurePath(path).parts) > 2


def _suffix(name: str) -> str:
    """Return the suffix in lower case, disregarding compression."""
    suffixes = [suffix for suffix in PurePath(name).suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1].lower() if suffixes else ""


def _summary(suffixes: Counter[str]) -> str:
    counts = [f"{count} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common(4)]
    return ", ".join(counts) + (", ..." if len(suffixes) > 4 else "")


def _flat(names: str | list[str] | dict[str, str | list[str]]) -> list[str]:
    if isinstance(names, str):
        return [names]
    if isinstance(names, dict):
        return [name for value in names.values() for name in _flat(value)]
    return names
