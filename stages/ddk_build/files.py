"""Which files a domain's ``path`` and ``data_files`` mean, and which builder of ``datasets`` reads them."""

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
ASIDE = ("README", "LICENSE", ".")  # what lies beside the data and is none, by the name's beginning


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
        if path.is_file():
            return source | _read_by(domain.path, [domain.path])
        if has_magic(domain.path) and not path.exists():
            found = sorted(one for one in glob(domain.path, recursive=True) if Path(one).is_file())
            return source | _read_by(domain.path, found)
        if path.is_dir():
            _check_folder(path / (domain.data_dir or ""))
        elif path.is_absolute() or domain.path.startswith((".", "~")) or len(path.parts) > 2:
            raise FilesError(f"path: there is no file or folder {domain.path!r}")
    else:
        base = path / (domain.data_dir or "") if path.is_dir() else Path(domain.data_dir or "")
        for one in _listed(named):
            if "://" in one or (not path.is_dir() and domain.path not in {*BUILDERS.values(), "text"}):
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
    kinds = {(BUILDERS.get(suffix, "text"), suffix == ".tsv") for suffix in suffixes}
    if len(kinds) > 1:
        raise FilesError(f"path: {meant!r} means files of several kinds ({_counted(suffixes)})")
    [(builder, tabs)] = kinds
    return {"path": builder, "data_files": found} | ({"sep": "\t"} if tabs else {})


def _check_folder(folder: Path) -> None:
    """``datasets`` reads one kind of files in a folder, and says nothing of the others."""
    suffixes = Counter(
        _suffix(one.name)
        for one in folder.rglob("*")
        if one.is_file() and not any(part.startswith(ASIDE) for part in one.relative_to(folder).parts)
    )
    texts = Counter({suffix: count for suffix, count in suffixes.items() if suffix not in BUILDERS})
    if texts == suffixes and set(texts) - {".txt"}:
        [(most, _)] = texts.most_common(1)
        raise FilesError(
            f"path: the folder {str(folder)!r} holds {_counted(texts)}; say which are meant, such as "
            f"{str(folder / '**' / f'*{most}')!r}"
        )


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
