"""How a run went, in a sentence for the report and in a table for the terminal."""

from pathlib import Path

from ddk_cache.errors import printable
from ddk_train.config import MANY_EPOCHS
from ddk_train.report.run_files import RunLog, read_run


def verdict(run: RunLog) -> str:
    """Return in one or two sentences how close the student has come to its teacher."""
    if len(run.intervals) < 2 and run.is_finished:
        return "No step was needed: every ratio was at or below stop_ratio at the start."
    if len(run.intervals) < 2:
        return "No measurement after the first step yet."
    before, after = run.intervals[0], run.kept
    mean = "" if len(run.domains) == 1 else f", mean of {len(run.domains)} domains"
    gap = run.mean_gap_closed
    so_far = "" if run.is_finished else " so far"
    if gap is None:
        text = (
            f"Student / teacher perplexity went from {before.mean_ratio:.2f} to {after.mean_ratio:.2f}"
            f"{so_far}{mean}"
        )
    elif gap < 0:
        text = f"The student is further from its teacher than before{mean}: try a lower learning_rate"
    else:
        text = f"The student closed {gap:.0%} of the gap to its teacher{so_far}{mean}"
    worst = max(run.domains, key=lambda name: after.ratio[name])
    if after.ratio[worst] <= 1:
        text += "; no domain is behind the teacher."
    else:
        text += f"; {worst} is furthest behind, at {after.ratio[worst]:.2f} times the teacher's perplexity."
    often = [f"{name} ({count:.0f})" for name, count in run.epochs.items() if count > MANY_EPOCHS]
    return text + (f" Read more than {MANY_EPOCHS} times: {', '.join(often)}." if often else "")


def outcome(folder: Path) -> str:
    """Return a table of perplexities by domain, the verdict, and the next commands."""
    run = read_run(folder)
    table = [["domain", "before", "after", "teacher", "ratio", "gap closed", "bits per byte"]]
    before, after = run.intervals[0], run.kept
    for name in run.domains:
        gap = run.gap_closed(name)
        perplexities = (before.student_ppl[name], after.student_ppl[name], after.teacher_ppl[name])
        ratios = f"{before.ratio[name]:.2f} -> {after.ratio[name]:.2f}"
        closed = "-" if gap is None else f"{gap:.0%}"
        bits = run.bits_per_byte(name)
        per_byte = "-" if bits is None else f"{bits[0]:.3f} -> {bits[1]:.3f}"
        table.append([name, *map("{:,.2f}".format, perplexities), ratios, closed, per_byte])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table
    ]
    adapters = run.config.lora is not None and not run.config.lora.merge
    lines = ["perplexity on held-out text:", *lines, verdict(run), f"next: ddk-cache report {folder}"]
    if not adapters:
        lines.append(f"next: vllm serve {folder}")
    return "\n".join(map(printable, lines))
