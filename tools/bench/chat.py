"""Whether rendering a conversation takes time linear in its length: CPU seconds at n, 2n and 4n.

Beside it stands what the tokenizer takes for the same text. Length grows by turns, and by the length of each.

    python -m tools.bench.chat
"""

import json
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from ddk_build import chat
from ddk_build.config import TeacherConfig
from ddk_build.tokenizer import load_tokenizer
from tools.real_data import teacher_folder, texts

BAR = 5.0  # times the seconds at n, at 4n: 4, and a quarter for what grows with the logarithm and for noise
SHAPES = {  # turns, characters a turn at n
    "many turns": (100, 300),
    "long turns": (200, 1_500),
    "one exchange": (2, 30_000),
}
ROUNDS = 5


def conversation(text: str, turns: int, length: int) -> list[chat.Message]:
    """Turn after turn of real text, each from another place in it."""
    return [
        {"role": ("user", "assistant")[turn % 2], "content": (text[turn * 97 :] + text)[:length]}
        for turn in range(turns)
    ]


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench_results/bench_chat.json"))
def main(output: Path) -> None:
    """Measure rendering."""
    tokenizer = load_tokenizer(TeacherConfig(model=str(teacher_folder())))
    endings = tuple(tokenizer.get_added_vocab())
    text = "\n".join(texts("docs"))[:200_000]
    table = Table("", "turns", "characters", "rendering, ms", "tokenizer, ms", f"4n / n (bar {BAR:.0f})")
    found = []
    for shape, (turns, length) in SHAPES.items():
        first = 0.0
        for times in (1, 2, 4):
            grown = (turns * times, length) if shape == "many turns" else (turns, length * times)
            messages = conversation(text, *grown)
            seconds = []
            for _ in range(ROUNDS):
                began = time.process_time()
                whole = chat.render(tokenizer, messages, None, endings).text
                seconds.append(time.process_time() - began)
            began = time.process_time()
            tokenizer(whole, verbose=False)
            one = {
                "shape": shape,
                "turns": grown[0],
                "characters": len(whole),
                "rendering_seconds": min(seconds),
                "tokenizer_seconds": time.process_time() - began,
            }
            first = first or min(seconds)
            found.append(one)
            figures = (f"{1e3 * one[key]:.1f}" for key in ("rendering_seconds", "tokenizer_seconds"))
            ratio = f"{min(seconds) / first:.1f}" if times == 4 else ""
            table.add_row(shape, str(grown[0]), f"{len(whole):,}", *figures, ratio)
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"bar": BAR, "found": found}, indent=2))


if __name__ == "__main__":
    main()
