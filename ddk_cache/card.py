"""The README.md beside a cache's manifest, as dataset hubs show it: a folder that explains itself."""

from typing import Any

from ddk_cache import layout
from ddk_cache.inspection import describe_target, info
from ddk_cache.lock import LockedStorage

KEY = "README.md"
OURS = "<!-- Written by ddk-cache build; without this line it stays as you leave it. -->"


def write_card(storage: LockedStorage) -> None:
    """Write the card of a cache, whose lock is held, unless somebody has made it their own.

    Raises
    ------
    CacheError
        The cache cannot be read or written.
    """
    there = storage.read(KEY)
    if there is None or OURS.encode() in there:
        storage.write(KEY, card(info(storage.url)).encode())


def card(found: dict[str, Any]) -> str:
    """The text, from :func:`ddk_cache.inspection.info`'s answer; the same cache has the same card."""
    teacher = found["teacher"]
    rows = [
        "| domain | text | train tokens | validation tokens | MiB | teacher perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for name, domain in found["domains"].items():
        source = " ".join(str(domain["source"][key]) for key in ("path", "name") if domain["source"].get(key))
        counts = (f"{domain[split]['tokens']:,}" for split in layout.SPLITS)
        cells = [name, _plain(source), *counts, f"{domain['bytes'] / 2**20:,.1f}"]
        rows.append("| " + " | ".join([*cells, f"{domain['teacher_perplexity']:.2f}"]) + " |")
    about = [
        f"- teacher: `{_plain(teacher['model'])}`, revision `{_plain(str(teacher['revision']))}`, "
        f"{teacher['dtype']}, {teacher['engine']} {teacher['engine_version']}",
        f"- target: {describe_target(found['target'])}, temperature {found['target']['temperature']:g}",
        f"- rows of {found['seq_length']:,} tokens; vocabulary {found['vocab_size']:,}",
        f"- tokenizer, by content: `{found['tokenizer_hash']}`",
        f"- format: ddk-cache {found['format_version']}, zarr v3",
    ]
    return "\n".join([*HEAD, *about, "", *rows, "", *TAIL])


def _plain(text: str) -> str:
    """A name from elsewhere, without what Markdown or HTML would take for its own."""
    return "".join(letter for letter in text if letter.isprintable() and letter not in "`|<>[]")


HEAD = [
    "---",
    "license: other  # the texts' licences and the teacher's terms decide: fill it in before you share this",
    "task_categories: [text-generation]",
    "tags: [knowledge-distillation, logits, zarr, ddk-cache]",
    "---",
    OURS,
    "# A teacher's answers, to distil from",
    "",
    "What a large language model says of every token of a corpus, kept by ddk-cache: any number of students",
    "can be trained from it without the teacher.",
    "",
]
TAIL = [
    "```python",
    "import ddk_cache  # pip install ddk-cache",
    "",
    'cache = ddk_cache.open_cache(".")  # this folder, or an s3:// gs:// az:// address',
    "rows = cache[cache.domains[0]].train.read([0, 1])  # tokens, segments, loss_mask, ids, logprobs, ...",
    "```",
    "",
    "Position t holds the distribution of the token at t + 1. `ddk-cache info .` says more,",
    "`ddk-cache verify .` reads every byte, `ddk-cache train` trains a student,",
    "`ddk-cache export` writes rows for other trainers.",
    "",
]
