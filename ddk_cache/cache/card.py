"""The README.md beside a cache's manifest, in the form that dataset hubs show."""

from typing import Any

from ddk_cache.cache.info import info
from ddk_cache.errors import without_markup
from ddk_cache.format import layout
from ddk_cache.storage.lock import LockedStorage

KEY = "README.md"
OURS = "<!-- Written by ddk-cache build. Delete this line to keep your own changes. -->"


def write_card(storage: LockedStorage) -> None:
    """Write the card of a locked cache, unless a user has made the file their own."""
    existing = storage.read(KEY)
    if existing is None or OURS.encode() in existing:
        storage.write(KEY, card(info(storage.url)).encode())


def card(cache: dict[str, Any]) -> str:
    """Return the card's text for a result of :func:`ddk_cache.cache.info.info`."""
    teacher, target = cache["teacher"], layout.Target(**cache["target"])
    model, revision = (without_markup(str(teacher[key])) for key in ("model", "revision"))
    facts = [
        f"- teacher: `{model}`, revision `{revision}`, "
        f"{teacher['dtype']}, {teacher['engine']} {teacher['engine_version']}",
        f"- target: {target.summary}, temperature {target.temperature:g}",
        f"- rows of {cache['seq_length']:,} tokens; vocabulary {cache['vocab_size']:,}",
        f"- hash of the tokenizer's content: `{cache['tokenizer_hash']}`",
        f"- format: ddk-cache {cache['format_version']}, zarr v3",
    ]
    rows = [_row(name, domain) for name, domain in cache["domains"].items()]
    return "\n".join([HEAD, *facts, "", *TABLE_HEAD, *rows, "", TAIL])


def _row(name: str, domain: dict[str, Any]) -> str:
    source = " ".join(str(domain["source"][key]) for key in ("path", "name") if domain["source"].get(key))
    counts = (f"{domain[split]['tokens']:,}" for split in layout.SPLITS)
    size = f"{domain['bytes'] / 2**20:,.1f}"
    perplexity = domain["teacher_perplexity"]
    cells = [name, without_markup(source), *counts, size, "" if perplexity is None else f"{perplexity:.2f}"]
    return f"| {' | '.join(cells)} |"


TABLE_HEAD = (
    "| domain | text | train tokens | validation tokens | MiB | teacher perplexity |",
    "|---|---|---|---|---|---|",
)
HEAD = f"""---
license: other  # depends on the texts' licences and the teacher's terms: fill it in before you share this
task_categories: [text-generation]
tags: [knowledge-distillation, logits, zarr, ddk-cache]
---
{OURS}
# A distillation cache

The teacher's predictions for every token of a corpus, stored by ddk-cache. Any number of students can be
trained from it without the teacher.
"""
TAIL = """```python
import ddk_cache  # pip install ddk-cache

cache = ddk_cache.open_cache(".")  # this folder, or a URL: s3:// gs:// az:// hf://
rows = cache[cache.domains[0]].train.read([0, 1])  # tokens, segments, loss_mask, ids, logprobs, ...
```

Position t holds the distribution of token t + 1. `ddk-cache info .` shows more, `ddk-cache verify .` reads
every byte, `ddk-cache train` trains a student, `ddk-cache export` writes rows for other trainers.
"""
