"""The folder of completions: a folder of parquet files a domain, and generate.json beside them.

A file holds all completions of a fixed range of prompts, which its name tells. It is written beside and then
renamed, so a file that is there is complete. Whatever kills the process, no row is lost or doubled.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ddk_build.data.written import NOTE, VOCABULARY, Written
from ddk_build.generate.config import WRITTEN_COLUMNS
from ddk_build.generate.engine import Completion, Request, Shard
from ddk_cache.errors import CacheError, ConfigError, counted
from ddk_cache.format.vocabulary import Vocabulary
from ddk_cache.util import durable
from ddk_cache.util.configuration import differences, flat

TYPES = (
    pa.list_(pa.int32()),
    pa.list_(pa.bool_()),
    pa.list_(pa.float32()),
    pa.string(),
    pa.int32(),
    pa.string(),
    pa.string(),
)
SCHEMA = pa.schema([*zip(WRITTEN_COLUMNS, TYPES, strict=True)])
KeptTypes = Mapping[str, pa.DataType]  # by column
LOCK = ".lock"
COUNTS = b"ddk_counts"  # the key of a file's Counts, in its metadata


def digest_of(prompt_ids: Sequence[str]) -> str:
    """Return the sha256 of a domain's prompts, in order."""
    return sha256("".join(prompt_ids).encode()).hexdigest()


class Counts(NamedTuple):
    """What some files hold."""

    completions: int = 0
    tokens: int = 0
    """Written ones."""
    truncated: int = 0
    """Completions that max_tokens cut, also those that were dropped."""
    empty: int = 0
    """Completions without text."""

    def __add__(self, other: "Counts") -> "Counts":  # type: ignore[override]
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class Folder:
    """A folder of completions that this process alone writes to; made by ``open_folder``."""

    def __init__(
        self, path: Path, note: Written, shard_prompts: int, kept: Mapping[str, KeptTypes] | None = None
    ) -> None:
        """``kept``: the types of the columns that each domain copies from its source."""
        self.path, self._note, self._kept = path, note, kept or {}
        self.shards = [
            Shard(name, first, min(first + shard_prompts, domain.prompts))
            for name, domain in note.domains.items()
            for first in range(0, domain.prompts, shard_prompts)
        ]
        """All shards, written or not."""

    def missing(self) -> list[Shard]:
        """Return the shards that are not written."""
        return [shard for shard in self.shards if not (self.path / shard.file).is_file()]

    def begin(self, vocabulary: Vocabulary) -> None:
        """Write the note of an unfinished folder, and remove the files of shards that have grown."""
        expected = {shard.file for shard in self.shards}
        self._write_note(dict.fromkeys(self._note.domains))
        durable.write(self.path / VOCABULARY, vocabulary.compress())
        for name in self._note.domains:
            folder = self.path / name
            durable.make_folder(folder)
            for path in folder.glob("*.parquet*"):
                if f"{name}/{path.name}" not in expected:
                    path.unlink()

    def write(self, shard: Shard, written: Sequence[tuple[Request, Completion]]) -> None:
        """Write a shard's completions, in the order of its prompts and samples.

        Raises ConfigError if all are empty, and no other shard of the domain is there.
        """
        if not any(completion.text.strip() for _, completion in written) and not any(
            (self.path / other.file).is_file() for other in self.shards if other.domain == shard.domain
        ):
            raise ConfigError(
                f"domains.{shard.domain}: all of its first {counted(len(written), 'completion')} are empty; "
                "the model ends at once: check its chat template, prompt_format and sampling.stop"
            )
        kept = [
            (request, completion)
            for request, completion in sorted(written, key=lambda pair: (pair[0].index, pair[0].sample))
            if not (self._note.drop_truncated and completion.finish_reason == "length")
        ]
        counts = Counts(
            completions=len(kept),
            tokens=sum(len(completion.tokens) for _, completion in kept),
            truncated=sum(completion.finish_reason == "length" for _, completion in written),
            empty=sum(not completion.text.strip() for _, completion in kept),
        )
        table = pa.Table.from_pylist([_row(*pair) for pair in kept], SCHEMA)
        for name, kind in self._kept.get(shard.domain, {}).items():
            table = table.append_column(
                name, pa.array([request.prompt.kept[name] for request, _ in kept], kind)
            )
        table = table.replace_schema_metadata({COUNTS: json.dumps(counts)})
        with durable.replacing(self.path / shard.file) as staged:
            # A dictionary of log-probabilities, which hardly repeat, made the file 1.4 times as large.
            pq.write_table(table, staged, compression="zstd", use_dictionary=False)

    def counts(self, domain: str) -> Counts:
        """Return what the files of a domain hold."""
        total = Counts()
        for shard in self.shards:
            if shard.domain == domain:
                file = pq.read_metadata(self.path / shard.file)
                stored = (file.metadata or {}).get(COUNTS)
                total += Counts(*json.loads(stored)) if stored else Counts(completions=file.num_rows)
        return total

    def finish(self) -> dict[str, Counts]:
        """Write the note of the finished folder; return what each domain's files hold."""
        counts = {name: self.counts(name) for name in self._note.domains}
        self._write_note({name: domain.completions for name, domain in counts.items()})
        return counts

    def _write_note(self, completions: Mapping[str, int | None]) -> None:
        domains = {
            name: domain.model_copy(update={"completions": completions[name]})
            for name, domain in self._note.domains.items()
        }
        note = self._note.model_copy(update={"domains": domains})
        durable.write(self.path / NOTE, note.model_dump_json(indent=2) + "\n")


def _row(request: Request, completion: Completion) -> dict[str, object]:
    prompt, written = request.prompt.tokens, completion.tokens
    return {
        "tokens": [*prompt, *written],
        "loss_mask": [False] * len(prompt) + [True] * len(written),
        "logprobs": completion.logprobs,
        "prompt_id": request.prompt.id,
        "sample": request.sample,
        "finish_reason": completion.finish_reason,
        "text": completion.text,
    }


@contextmanager
def open_folder(
    path: Path,
    note: Written,
    vocabulary: Vocabulary,
    shard_prompts: int,
    kept: Mapping[str, KeptTypes] | None = None,
) -> Iterator[Folder]:
    """Create the folder, or resume the one that is there, which ``check_folder`` accepts.

    Raises CacheError if another process writes to it.
    """
    durable.make_folder(path)
    with (path / LOCK).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the end of the process releases it
        except BlockingIOError:
            raise CacheError(f"{path}: another generate is at work there") from None
        folder = Folder(path, note, shard_prompts, kept)
        folder.begin(vocabulary)
        yield folder


def check_folder(path: Path, note: Written, ids: Mapping[str, Sequence[str]]) -> Written:
    """Return the note to write: ``note``, with the versions that the folder was begun with.

    ``ids`` are the prompts' by domain. Domains may have been added, and prompts at a domain's end.

    Raises ConfigError if the folder was written with another configuration or holds other files; or its
    prompts have changed.
    """
    existing = Written.read(path)
    if existing is None:
        names = (file.name for file in path.glob("[!.]*"))
        if others := sorted(name for name in names if not durable.is_staged(name)):
            raise ConfigError(
                f"output: {path} holds other files, such as {others[0]}; name a new or an empty folder"
            )
        return note
    if conflicts := [*_conflicts(existing, note)]:
        raise ConfigError(f"output: {path} was written with another configuration: {'; '.join(conflicts)}")
    for name, domain in existing.domains.items():
        if digest_of(ids[name][: domain.prompts]) != domain.prompt_ids:
            raise ConfigError(
                f"domains.{name}: its prompts have changed since {path} was begun; name a new folder"
            )
    return note.model_copy(
        update=existing.model_dump(include={"versions", "writer_teachers"}) | {"writer": existing.writer}
    )


def _conflicts(existing: Written, requested: Written) -> Iterator[str]:
    """Yield each conflicting key as "key: value in the folder -> value in the configuration"."""
    before, after = _settings(existing), _settings(requested)
    for name, domain in existing.domains.items():
        match = requested.domains.get(name)
        if match is None:
            yield f"domains.{name}: in the folder -> missing"
            continue
        before |= flat(domain.source, f"domains.{name}.")
        after |= flat(match.source, f"domains.{name}.")
        if match.prompts < domain.prompts:
            yield f"domains.{name}: {domain.prompts:,} prompts -> {match.prompts:,}"
    yield from differences(before, after)


def _settings(note: Written) -> dict[str, Any]:
    """Return everything but the domains that decides the completions, by dotted key."""
    writer = note.writer.model_dump(exclude={"engine_version"})
    others = note.model_dump(exclude={"writer", "writer_teachers", "versions", "domains"})
    return flat(writer | others)
