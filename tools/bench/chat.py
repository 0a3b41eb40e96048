"""Whether rendering a conversation takes time linear in its length: CPU seconds at n, 2n and 4n.

Beside it: the tokenizer's time for the same text. Length grows by the number of turns, or by their length.

    python -m tools.bench.chat
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from ddk_build.config import TeacherConfig
from ddk_build.data import chat
from ddk_build.teacher.tokenizer import load_tokenizer
from tools.frame import output_option, show, write_json
from tools.real_data import teacher_folder, texts

BAR = 5.0  # time at 4n over time at n: 4, and a quarter for a logarithmic part and noise
SHAPES = {  # turns, characters a turn at n
    "many turns": (100, 300),
    "long turns": (200, 1_500),
    "two turns": (2, 30_000),
}
ROUNDS = 5


def conversation(text: str, turns: int, length: int) -> list[chat.Message]:
    """Return turns of real text, each cut from a different offset."""
    return [
        {"role": ("user", "assistant")[turn % 2], "content": (text[turn * 97 :] + text)[:length]}
        for turn in range(turns)
    ]


def cpu_seconds(call: Callable[[], object], rounds: int = 1) -> float:
    """Return the CPU time of the fastest of ``rounds`` calls."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


@click.command()
@output_option("chat")
def main(output: Path) -> None:
    """Measure rendering."""
    tokenizer: Any = load_tokenizer(TeacherConfig(model=str(teacher_folder())))
    endings = tuple(tokenizer.get_added_vocab())
    text = "\n".join(texts("docs"))[:200_000]
    figures: list[dict[str, Any]] = []
    for shape, (turns, length) in SHAPES.items():
        shortest = 0.0
        for factor in (1, 2, 4):
            size = (turns * factor, length) if shape == "many turns" else (turns, length * factor)
            messages = conversation(text, *size)
            rendered = chat.render(tokenizer, messages, None, endings).text
            rendering = cpu_seconds(partial(chat.render, tokenizer, messages, None, endings), ROUNDS)
            tokenizing = cpu_seconds(partial(tokenizer, rendered, verbose=False))
            shortest = shortest or rendering
            figures.append(
                {
                    "shape": shape,
                    "turns": size[0],
                    "characters": len(rendered),
                    "rendering, ms": 1e3 * rendering,
                    "tokenizer, ms": 1e3 * tokenizing,
                    f"4n / n (bar {BAR:.0f})": rendering / shortest if factor == 4 else None,
                }
            )
    show("Rendering a conversation", [*figures[0]], [[*row.values()] for row in figures])
    write_json(output, {"bar": BAR, "figures": figures})


if __name__ == "__main__":
    main()
