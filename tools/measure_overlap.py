"""What a piece of a long document loses without the text in front of it, by distance from the cut.

    python tools/measure_overlap.py --documents 5       # a domain; 3 minutes a document on a core

docs/context.md has the table and what follows from it.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import real_data
import torch
from numpy.typing import NDArray

LENGTH, CUTS, NEW = 3_072, (1_024, 2_048), 512  # tokens: of a document; where it is cut; read behind a cut
OVERLAPS = (0, 16, 64, 128, 256, 512)
EDGES = (0, 1, 4, 16, 64, 128, 256, NEW - 1)  # of the distances shown


def label_logprobs(model: Any, ids: list[int]) -> NDArray[np.float32]:
    """Log-probability of each token but the first, in nats, [len(ids) - 1]."""
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        logprobs = model(tokens).logits[0, :-1].float().log_softmax(-1)
    found: NDArray[np.float32] = logprobs.gather(1, tokens[0, 1:, None])[:, 0].numpy()
    return found


@click.command()
@click.option("--documents", default=5, show_default=True, help="Of each of three domains.")
@click.option("--root", type=click.Path(path_type=Path), default=real_data.ROOT, show_default=True)
def main(documents: int, root: Path) -> None:
    """Print the table: nats lost by distance from the cut, a line for each overlap."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real_data.teacher_folder(root)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    real_data.SMALLEST, real_data.LARGEST = 3 * LENGTH, 200_000
    lost: dict[int, list[NDArray[np.float32]]] = {overlap: [] for overlap in OVERLAPS}
    for domain in ("python", "cpp", "docs"):
        taken = 0
        for text in real_data.texts(domain):
            ids = tokenizer(text, verbose=False)["input_ids"][:LENGTH]
            if taken == documents or len(ids) < LENGTH:
                continue
            taken += 1
            whole = label_logprobs(model, ids)
            for cut in CUTS:
                for overlap in OVERLAPS:
                    piece = label_logprobs(model, ids[cut - overlap : cut + NEW])
                    lost[overlap].append(whole[cut : cut + NEW - 1] - piece[overlap:])
    for overlap, rows in lost.items():
        mean = np.mean(rows, axis=0)
        parts = [f"{mean[first:last].mean():6.2f}" for first, last in pairwise(EDGES)]
        click.echo(f"{overlap:4}: {' '.join(parts)}  mean {mean.mean():.3f}  nats a cut {mean.sum():.0f}")


if __name__ == "__main__":
    main()
