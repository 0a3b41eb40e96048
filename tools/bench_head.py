"""How far a teacher in bfloat16 is from the exact one, with its head in bfloat16 and in float32.

The exact one has the same weights in float64. Next to it stands what the codec changes in a float32 teacher's
top 64. What either does to the student's gradient is an angle (kl_gradients.py says which ones): to that of
the exact teacher's full distribution, and to that of the top 64 before the codec.
"""

import json
from pathlib import Path

import click
import torch
from bench_codec import fidelity
from bench_targets import stored
from kl_gradients import Entries, Figures, Text, angles, full, read, show, sparse, teacher_states
from real_logits import TOP_64, answers, load
from torch.nn.functional import kl_div, linear

from ddk_build.scoring import Arrays

# The head's types by the body's
HEADS = {torch.bfloat16: [torch.bfloat16, torch.float32], torch.float32: [torch.float32]}


def measure_teachers(text: Text) -> dict[str, Figures]:
    """Mean errors in nats, of the label's log-probability and of the best 64 ones, KL, and angles."""
    logits = linear(*teacher_states(text, torch.float64))
    exact, logprobs = full(text, logits), logits.log_softmax(-1)
    best = logprobs.topk(TOP_64.top_k).indices
    found: dict[str, Figures] = {}
    for body, heads in HEADS.items():
        hidden, weight = teacher_states(text, body)
        for head in heads:
            logits = linear(hidden.to(head), weight.to(head))
            rough = logits.double().log_softmax(-1)
            error = (rough - logprobs).abs()
            found[f"{body} body, {head} head".replace("torch.", "")] = {
                "label": float(error.gather(1, text.labels[:, None]).mean()),
                "entries": float(error.gather(1, best).mean()),
                "kl": float(kl_div(rough, logprobs, reduction="batchmean", log_target=True)),
                **angles(full(text, logits), exact),
            }
    return found


def measure_codec(captured: Arrays, text: Text) -> Figures:
    """The same of the codec; labels it keeps exactly."""
    found = answers(captured, "float32", TOP_64)[1]
    given = {name: found[name].reshape(-1, *found[name].shape[2:])[text.places] for name in Entries._fields}
    before = Entries(**{name: torch.from_numpy(part) for name, part in given.items()})
    after, _ = stored(captured, TOP_64, text.places)
    lost = fidelity(given, *(part.numpy() for part in after))
    cross_entropy = sparse(text, None)
    kl_before, kl_after = (sparse(text, entries).minus(cross_entropy) for entries in (before, after))
    return {"label": 0.0, "entries": lost["mean_error"], "kl": lost["kl"], **angles(kl_after, kl_before)}


@click.command(help=__doc__)
@click.option("--tokens", default=768, show_default=True, help="Positions that are compared.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("bench_results/bench_head.json"),
    show_default=True,
)
def main(tokens: int, output: Path) -> None:
    captured = load()
    text = read(captured, tokens)
    found = measure_teachers(text) | {"codec, top 64": measure_codec(captured, text)}
    columns = dict.fromkeys(("label", "entries", "kl"), ".1e") | dict.fromkeys(
        ("head", "token", "batch"), ".2f"
    )
    show("Distance from the exact teacher: mean |Δ| and KL in nats, angles in degrees", found, columns)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"tokens": tokens, "teachers": found}, indent=2, default=float) + "\n")


if __name__ == "__main__":
    main()
