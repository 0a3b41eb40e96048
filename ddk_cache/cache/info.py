"""Describe what a cache holds."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from ddk_cache.cache.metadata import Listing, existing_manifest, list_shards, read_state, split_arrays
from ddk_cache.cache.reader import open_cache
from ddk_cache.cache.rows import document_logprobs
from ddk_cache.cache.split import ROWS_AT_ONCE
from ddk_cache.errors import printable
from ddk_cache.format import layout
from ddk_cache.storage.storage import Storage

MOST_LISTED = 1000  # missing shards of a split, the first ones


def info(url: str) -> dict[str, Any]:
    """Return a description of a cache as JSON values; sizes are bytes as stored."""
    storage = Storage(url)
    manifest = existing_manifest(storage)
    stored: dict[str, int] = defaultdict(int)
    listed = storage.sizes("")
    for key, size in listed.items():
        parts = key.removesuffix("/zarr.json").partition("/c/")[0].split("/")
        for depth in range(1, len(parts) + 1):
            stored["/".join(parts[:depth])] += size
        stored[""] += size
    shards = list_shards(listed)
    states = list(storage.map(lambda domain: read_state(storage, manifest, domain.name), manifest.domains))
    return {
        "url": url,
        "format": manifest.format,
        "format_version": manifest.version,
        "complete": all(state is not None and state.complete for state in states),
        "teacher": manifest.teachers[0].model_dump(),
        "teachers": [teacher.model_dump() for teacher in manifest.teachers],
        "tokenizer_hash": manifest.tokenizer_hash,
        "vocab_size": manifest.vocab_size,
        "target": manifest.target.model_dump(),
        "seq_length": manifest.seq_length,
        "shard_rows": manifest.shard_rows,
        "seed": manifest.seed,
        "overlap": manifest.overlap,
        "validation_targets": manifest.validation_targets,
        "bytes": stored[""],
        "codebook_bytes": sum(
            size for name, size in stored.items() if name.startswith(layout.CODEBOOK) and "/" not in name
        ),
        "domains": {
            domain.name: _domain_info(manifest, domain, state, stored, shards)
            for domain, state in zip(manifest.domains, states, strict=True)
        },
    }


def _domain_info(
    manifest: layout.Manifest,
    source: layout.DomainSource,
    state: layout.DomainState | None,
    stored: Mapping[str, int],
    shards: Listing,
) -> dict[str, Any]:
    base = {
        "teacher": source.teacher_index,
        "source": source.source,
        "max_tokens": source.max_tokens,
        "tokenised": state is not None,
        "complete": state is not None and state.complete,
    }
    if state is None:
        return base
    loss = state.teacher_cross_entropy
    content: dict[str, Any] = base | {
        "documents": state.documents,
        "skipped": state.skipped,
        "left_over": state.left_over,
        "teacher_cross_entropy": loss,
        "teacher_perplexity": None if loss is None else math.exp(loss),
        "bytes": stored[source.name],
    }
    for split in layout.SPLITS:
        counts = state.split(split)
        total = layout.shards(counts.rows, manifest.shard_rows)
        done = {shard for shard in shards[f"{source.name}/{split}/{layout.COMMITS}"] if shard < total}
        missing = islice((shard for shard in range(total) if shard not in done), MOST_LISTED)
        size = stored[f"{source.name}/{split}"]
        content[split] = counts.model_dump() | {
            "bytes": size,
            "bytes_per_token": size / counts.tokens if counts.tokens else None,
            "bytes_by_array": {
                name: stored[f"{source.name}/{split}/{name}"]
                for name in split_arrays(manifest, source.name, split)
            },
            "shards": total,
            "shards_done": len(done),
            "shards_missing": list(missing),
        }
    return content


def documents(url: str) -> Iterator[dict[str, Any]]:
    """Yield the teacher's perplexity of each document, or chunk of one, in the finished part of a cache.

    Each is a dict of ``domain``, ``split``, ``row``, ``segment`` (in its row), ``labels`` and ``perplexity``.
    """
    cache = open_cache(url, allow_incomplete=True)
    for name in cache.domains:
        for split in layout.SPLITS:
            reader = cache[name].split(split)
            for start in range(0, len(reader), ROWS_AT_ONCE):
                rows = reader.read(range(start, min(start + ROWS_AT_ONCE, len(reader))), targets=False)
                for row, segment, labels, total in zip(*document_logprobs(rows), strict=True):
                    yield {
                        "domain": name,
                        "split": split,
                        "row": start + int(row),
                        "segment": int(segment),
                        "labels": int(labels),
                        "perplexity": math.exp(-total / labels),
                    }


_WIDTHS = (-20, -10, 10, 14, 16, 8, 11, 11)  # of the columns; negative: left-aligned


def _line(cells: Sequence[str]) -> str:
    columns = zip(cells, _WIDTHS, strict=False)
    padded = (f"{cell:{'<' if width < 0 else '>'}{abs(width)}}" for cell, width in columns)
    return " ".join(padded).rstrip()


def _teacher_lines(content: dict[str, Any]) -> list[str]:
    """Return a line for each teacher, with its domains where there are several teachers."""
    lines = []
    for index, teacher in enumerate(content["teachers"]):
        engine = f"{teacher['engine']} {teacher['engine_version']}"
        line = f"teacher {teacher['model']} ({teacher['dtype']}, {engine})"
        if len(content["teachers"]) > 1:
            domains = [name for name, domain in content["domains"].items() if domain["teacher"] == index]
            line += f" of {', '.join(domains)}"
        lines.append(line)
    return lines


def as_text(content: dict[str, Any]) -> str:
    """Return the result of ``info`` as a table."""
    target = layout.Target(**content["target"])
    rows = f"rows of {content['seq_length']:,} tokens"
    if content["overlap"]:
        rows += f", {content['overlap']:,} of them context where a document was cut"
    lines = [
        f"{content['url']}: {'complete' if content['complete'] else 'NOT COMPLETE'}, "
        f"{content['bytes']:,} bytes, format version {content['format_version']}",
        *_teacher_lines(content),
        f"target {target.summary}, temperature {target.temperature:g}; {rows}; "
        f"vocabulary {content['vocab_size']:,}",
        "",
        _line(["domain", "split", "rows", "tokens", "bytes", "B/token", "shards", "teacher ppl"]),
    ]
    for name, domain in content["domains"].items():
        if not domain["tokenised"]:
            lines.append(_line([name, "not tokenised yet"]))
            continue
        for split in layout.SPLITS:
            part = domain[split]
            cells = [
                name if split == "train" else "",
                split,
                f"{part['rows']:,}",
                f"{part['tokens']:,}",
                f"{part['bytes']:,}",
                f"{part['bytes_per_token'] or 0:.1f}",
                f"{part['shards_done']}/{part['shards']}",
            ]
            if split == "validation" and domain["teacher_perplexity"]:
                cells.append(f"{domain['teacher_perplexity']:.2f}")
            lines.append(_line(cells))
        if isinstance(writer := domain["source"].get("writer"), dict):
            lines.append(f"  written by {writer.get('model')} ({writer.get('weights')})")
        if domain["skipped"]:
            skipped = ", ".join(f"{count:,} {reason}" for reason, count in domain["skipped"].items())
            lines.append(f"  {domain['documents']:,} documents taken; left out: {skipped}")
        if domain["left_over"]:
            lines.append(f"  {domain['left_over']:,} tokens held out of train had no room in validation")
    return "\n".join(map(printable, lines))
