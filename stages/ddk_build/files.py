"""Which files a domain's ``path`` and ``data_files`` mean, and which builder of ``datasets`` reads them."""

import re
from collections import Counter
from glob import glob, has_magic
from pathlib import Path, PurePath
from typing import Any

from ddk_build.config import DomainConfig

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
"""By suffix; a file of any other is text."""
ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar"}
DOCUMENTS = {".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".pptx", ".xlsx"}
FORMATS = {*BUILDERS.values(), "text"}  # what ``path`` may be beside a place
# What lies beside the data and is none, by the name's beginning.
ASIDE = ("README", "LICENSE", "dataset_info", ".")


class FilesError(Exception):
    """In one line: what is not there, or what to write instead."""


def is_saved(path: str) -> bool:
    """Whether the folder was written by ``save_to_disk``."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def find(domain: DomainConfig) -> dict[str, Any]:
    """Arguments for ``datasets.load_dataset``.

    Raises
    ------
    FilesError
        A file that is named does not exist; files of several kinds are meant at once; a folder holds files
        that only a glob can choose among.
    """
    path, named = Path(domain.path), domain.data_files
    source = {"name": domain.name, "data_dir": domain.data_dir, "revision": domain.revision}
    if named is None:
        if "://" in domain.path:
            raise FilesError(
                f"path: {domain.path!r} is a URL: give it as data_files, with path json, csv, parquet or text"
            )
        if domain.path in FORMATS and not path.exists():
            raise FilesError(f"data_files: is missing; path {domain.path} says only how to read them")
        if path.is_file():
            return source | _read_by(domain.path, [domain.path])
        if has_magic(domain.path) and not path.exists():
            found = sorted(one for one in glob(domain.path, recursive=True) if Path(one).is_file())
            return source | _read_by(domain.path, found)
        if path.is_dir():
            _check_folder(path / (domain.data_dir or ""))
        elif _must_be_here(domain.path):
            raise FilesError(f"path: there is no file or folder {domain.path!r}")
    else:
        base = path / (domain.data_dir or "") if path.is_dir() else Path(domain.data_dir or "")
        for one in _listed(named):
            if "://" in one or (not path.is_dir() and domain.path not in FORMATS):
                continue  # on the hub, or the net: only asking would tell
            if not (glob(str(base / one), recursive=True) if has_magic(one) else (base / one).exists()):
                what = "no file matches" if has_magic(one) else "there is no file"
                raise FilesError(f"data_files: {what} {str(base / one)!r}")
        if domain.path == "csv" and {_suffix(one) for one in _listed(named)} == {".tsv"}:
            source["sep"] = "\t"
    return source | {"path": domain.path, "data_files": named}


def _read_by(meant: str, found: list[str]) -> dict[str, Any]:
    if not found:
        raise FilesError(f"path: no file matches {meant!r}")
    suffixes = Counter(_suffix(one) for one in found)
    _check_kinds(meant, {*suffixes})
    kinds = {(BUILDERS.get(suffix, "text"), suffix == ".tsv") for suffix in suffixes}
    if len(kinds) > 1:
        raise FilesError(f"path: {meant!r} means files of several kinds ({_counted(suffixes)})")
    [(builder, tabs)] = kinds
    return {"path": builder, "data_files": found} | ({"sep": "\t"} if tabs else {})


def _check_kinds(meant: str, suffixes: set[str]) -> None:
    if packed := suffixes & ARCHIVES:
        raise FilesError(f"path: {meant!r} means archives ({', '.join(sorted(packed))}); unpack them first")
    if bound := suffixes & DOCUMENTS:
        raise FilesError(
            f"path: {meant!r} means {', '.join(sorted(bound))}: save their text in files of its own"
        )


def _check_folder(folder: Path) -> None:
    """``datasets`` reads one kind of files in a folder, and says nothing of the others."""
    suffixes = Counter(
        _suffix(one.name)
        for one in folder.rglob("*")
        if one.is_file() and not any(part.startswith(ASIDE) for part in one.relative_to(folder).parts)
    )
    texts = Counter({suffix: count for suffix, count in suffixes.items() if suffix not in BUILDERS})
    read = {BUILDERS.get(suffix, "text") for suffix in suffixes if suffix in {*BUILDERS, ".txt"}}
    if (texts == suffixes and set(texts) - {".txt"}) or (len(read) > 1 and not _is_described(folder)):
        [(most, _)] = suffixes.most_common(1)
        _check_kinds(str(folder), {most})
        raise FilesError(
            f"path: the folder {str(folder)!r} holds {_counted(suffixes)}; say which are meant, such as "
            f"{str(folder / '**' / f'*{most}')!r}"
        )


def _is_described(folder: Path) -> bool:
    """Whether a dataset's card says which files are the data."""
    card = folder / "README.md"
    said = card.read_text("utf-8", "replace") if card.is_file() else ""
    return re.search(r"^[ -]*data_files:", said, re.MULTILINE) is not None


def _must_be_here(path: str) -> bool:
    """Whether a path that is not here cannot be a hub's id either: those are a name, or two."""
    named = PurePath(path).suffix.lower() in {*BUILDERS, *COMPRESSED, *ARCHIVES, ".txt", ".md"}
    return named or path.startswith(("/", ".", "~")) or len(PurePath(path).parts) > 2


def _suffix(name: str) -> str:
    suffixes = [suffix for suffix in PurePath(name).suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1].lower() if suffixes else ""


def _counted(suffixes: Counter[str]) -> str:
    most = [f"{count} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common(4)]
    return ", ".join(most) + (", ..." if len(suffixes) > 4 else "")


def _listed(named: str | list[str] | dict[str, str | list[str]]) -> list[str]:
    if isinstance(named, str):
        return [named]
    if isinstance(named, dict):
        return [one for value in named.values() for one in _listed(value)]
    return named
