"""What the real teacher says of real text, kept in one file, and caches made of it: for the benchmarks.

Both heads are there: logits in float32, and the same rounded to bfloat16 as a head in bfloat16 gives them.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from rich.progress import track

from ddk_cache import codec, layout
from ddk_cache.layout import Target
from ddk_cache.tokens import Vocabulary
from ddk_cache.writer import Writer, open_writer
from tools.real_data import DOMAINS, ROOT, teacher_folder, texts

CAPTURED = ROOT / "logits.npz"
SEQ_LENGTH = 1024
CALIBRATION, MEASURED = 2, 5  # rows of each domain
HEADS = ("float32", "bfloat16")
TOP_64 = Target()
SAMPLED = {samples: Target(kind="sampled", samples=samples) for samples in (12, 24, 50)}

Arrays = dict[str, NDArray[Any]]


def load(path: Path = CAPTURED) -> Arrays:
    """``tokens``, ``segments`` and ``loss_mask``, [n, S] each, ``vocab_size``, and what ``answers`` looks up.

    Captured on the first call: about two minutes on two cores. The rows for calibration come first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            rows = _rows()
            scratch = path.with_suffix(".tmp.npz")
            np.savez(scratch, **rows, **_capture(rows))
            scratch.rename(path)
    with np.load(path) as stored:
        return dict(stored)


def answers(captured: Arrays, head: str, target: Target) -> tuple[Arrays, Arrays]:
    """The answers for calibration and the measured ones: ``ids``, ``logprobs``, ``tail_logprob`` and
    ``label_logprob``, [n, S, E] and [n, S]."""
    prefix = f"{head}/{_name(target)}/"
    found = {name.removeprefix(prefix): array for name, array in captured.items() if name.startswith(prefix)}
    if target.kind == "topk" and target != TOP_64:
        found |= _cut(found, target)
    split = CALIBRATION * len(DOMAINS)
    return {name: x[:split] for name, x in found.items()}, {name: x[split:] for name, x in found.items()}


def fit(calibration: Arrays, target: Target, vocab_size: int) -> codec.Codebook:
    """The codebook that a build makes of the rows for calibration."""
    there = calibration["ids"][..., 0] >= 0
    return codec.fit(calibration["ids"][there], calibration["logprobs"][there], target, vocab_size)


def write_cache(
    folder: Path, target: Target, codebook: codec.Codebook, rows: Arrays, found: Arrays, shard_rows: int = 256
) -> None:
    """A finished cache of one domain, ``text``; its first row makes the validation split."""
    vocabulary = Vocabulary({"a": 0}, {})
    count = len(rows["tokens"])
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
        shard_rows=min(count, shard_rows),
        validation_rows=1,
        seed=0,
        domains=(layout.DomainSource(name="text", source={}, max_tokens=None),),
    )
    with open_writer(str(folder), manifest, vocabulary) as writer:
        _write(writer, codebook, {"train": slice(None), "validation": slice(1)}, rows, found)


def _write(
    writer: Writer, codebook: codec.Codebook, splits: dict[layout.Split, slice], rows: Arrays, found: Arrays
) -> None:
    size = writer.manifest.shard_rows
    counts = {}
    for split, chosen in splits.items():
        part = {name: rows[name][chosen] for name in layout.token_arrays(SEQ_LENGTH)}
        for shard, start in enumerate(range(0, len(part["tokens"]), size)):
            of_shard = {name: array[start : start + size] for name, array in part.items()}
            writer.write_tokens("text", split, shard, of_shard)
        tokens, labels = (np.count_nonzero(part[name]) for name in ("segments", "loss_mask"))
        counts[split] = layout.SplitState(rows=len(part["tokens"]), tokens=tokens, labels=labels)
    state = layout.DomainState(
        **counts,
        limits=(None,),
        exhausted=True,
        source_rows=0,
        source_tokens=0,
        documents=0,
        skipped={},
        left_over=0,
        held_out=None,
    )
    writer.set_state("text", state)
    writer.set_codebook(codebook)
    for split, chosen in splits.items():
        part = {name: array[chosen] for name, array in found.items()}
        for shard in writer.unfinished("text", split):
            here = {name: array[shard * size : (shard + 1) * size] for name, array in part.items()}
            stored = {"label_logprob": here.pop("label_logprob")}
            if split == "train":
                stored |= codec.encode(**here, codebook=codebook, target=writer.manifest.target)
            writer.write_answers("text", split, shard, writer.pack(split, stored))
    writer.settle("text")


def _name(target: Target) -> str:
    return "topk" if target.kind == "topk" else f"sampled{target.samples}"


def _cut(found: Arrays, target: Target) -> Arrays:
    """Fewer of the best 64 entries; what is left out goes to the tail."""
    ids, logprobs = (found[name][..., : target.top_k] for name in ("ids", "logprobs"))
    masses = np.exp(logprobs.astype(np.float64))
    kept = masses.cumsum(axis=-1) - masses < target.top_p
    all_masses = np.exp(found["logprobs"].astype(np.float64)).sum(axis=-1)
    tail = np.exp(found["tail_logprob"].astype(np.float64)) + all_masses - (masses * kept).sum(axis=-1)
    with np.errstate(divide="ignore"):
        tail_logprob = np.log(np.maximum(tail, 0)).astype(np.float32)
    return {
        "ids": np.where(kept, ids, -1),
        "logprobs": np.where(kept, logprobs, -np.float32(np.inf)),
        "tail_logprob": tail_logprob,
    }


def _rows() -> Arrays:
    """Packed as a build packs them: whole documents, longer ones in pieces of seq_length."""
    from tokenizers import Tokenizer

    from ddk_build.documents import Document
    from ddk_build.packing import Packer, Row, batch, pack

    tokenizer = Tokenizer.from_file(str(teacher_folder() / "tokenizer.json"))

    def documents(domain: str) -> Iterator[Document]:
        for text in texts(domain):
            tokens = np.array(tokenizer.encode(text).ids, np.int32)
            yield Document(tokens, np.ones(len(tokens), np.bool_), digest=0)

    wanted = CALIBRATION + MEASURED
    by_domain: list[list[Row]] = [
        list(islice(pack(documents(domain), Packer(SEQ_LENGTH)), wanted)) for domain in DOMAINS
    ]
    # Calibration first, domain after domain in turn.
    packed = batch([row for rows in zip(*by_domain, strict=True) for row in rows], SEQ_LENGTH)
    return vars(packed)


def _capture(rows: Arrays) -> Arrays:
    import torch
    from transformers import AutoModelForCausalLM

    from ddk_build.scoring import offsets, requests
    from ddk_build.targets import SparseTarget, sparse_target

    model: Any = AutoModelForCausalLM.from_pretrained(teacher_folder(), dtype=torch.float32).eval()
    asked = requests(rows)
    places = np.concatenate(asked.places)
    chance = offsets(0, "text", "train", range(len(rows["tokens"])), SEQ_LENGTH).ravel()
    targets: Sequence[Target] = (TOP_64, *SAMPLED.values())
    parts: dict[str, list[SparseTarget]] = {f"{head}/{_name(t)}": [] for head in HEADS for t in targets}
    with torch.inference_mode():
        for document, place in track(
            list(zip(asked.documents, asked.places, strict=True)), "The teacher reads", transient=True
        ):
            tokens = torch.from_numpy(document.astype(np.int64))
            logits = model(tokens[None], use_cache=False).logits[0, :-1]
            draws = torch.from_numpy(chance[place])
            for head in HEADS:
                rounded = logits.to(getattr(torch, head)).float()
                for target in targets:
                    parts[f"{head}/{_name(target)}"].append(sparse_target(rounded, tokens[1:], target, draws))
    absent = {"ids": -1, "logprobs": -np.inf, "tail_logprob": -np.inf, "label_logprob": 0}
    found: Arrays = {"vocab_size": np.array(model.config.vocab_size)}
    for prefix, answered in parts.items():
        for name, fill in absent.items():
            values = torch.cat([getattr(part, name) for part in answered]).numpy()
            flat = np.full((rows["tokens"].size, *values.shape[1:]), fill, values.dtype)
            flat[places] = values
            found[f"{prefix}/{name}"] = flat.reshape(*rows["tokens"].shape, *values.shape[1:])
    return found
