"""Decoded rows, in the terminal or as a page: documents, loss, special tokens, the teacher's alternatives."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import entry_points

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddk_cache.cache.reader import open_cache
from ddk_cache.cache.rows import Rows
from ddk_cache.errors import ConfigError, counted, printable
from ddk_cache.format.token_text import is_special, token_texts
from ddk_cache.format.vocabulary import Vocabulary

ALTERNATIVES = 5  # of a token
SURPRISES = 5  # of a row: the labels that the teacher finds least likely
CONTEXT = 32  # characters in front of a surprise
WHITE = "\n\t"  # not escaped in a text


@dataclass(frozen=True)
class Shown:
    """A row with its name and its vocabulary."""

    title: str
    rows: Rows  # n = 1
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Token:
    """A token of a document."""

    text: str
    is_special: bool
    has_loss: bool
    probability: float | None  # at the teacher; None without loss, or before a build
    alternatives: Sequence[tuple[str, float]]  # the teacher's best tokens, and their probabilities


def read_rows(source: str, domain: str | None, row: int) -> Iterator[Shown]:
    """Yield a row of each domain, or of ``domain``, from a cache or a build's configuration (YAML).

    Raises ConfigError if the domain or the row does not exist, or stage one is not installed.
    """
    if source.endswith((".yaml", ".yml")):
        points = entry_points(group="ddk_cache.previews")
        if not points:
            raise ConfigError(f"{source}: the stages' entry points are not installed: pip install -e . again")
        for point in points:
            for name, rows, vocabulary in point.load()(source, domain, row):
                yield Shown(f"{name}, row {row} as it will be tokenised", rows, vocabulary)
        return
    cache = open_cache(source, allow_incomplete=True)
    if domain is not None and domain not in cache:
        raise ConfigError(f"--domain {domain}: the cache has {', '.join(cache.domains)}")
    for name in cache.domains if domain is None else [domain]:
        split = cache[name].train
        if row >= len(split):
            raise ConfigError(f"--row {row}: {name} has {counted(len(split), 'finished row')}, from 0")
        yield Shown(f"{name}, train row {row}", split.read([row]), cache.vocabulary)


def documents(shown: Shown) -> list[list[Token]]:
    """Return the tokens of each document of the row."""
    rows, vocabulary = shown.rows, shown.vocabulary
    tokens, segments, mask = rows.tokens[0], rows.segments[0], rows.loss_mask[0]
    result = []
    for segment in range(1, int(segments.max(initial=0)) + 1):
        positions = np.flatnonzero(segments == segment)
        texts = token_texts(tokens[positions].tolist(), vocabulary)
        has_loss = np.concatenate([[False], mask[positions[:-1]]])
        result.append(
            [
                Token(
                    text,
                    is_special(int(tokens[position]), vocabulary),
                    labelled,
                    *(_teacher(shown, position - 1) if labelled else (None, ())),
                )
                for text, position, labelled in zip(texts, positions.tolist(), has_loss.tolist(), strict=True)
            ]
        )
    return result


def _teacher(shown: Shown, position: int) -> tuple[float | None, Sequence[tuple[str, float]]]:
    """Return the label's probability at a position that carries loss, and the best tokens with theirs."""
    rows = shown.rows
    probability = None if rows.label_logprob is None else float(np.exp(rows.label_logprob[0, position]))
    if rows.targets is None:
        return probability, ()
    entry = np.count_nonzero(rows.loss_mask[0, :position])
    ids, logprobs = (values[entry, :ALTERNATIVES] for values in (rows.targets.ids, rows.targets.logprobs))
    best = zip(ids[ids >= 0].tolist(), np.exp(logprobs).tolist(), strict=False)
    return probability, [
        (token_texts([index], shown.vocabulary)[0] or "\ufffd", mass) for index, mass in best
    ]


def print_row(shown: Shown, console: Console) -> None:
    """Print a row: what carries no loss is dim, or outside ⟦ ⟧ where there is no colour."""
    console.rule(shown.title, align="left")
    for index, document in enumerate(documents(shown), start=1):
        console.print(Text(_summary(index, document), "bold"))
        console.print(_text(document, marks=not console.is_terminal), soft_wrap=True)
        surprises = _surprises(document)
        if surprises:
            console.print(_table(document, surprises))


def _summary(index: int, document: Sequence[Token]) -> str:
    labels = [token for token in document if token.has_loss]
    line = f"document {index}: {counted(len(document), 'token')}, {len(labels):,} with loss"
    known = [token.probability for token in labels if token.probability is not None]
    if known:
        line += f", perplexity at the teacher {np.exp(-np.log(np.maximum(known, 1e-30)).mean()):.2f}"
    return line


def _text(document: Sequence[Token], *, marks: bool) -> Text:
    text, inside = Text(), False
    for token in document:
        if marks and token.has_loss != inside:
            text.append("⟦" if token.has_loss else "⟧")
            inside = token.has_loss
        text.append(printable(token.text, keep=WHITE), _style(token))
    return text.append("⟧") if inside else text


def _style(token: Token) -> str:
    colour = "magenta" if token.is_special else ""
    if not token.has_loss:
        return f"dim {colour}".strip()
    if colour or token.probability is None:
        return colour or "green"
    return "green" if token.probability >= 0.5 else "yellow" if token.probability >= 0.05 else "red"


def _surprises(document: Sequence[Token]) -> list[int]:
    """Return the tokens that the teacher finds least likely, in their order."""
    answered = [index for index, token in enumerate(document) if token.probability is not None]
    least = sorted(answered, key=lambda index: document[index].probability or 0.0)[:SURPRISES]
    return sorted(index for index in least if document[index].alternatives)


def _table(document: Sequence[Token], indices: Sequence[int]) -> Table:
    table = Table("token", "after", "text", "probability", "the teacher's best", box=None, pad_edge=False)
    for index in indices:
        token = document[index]
        before = "".join(other.text for other in document[max(0, index - CONTEXT) : index])[-CONTEXT:]
        best = ", ".join(f"{_quoted(text)} {mass:.2f}" for text, mass in token.alternatives)
        label, probability = _quoted(token.text), f"{token.probability:.4f}"
        table.add_row(*map(Text, (str(index), _quoted(before), label, probability, best)))
    return table


def _quoted(text: str) -> str:
    return printable(text).join("''")


def as_page(shown: Sequence[Shown]) -> str:
    """Return rows as one self-contained HTML page; a token's tooltip has its alternatives."""
    parts = []
    for row in shown:
        parts.append(f"<h1>{escape(row.title)}</h1>")
        for index, document in enumerate(documents(row), start=1):
            spans = "".join(map(_span, document))
            parts.append(f"<h2>{escape(_summary(index, document))}</h2><pre>{spans}</pre>")
    return PAGE.format("\n".join(parts))


def _span(token: Token) -> str:
    names = ["special"] * token.is_special + ["loss"] * token.has_loss
    title, style = "", ""
    if token.probability is not None:
        lines = [
            f"{token.probability:.4f}",
            *(f"{mass:.4f} {_quoted(text)}" for text, mass in token.alternatives),
        ]
        title = f' title="{escape(chr(10).join(lines))}"'
        style = f' style="--p:{token.probability:.3f}"'
    return f'<span class="{" ".join(names)}"{title}{style}>{escape(printable(token.text, keep=WHITE))}</span>'


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>ddk-cache show</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; color: GrayText }}
.loss {{ color: CanvasText; background: hsl(calc(120 * var(--p, 1)) 80% 50% / 25%) }}
.special {{ font-weight: bold; color: #a0a }}
</style>
<p>Coloured tokens carry loss: green where the teacher expects them, red where it does not. The others are
context. Point at a token for its probability and the teacher's best tokens.</p>
{}
</html>
"""
