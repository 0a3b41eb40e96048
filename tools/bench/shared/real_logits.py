"""The real teacher's answers for real text, kept in one file, and caches written from them.

Two heads: logits in float32, and the same rounded to bfloat16, as a head in bfloat16 gives them.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from rich.progress import track

from ddk_cache.cache.writer import Writer, open_writer
from ddk_cache.format import codec, layout
from ddk_cache.format.codebook import Codebook, fit_codebook
from ddk_cache.format.layout import Target
from ddk_cache.format.vocabulary import Vocabulary
from tools.real_data import DOMAINS, ROOT, teacher_folder, texts

CAPTURED = ROOT / "logits.npz"
SEQ_LENGTH = 1024
CALIBRATION, MEASURED = 2, 5  # rows of each domain
HEADS = ("float32", "bfloat16")
TOP_64 = Target()
SAMPLED = {samples: Target(kind="sampled", samples=samples) for samples in (12, 24, 50)}

Arrays = dict[str, NDArray[Any]]


def load(path: Path = CAPTURED) -> Arrays:
    """Return ``tokens``, ``segments`` and ``loss_mask`` [n, S], ``vocab_size``, and what ``answers`` reads.

    The first call captures them, in about two minutes on two cores. The rows for calibration come first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            rows = _rows()
            scratch = path.with_suffix(".tmp.npz")
            np.savez(scratch, **rows, **_capture(rows))  # type: ignore[arg-type]  # of allow_pickle
            scratch.rename(path)
    with np.load(path) as stored:
        return dict(stored)


def answers(captured: Arrays, head: str, target: Target) -> tuple[Arrays, Arrays]:
    """Return the answers for calibration and the measured ones.

    Each has ``ids`` and ``logprobs`` [n, S, E], ``tail_logprob`` and ``label_logprob`` [n, S].
    """
    prefix = f"{head}/{_name(target)}/"
    arrays = {name.removeprefix(prefix): array for name, array in captured.items() if name.startswith(prefix)}
    if target.kind == "topk" and target != TOP_64:
        arrays |= _cut(arrays, target)
    split = CALIBRATION * len(DOMAINS)
    return {name: x[:split] for name, x in arrays.items()}, {name: x[split:] for name, x in arrays.items()}


def fit(calibration: Arrays, target: Target, vocab_size: int) -> Codebook:
    """Return the codebook that a build fits to the rows for calibration."""
    answered = calibration["ids"][..., 0] >= 0
    return fit_codebook(calibration["ids"][answered], calibration["logprobs"][answered], target, vocab_size)


def write_cache(
    folder: Path, target: Target, codebook: Codebook, rows: Arrays, shard_rows: int = 256
) -> None:
    """Write a finished cache of one domain, ``text``; its first row is the validation split as well."""
    vocabulary = Vocabulary({"a": 0}, {})
    manifest = layout.Manifest(
        format="ddk-cache",
        version=layout.FORMAT_VERSION,
        teachers=(
            layout.TeacherInfo(
                model="SmolLM2", revision=None, dtype="float32", engine="transformers", engine_version="0"
            ),
        ),
        tokenizer_hash=vocabulary.fingerprint(),
        vocab_size=codebook.common.size,
        target=target,
        seq_length=SEQ_LENGTH,
        shard_rows=min(len(rows["tokens"]), shard_rows),
        validation_rows=1,
        seed=0,
        domains=(layout.DomainSource(name="text", source={}, max_tokens=None),),
    )
    with open_writer(str(folder), manifest, vocabulary) as writer:
        write_rows(writer, codebook, rows)
        writer.finalize_domain("text")


def write_rows(writer: Writer, codebook: Codebook, rows: Arrays) -> None:
    """Write tokens and answers of the domain ``text``; its first row is the validation split as well."""
    splits: dict[layout.SplitName, Arrays] = {
        "train": rows,
        "validation": {name: array[:1] for name, array in rows.items()},
    }
    write_tokens(writer, "text", splits)
    writer.set_codebook(codebook)
    for split, arrays in splits.items():
        stored = {"label_logprob": arrays["label_logprob"]}
        if writer.manifest.has_targets(split):
            mask = arrays["ids"][..., 0] >= 0
            targets = codec.Targets.from_arrays(arrays, mask)
            stored |= codec.encode(targets, mask, codebook, writer.manifest.target)
        for shard in writer.unfinished("text", split):
            part = _shard(stored, shard, writer.manifest.shard_rows)
            writer.write_answers("text", split, shard, writer.encode_rows(split, part))


def write_tokens(writer: Writer, domain: str, splits: Mapping[layout.SplitName, Arrays]) -> None:
    """Write the token arrays of a domain's rows and its state, as if its source had ended."""
    size = writer.manifest.shard_rows
    counts: dict[str, Any] = {}
    for split, arrays in splits.items():
        rows = {name: arrays[name] for name in layout.token_arrays(writer.manifest.seq_length)}
        for shard in range(-(-len(rows["tokens"]) // size)):
            writer.write_tokens(domain, split, shard, _shard(rows, shard, size))
        tokens, labels = (np.count_nonzero(rows[name]) for name in ("segments", "loss_mask"))
        counts[split] = {"rows": len(rows["tokens"]), "tokens": tokens, "labels": labels}
    ended = {"limits": [None], "exhausted": True, "source_rows": 1, "source_tokens": 1, "documents": 1}
    ended |= {"skipped": {}, "left_over": 0}
    writer.set_state(domain, layout.DomainState.model_validate(counts | ended))


def _shard(rows: Arrays, shard: int, size: int) -> Arrays:
    return {name: array[shard * size : (shard + 1) * size] for name, array in rows.items()}


def _name(target: Target) -> str:
    return "topk" if target.kind == "topk" else f"sampled{target.samples}"


def _cut(arrays: Arrays, target: Target) -> Arrays:
    """Keep fewer of the best 64 entries; the mass of the others goes to the tail."""
    ids, logprobs = (arrays[name][..., : target.top_k] for name in ("ids", "logprobs"))
    masses = np.exp(logprobs.astype(np.float64))
    kept = masses.cumsum(axis=-1) - masses < target.top_p
    all_masses = np.exp(arrays["logprobs"].astype(np.float64)).sum(axis=-1)
    tail = np.exp(arrays["tail_logprob"].astype(np.float64)) + all_masses - (masses * kept).sum(axis=-1)
    with np.errstate(divide="ignore"):
        tail_logprob = np.log(np.maximum(tail, 0)).astype(np.float32)
    return {
        "ids": np.where(kept, ids, -1),
        "logprobs": np.where(kept, logprobs, -np.float32(np.inf)),
        "tail_logprob": tail_logprob,
    }


def _rows() -> Arrays:
    """Pack text as a build does: whole documents, longer ones in chunks of seq_length."""
    from tokenizers import Tokenizer

    from ddk_build.data.documents import Document
    from ddk_build.data.packing.packer import Packer, Row, add_documents, to_arrays

    tokenizer = Tokenizer.from_file(str(teacher_folder() / "tokenizer.json"))

    def documents(domain: str) -> Iterator[Document]:
        for text in texts(domain):
            tokens = np.array(tokenizer.encode(text).ids, np.int32)
            yield Document(tokens, np.ones(len(tokens), np.bool_), digest=0)

    by_domain: list[list[Row]] = [
        [*add_documents(packer, documents(domain)), *packer.flush()][: CALIBRATION + MEASURED]
        for domain in DOMAINS
        for packer in [Packer(SEQ_LENGTH)]
    ]
    # Calibration first, domain after domain in turn.
    return to_arrays([row for rows in zip(*by_domain, strict=True) for row in rows], SEQ_LENGTH)


def _capture(rows: Arrays) -> Arrays:
    import torch
    from transformers import AutoModelForCausalLM

    from ddk_build.capture.scoring import requests, sampling_offsets
    from ddk_build.teacher.targets import SparseTarget, sparse_target

    model: Any = AutoModelForCausalLM.from_pretrained(teacher_folder(), dtype=torch.float32).eval()
    asked = requests(rows)
    positions = np.concatenate(asked.positions)  # in the flattened rows
    chance = sampling_offsets(0, "text", "train", range(len(rows["tokens"])), SEQ_LENGTH).ravel()
    targets: Sequence[Target] = (TOP_64, *SAMPLED.values())
    parts: dict[str, list[SparseTarget]] = {f"{head}/{_name(t)}": [] for head in HEADS for t in targets}
    with torch.inference_mode():
        for document, labelled in track(
            list(zip(asked.documents, asked.positions, strict=True)), "The teacher reads", transient=True
        ):
            tokens = torch.from_numpy(document.astype(np.int64))
            logits = model(tokens[None], use_cache=False).logits[0, :-1]
            draws = torch.from_numpy(chance[labelled])
            for head in HEADS:
                rounded = logits.to(getattr(torch, head)).float()
                for target in targets:
                    parts[f"{head}/{_name(target)}"].append(sparse_target(rounded, tokens[1:], target, draws))
    fills = {"ids": -1, "logprobs": -np.inf, "tail_logprob": -np.inf, "label_logprob": 0}
    arrays: Arrays = {"vocab_size": np.array(model.config.vocab_size)}
    for prefix, answered in parts.items():
        for name, fill in fills.items():
            values = torch.cat([getattr(part, name) for part in answered]).numpy()
            flat = np.full((rows["tokens"].size, *values.shape[1:]), fill, values.dtype)
            flat[positions] = values
            arrays[f"{prefix}/{name}"] = flat.reshape(*rows["tokens"].shape, *values.shape[1:])
    return arrays
