"""Import distributions that another tool has stored: DistillKit's parquet rows become a cache.

A row has ``input_ids`` [T], ``token_ids`` [T, k] and ``top_values`` [T, k], log-probabilities at temperature
1, and perhaps ``attention_mask`` and ``labels`` [T]. Position t is about token t + 1, as in a cache; where
``labels`` has -100, it does not count.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from ddk_build.config import TeacherConfig
from ddk_build.teacher.model import model_config
from ddk_build.teacher.tokenizer import load_tokenizer, vocabulary
from ddk_cache.cache.writer import Writer, open_writer
from ddk_cache.errors import ConfigError, counted
from ddk_cache.format import codec, layout
from ddk_cache.format.codebook import fit_codebook
from ddk_cache.util.configuration import first_problem

REQUIRED = ("input_ids", "token_ids", "top_values")
OPTIONAL = ("attention_mask", "labels")
IGNORED = -100
LEAST_LOGPROB = -5e3  # nats; trainers that need all k entries write absent ones below
MOST_MASS = 1e-2  # by which k probabilities may exceed 1: values in half precision are rounded by that much
SHARD_TOKENS = 1 << 18
HELD_OUT = 20  # about one row in 20 is for validation

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Imported:
    """What an import has written."""

    rows: dict[layout.SplitName, int]
    labels: int
    unknown: int  # labels outside the entries, whose log-probability is estimated

    def as_text(self) -> str:
        """Return one line for the terminal."""
        share = self.unknown / max(self.labels, 1)
        return (
            f"{counted(self.rows['train'], 'row')}, {counted(self.rows['validation'], 'row')} held out, "
            f"{counted(self.labels, 'label')}; {share:.1%} of the labels are outside the stored entries: for "
            "these the teacher's log-probability is that of an average token outside"
        )


class DistillKitRows:
    """The rows of some parquet files, padded to the longest; raises ConfigError for files without them."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not self.files or not self.files[0].is_file():
            raise ConfigError(f"{path}: holds no parquet files")
        self.vocab_size = vocab_size
        columns = pq.ParquetFile(self.files[0]).schema_arrow.names
        if missing := [name for name in REQUIRED if name not in columns]:
            raise ConfigError(
                f"{self.files[0]}: has no column {missing[0]}; DistillKit's rows have {REQUIRED}"
            )
        self.columns = [name for name in (*REQUIRED, *OPTIONAL) if name in columns]
        self.seq_length, self.width, digests = 0, 0, list[int]()
        for row in self._raw(["input_ids"]):
            self.seq_length = max(self.seq_length, len(row["input_ids"]))
            content = np.asarray(row["input_ids"], np.int64).tobytes()
            digests.append(int.from_bytes(sha256(content).digest()[:8]))
        if len(digests) < 2:
            raise ConfigError(f"{path}: needs two rows, one for each split")
        self.width = len(next(self._raw(["token_ids"]))["token_ids"][0])
        values = np.array(digests, np.uint64)
        # By a digest, so that equal rows are in the same split; at least the smallest digest is held out.
        threshold = max(np.uint64(2**64 // HELD_OUT), values.min())
        self.is_held_out = values <= threshold
        if self.is_held_out.all():
            raise ConfigError(f"{path}: all rows are equal; validation needs others")

    def _raw(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        for file in self.files:
            index = 0
            for batch in pq.ParquetFile(file).iter_batches(batch_size=64, columns=columns):
                for lists in zip(*(batch.column(name) for name in columns), strict=True):
                    row = {name: value.values for name, value in zip(columns, lists, strict=True)}
                    if problem := self._problem(row):
                        raise ConfigError(f"{file}: row {index}: {problem}; correct or remove the row")
                    yield row
                    index += 1

    def _problem(self, row: dict[str, Any]) -> str | None:
        """Return what is wrong with the shape of a row's columns."""
        for name, values in row.items():
            if values is None or not len(values):
                return f"{name} is null or empty"
            is_nested = name in ("token_ids", "top_values")
            if values.null_count or (is_nested and values.flatten().null_count):
                return f"{name} holds a null"
            if is_nested and self.width and np.any(np.asarray(pc.list_value_length(values)) != self.width):
                return f"{name} does not have {self.width} values at each position, as the first row does"
        lengths = {name: len(values) for name, values in row.items()}
        if len(set(lengths.values())) > 1:
            return "its columns differ in length: " + ", ".join(f"{name} {n}" for name, n in lengths.items())
        return None

    def _check_ids(self, name: str, ids: NDArray[Any]) -> None:
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise ConfigError(f"{name}: {outside[0]} is no token of {self.vocab_size:,}: another model")

    def shards(
        self, split: layout.SplitName, rows: int, columns: list[str]
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield a split's rows, ``rows`` at a time."""
        remaining = compress(self._raw(columns), self.is_held_out == (split == "validation"))
        while chunk := list(islice(remaining, rows)):
            yield chunk

    def tokens(self, rows: list[dict[str, Any]]) -> Arrays:
        """Return tokens, segments and loss_mask of rows, [n, S] each."""
        shape = len(rows), self.seq_length
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.uint16)
        has_target = np.zeros(shape, np.bool_)
        for index, row in enumerate(rows):
            values = np.asarray(row["input_ids"])
            self._check_ids("input_ids", values)
            inside = np.asarray(row.get("attention_mask", np.ones(len(values)))) > 0
            tokens[index, : len(values)] = np.where(inside, values, 0)
            segments[index, : len(values)] = inside
            counts = np.asarray(row["labels"]) != IGNORED if "labels" in row else inside
            best = _matrix(row["top_values"], self.width).max(1)
            has_target[index, : len(values)] = counts & (best > LEAST_LOGPROB)
        mask = np.zeros(shape, np.bool_)
        mask[:, :-1] = has_target[:, :-1] & (segments[:, :-1] > 0) & (segments[:, 1:] > 0)
        return {"tokens": tokens, "segments": segments, "loss_mask": mask}

    def answers(
        self, rows: list[dict[str, Any]], tokens: Arrays
    ) -> tuple[codec.Targets, NDArray[np.float32], int]:
        """Return targets at the labels, the labels' log-probabilities [n, S], and how many are estimated."""
        mask, parts = tokens["loss_mask"], []
        for index, row in enumerate(rows):
            kept = mask[index, : len(row["input_ids"])]
            ids, logprobs = (_matrix(row[name], self.width)[kept] for name in ("token_ids", "top_values"))
            present = logprobs > LEAST_LOGPROB
            parts.append((np.where(present, ids, -1), np.where(present, logprobs, -np.inf)))
        ids, logprobs = (np.concatenate(values) for values in zip(*parts, strict=True))
        self._check_ids("token_ids", ids[logprobs > -np.inf])
        mass = np.exp(logprobs.astype(np.float64)).sum(1)
        if mass.size and mass.max() > 1 + MOST_MASS:
            raise ConfigError(
                f"top_values: are no log-probabilities: those of a position sum to {mass.max():.3f}"
            )
        with np.errstate(divide="ignore"):
            tail = np.log(np.clip(1 - mass, 0, 1)).astype(np.float32)
        targets = codec.Targets(ids.astype(np.int32), logprobs.astype(np.float32), tail)
        labels = tokens["tokens"][:, 1:][mask[:, :-1]]
        is_label = ids == labels[:, None]
        outside = tail - np.log(np.maximum(self.vocab_size - (ids >= 0).sum(1), 1))
        stored, is_stored = np.where(is_label, logprobs, -np.inf).max(1), is_label.any(1)
        label_logprob = np.zeros(mask.shape, np.float32)
        label_logprob[mask] = np.where(is_stored, stored, np.maximum(outside, LEAST_LOGPROB / 100))
        return targets, label_logprob, int((~is_stored).sum())


def _matrix(values: pa.Array, width: int) -> NDArray[Any]:
    """Return lists of ``width`` values each as an array, [T, width]."""
    return np.asarray(values.flatten()).reshape(-1, width)


def import_distillkit(
    path: Path, cache: str, teacher: TeacherConfig, *, domain: str = "imported"
) -> Imported:
    """Write the rows of parquet files as a cache with one domain; run again, it resumes.

    ``teacher`` is the model that answered: its tokenizer and configuration are read, its weights are not.

    Raises ConfigError if a file has other columns, or ids or probabilities that cannot be the teacher's, and
    for a domain's name, a row's length or a number of entries that no cache has.
    """
    with _valid("--domain"):
        named = layout.DomainSource(name=domain, source={"path": str(path)}, max_tokens=None)
    teacher_vocabulary = vocabulary(load_tokenizer(teacher))
    source = DistillKitRows(path, model_config(teacher).vocab_size)
    with _valid(str(path)):
        manifest = layout.Manifest(
            format="ddk-cache",
            version=layout.FORMAT_VERSION,
            teachers=(
                layout.TeacherInfo(
                    model=teacher.model,
                    revision=teacher.revision,
                    dtype="unknown",
                    engine="distillkit",
                    engine_version="",
                ),
            ),
            tokenizer_hash=teacher_vocabulary.fingerprint(),
            vocab_size=source.vocab_size,
            target=layout.Target(top_k=source.width),
            seq_length=source.seq_length,
            shard_rows=max(1, SHARD_TOKENS // source.seq_length),
            validation_rows=int(source.is_held_out.sum()),
            validation_targets=True,
            seed=0,
            domains=(named,),
        )
    with open_writer(cache, manifest, teacher_vocabulary) as writer:
        state = _write_tokens(writer, source, domain)
        unknown = sum(_write_answers(writer, source, domain, split) for split in layout.SPLITS)
        writer.finalize_domain(domain)
    rows = {split: state.split(split).rows for split in layout.SPLITS}
    return Imported(rows, state.train.labels + state.validation.labels, unknown)


@contextmanager
def _valid(where: str) -> Iterator[None]:
    """Turn a value that no manifest may have into a ConfigError that begins with ``where``."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_problem(error, layout.Manifest)}") from error


def _write_tokens(writer: Writer, source: DistillKitRows, domain: str) -> layout.DomainState:
    counts = dict.fromkeys(layout.SPLITS, layout.SplitState())
    columns = [name for name in source.columns if name != "token_ids"]
    for split in layout.SPLITS:
        for shard, chunk in enumerate(source.shards(split, writer.manifest.shard_rows, columns)):
            arrays = source.tokens(chunk)
            writer.write_tokens(domain, split, shard, arrays)
            counts[split] = counts[split].plus(arrays)
    total = counts["train"].rows + counts["validation"].rows
    state = layout.DomainState(
        train=counts["train"],
        validation=counts["validation"],
        limits=(None,),
        exhausted=True,
        source_rows=total,
        source_tokens=counts["train"].tokens + counts["validation"].tokens,
        documents=total,
        skipped={},
        left_over=0,
    )
    writer.set_state(domain, state)
    return state


def _write_answers(writer: Writer, source: DistillKitRows, domain: str, split: layout.SplitName) -> int:
    """Encode and write a split's unfinished shards; return the number of labels without an entry."""
    unfinished, unknown = set(writer.unfinished(domain, split)), 0
    for shard, chunk in enumerate(source.shards(split, writer.manifest.shard_rows, source.columns)):
        tokens = source.tokens(chunk)
        targets, label_logprob, estimated = source.answers(chunk, tokens)
        unknown += estimated
        if shard not in unfinished:
            continue
        codebook = writer.codebook()
        if codebook is None:
            target = writer.manifest.target
            codebook = fit_codebook(targets.ids, targets.logprobs, target, source.vocab_size)
            writer.set_codebook(codebook)
        encoded = codec.encode(targets, tokens["loss_mask"], codebook, writer.manifest.target)
        answers = {"label_logprob": label_logprob} | encoded
        writer.write_answers(domain, split, shard, writer.encode_rows(split, answers))
    return unknown
