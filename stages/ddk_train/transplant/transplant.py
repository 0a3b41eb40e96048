"""Write a student with the tokenizer of another model: the same body, new embeddings."""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ddk_cache import Cache
from ddk_cache.errors import ConfigError, counted
from ddk_train.errors import writing
from ddk_train.student.files import loading, save_model
from ddk_train.student.spelling import ROLES, Spelling, sources
from ddk_train.student.tokenizer import read_tokenizer
from ddk_train.transplant.embeddings import METHODS

DOCUMENTS = 32  # of each domain, to measure bits per byte


@dataclass(frozen=True)
class Transplanted:
    """What the new embeddings were made of, and what the change cost."""

    sources: list[list[int]]  # by new id
    before: dict[str, float]  # held-out bits per byte by domain; empty without a cache
    after: dict[str, float]

    def as_text(self) -> str:
        """Return it in a few lines."""
        spelled = [len(ids) for ids in self.sources if len(ids) > 1]
        same = sum(len(ids) == 1 for ids in self.sources)
        rest = len(self.sources) - same - len(spelled)
        lines = [f"{counted(len(self.sources), 'token')}: {same:,} copied from the same token"]
        if spelled:
            lines.append(f"{len(spelled):,} from the {fmean(spelled):.1f} tokens, on average, that spell it")
        if rest:
            lines.append(f"{rest:,} that nothing spells, from the mean of all")
        text = "; ".join(lines)
        if not self.before:
            return text
        width = max(map(len, self.before))
        rows = (f"{name:{width}}  {self.before[name]:.3f} -> {self.after[name]:.3f}" for name in self.before)
        return "\n".join([text, "held-out bits per byte, before -> after:", *rows])


def transplant(
    student: str,
    tokenizer: str,
    out: Path,
    *,
    method: str = "mean",
    cache: Cache | None = None,
) -> Transplanted:
    """Write ``student`` with the tokenizer of the model ``tokenizer`` into the new folder ``out``.

    Parameters
    ----------
    student, tokenizer
        Folders or hub ids; the second needs weights only for the method ``omp``.
    method
        A name of ``METHODS``.
    cache
        To measure bits per byte before and after, on its held-out rows.

    Raises ConfigError if a model or tokenizer does not load, or the student has other parameters that depend
    on its vocabulary, and TrainingError if ``out`` cannot be written.
    """
    from transformers import AutoModelForCausalLM

    if out.exists() and (any(out.iterdir()) or out.samefile(".")):
        raise ConfigError(f"{out}: is not empty, or the current folder; name a new folder")
    old = read_tokenizer("student", student)
    new = read_tokenizer("tokenizer", tokenizer)
    with loading(student):
        model: Any = AutoModelForCausalLM.from_pretrained(student, dtype="auto", use_safetensors=True)
    before = bits_per_byte(model, old, cache, new) if cache else {}
    made = sources(Spelling(new), Spelling(old))
    donor = _embeddings(tokenizer) if method == "omp" else None
    replace_embeddings(model, made, method, donor)
    _take_roles(model, new, tokenizer)
    after = bits_per_byte(model, new, cache, new) if cache else {}
    final = out.resolve()  # a link to an empty folder stays one
    scratch = final.with_name(f".{final.name}.unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    with writing(out):
        save_model(model, scratch)
        new.save_pretrained(scratch)
        scratch.replace(final)
    return Transplanted(made, before, after)


@torch.no_grad()
def replace_embeddings(
    model: Any, made: Sequence[Sequence[int]], method: str, donor: Tensor | None = None
) -> None:
    """Replace the input and output embeddings of a model, and the bias of its head, tied or not."""
    first, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts = {"first": first.weight.clone(), "head": head.weight.clone()}
    bias = None if head.bias is None else head.bias.clone()
    _check_vocabulary_parameters(model)
    tied = first.weight is head.weight
    model.resize_token_embeddings(len(made), mean_resizing=False)
    first, head = model.get_input_embeddings(), model.get_output_embeddings()
    first.weight.copy_(METHODS[method](parts["first"], made, donor))
    if not tied:
        head.weight.copy_(METHODS[method](parts["head"], made, donor))
    if bias is not None:
        head.bias.copy_(METHODS["mean"](bias[:, None], made, None)[:, 0])


def _check_vocabulary_parameters(model: Any) -> None:
    """Raise ConfigError if a parameter other than the embeddings has a row for each token."""
    first, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = {id(weight) for weight in (first.weight, head.weight, head.bias)}
    size = first.weight.shape[0]
    for name, weight in model.named_parameters():
        if id(weight) not in own and size in weight.shape[:1]:
            raise ConfigError(
                f"student: its {name} depends on the vocabulary too, which transplant cannot replace"
            )


def _take_roles(model: Any, tokenizer: Any, source: str) -> None:
    """Set the ids of special tokens in the model's configuration and its generation configuration."""
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:  # not every model has the file
        generation = None
    for role in ROLES[:3]:
        index = getattr(tokenizer, f"{role}_id", None)
        setattr(model.config.get_text_config(), f"{role}_id", index)
        ended = getattr(generation, f"{role}_id", None)
        setattr(model.generation_config, f"{role}_id", index if ended is None else ended)


def _embeddings(name: str) -> Tensor:
    from transformers import AutoModelForCausalLM

    with loading(name):
        donor: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto", use_safetensors=True)
    weight: Tensor = donor.get_input_embeddings().weight.detach()
    return weight


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, cache: Cache, of_cache: Any) -> dict[str, float]:
    """Return a model's bits a byte by domain, on ``DOCUMENTS`` held-out documents of a cache.

    The text is that of the cache's tokens, which ``of_cache`` decodes and ``tokenizer`` splits. The first
    token of a document is not predicted, so its bits are missing for every model.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    result = {}
    for name in cache.domains:
        nats = size = 0.0
        for text in _held_out(cache, name, of_cache):
            tokens: Tensor = torch.tensor(tokenizer.encode(text, add_special_tokens=False)[:longest])
            if len(tokens) < 2:
                continue
            logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
            nats += nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
            size += len(tokenizer.decode(tokens.tolist()).encode())
        result[name] = nats / math.log(2) / max(size, 1)
    return result


def _held_out(cache: Cache, name: str, tokenizer: Any) -> Iterator[str]:
    """Yield the text of the first ``DOCUMENTS`` documents of a domain's validation split."""
    split, count = cache[name].validation, 0
    for index in range(len(split)):
        rows = split.read([index], targets=False, labels=False)
        for document in range(1, int(rows.segments.max(initial=0)) + 1):
            if count == DOCUMENTS:
                return
            count += 1
            tokens: list[int] = rows.tokens[rows.segments == document].tolist()
            yield tokenizer.decode(tokens, skip_special_tokens=True)
