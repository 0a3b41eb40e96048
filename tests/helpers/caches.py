"""A small cache written through the library alone: random tokens and answers, no teacher."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ddk_cache.cache.reader import Cache
from ddk_cache.cache.writer import Writer
from ddk_cache.format import codec, layout, zarr_documents
from ddk_cache.format.codebook import fit_codebook
from ddk_cache.format.vocabulary import Vocabulary

SEQ_LENGTH, VOCABULARY, SHARD_ROWS = 16, 300, 4
VOCABULARY_MAP = Vocabulary({f"token{index}": index for index in range(VOCABULARY)}, {"eos_token": "token0"})
TEACHER = {"model": "teacher", "revision": None, "dtype": "float32", "engine": "none", "engine_version": "0"}
ROWS: dict[layout.SplitName, int] = {"train": 10, "validation": 3}


def make_manifest(*names: str, **changes: object) -> layout.Manifest:
    return layout.Manifest.model_validate(
        {
            "format": "ddk-cache",
            "version": layout.FORMAT_VERSION,
            "teachers": [TEACHER],
            "tokenizer_hash": VOCABULARY_MAP.fingerprint(),
            "vocab_size": VOCABULARY,
            "target": {"top_k": 5},
            "seq_length": SEQ_LENGTH,
            "shard_rows": SHARD_ROWS,
            "validation_rows": ROWS["validation"],
            "seed": 0,
            "domains": [{"name": name, "source": {"path": name}, "max_tokens": None} for name in names],
        }
        | changes
    )


def zarr_array(cache: Cache, name: str) -> zarr.Array[Any]:
    """Return an array of a cache as zarr opens it."""
    array = cache.as_zarr()[name]
    assert isinstance(array, zarr.Array)
    return array


def read_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a document's attribute and update its digest."""
    attribute = json.loads(path.read_text())["attributes"]["ddk_cache"]
    attribute.pop("sha256")
    change(attribute)
    path.write_bytes(zarr_documents.group(attribute))


def make_rows(n: int, seed: int) -> dict[str, np.ndarray]:
    """Return rows of two documents and some padding."""
    random = np.random.default_rng(seed)
    segments = np.repeat(np.array([[1, 1, 2, 0]], np.uint16), SEQ_LENGTH // 4, axis=1).repeat(n, axis=0)
    mask = np.zeros((n, SEQ_LENGTH), bool)
    mask[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
    tokens = np.where(segments > 0, random.integers(0, VOCABULARY, (n, SEQ_LENGTH)), 0).astype(np.int32)
    return {"tokens": tokens, "segments": segments, "loss_mask": mask}


def make_answers(mask: np.ndarray, target: layout.Target, seed: int) -> dict[str, np.ndarray]:
    """Return a teacher's answers where ``mask`` [n, S] is set, by name."""
    random = np.random.default_rng(seed)
    n, width = len(mask), target.width
    scores = np.sort(random.normal(0, 2, (n, SEQ_LENGTH, VOCABULARY)))[..., ::-1]
    logprobs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    ids = np.argsort(random.random((n, SEQ_LENGTH, VOCABULARY)), axis=-1)[..., :width]
    masses = np.exp(logprobs)
    label_logprob = np.where(mask, logprobs[..., 7], 0).astype(np.float32)
    if target.kind == "label":
        return {"label_logprob": label_logprob}
    if target.kind == "topk":
        kept = masses.cumsum(-1) - masses < target.top_p
        kept[..., width:] = False
        entries, tail = logprobs[..., :width], np.log((masses * ~kept).sum(-1))
    else:
        counts = np.sort(random.multinomial(width, masses))[..., ::-1]
        kept, entries = counts > 0, np.log(np.maximum(counts, 1) / width)[..., :width]
        tail = np.full(mask.shape, -np.inf)
    present = kept[..., :width] & mask[..., None]
    return {
        "ids": np.where(present, ids, -1).astype(np.int32),
        "logprobs": np.where(present, entries, -np.inf).astype(np.float32),
        "tail_logprob": np.where(mask, tail, -np.inf).astype(np.float32),
        "label_logprob": label_logprob,
    }


def write_domain(writer: Writer, name: str, seed: int, *, answers: bool = True) -> dict[str, np.ndarray]:
    """Write the tokens and, if asked, the answers of a domain; return the train split's originals."""
    kept: dict[str, np.ndarray] = {}
    counts: dict[str, dict[str, int]] = {}
    for split in layout.SPLITS:
        rows = make_rows(ROWS[split], seed)
        for shard, start in enumerate(range(0, ROWS[split], SHARD_ROWS)):
            part = {array: values[start : start + SHARD_ROWS] for array, values in rows.items()}
            writer.write_tokens(name, split, shard, part)
        counts[split] = {
            "rows": ROWS[split],
            "tokens": int((rows["segments"] > 0).sum()),
            "labels": int(rows["loss_mask"].sum()),
        }
        if split == "train":
            kept = rows
    state = {
        "limits": [None],
        "exhausted": True,
        "source_rows": 26,
        "source_tokens": 13 * 12,
        "documents": 26,
        "skipped": {},
        "left_over": 0,
    }
    writer.set_state(name, layout.DomainState.model_validate(counts | state))
    if not answers:
        return kept
    if writer.manifest.target.kind != "label" and writer.codebook() is None:
        sample = make_answers(np.ones((2, SEQ_LENGTH), bool), writer.manifest.target, 99)
        width = writer.manifest.target.width
        ids, logprobs = sample["ids"].reshape(-1, width), sample["logprobs"].reshape(-1, width)
        writer.set_codebook(fit_codebook(ids, logprobs, writer.manifest.target, VOCABULARY))
    for split in layout.SPLITS:
        originals = make_answers(make_rows(ROWS[split], seed)["loss_mask"], writer.manifest.target, seed)
        for shard in writer.unfinished(name, split):
            write_shard(writer, name, split, shard, originals)
        if split == "train":
            kept = kept | originals
    writer.finalize_domain(name)
    return kept


def write_shard(
    writer: Writer, name: str, split: layout.SplitName, shard: int, answers: dict[str, np.ndarray]
) -> None:
    part = {array: values[shard * SHARD_ROWS :][:SHARD_ROWS] for array, values in answers.items()}
    stored = {"label_logprob": part["label_logprob"]}
    if writer.manifest.has_targets(split):
        codebook = writer.codebook()
        assert codebook is not None
        mask = part["ids"][..., 0] >= 0
        stored |= codec.encode(codec.Targets.from_arrays(part, mask), mask, codebook, writer.manifest.target)
    writer.write_answers(name, split, shard, writer.encode_rows(split, stored))
