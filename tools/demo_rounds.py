"""On-policy distillation on real input, on this machine alone: two rounds against as much given text.

The teacher is SmolLM2-135M-Instruct, the student the teacher without four of its layers. The student
continues documentation and Python code in its own words, the teacher scores that, the student trains; twice.
The control trains a second student for as many steps on the same documents' own text, by KL to the teacher.
Both are measured by reverse KL on what each student writes for held-out prompts. Everything is written to
runs/demo-rounds.

    make demo-rounds   # or: python -m tools.demo_rounds
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ddk_cache import open_cache
from tools.demo import BF16, ENVIRONMENT, run, step
from tools.frame import write_yaml
from tools.prune_student import parse_layers, prune
from tools.real_data import teacher_folder, write_domains

FOLDER = Path("runs/demo-rounds")
DOMAINS = ("docs", "python")
PROMPT, WRITTEN = 240, 64  # characters of a prompt, tokens of a completion
PROMPTS, HELD_OUT = 48, 24  # of each domain
TOKENS = 150_000  # of a domain, to choose documents from
ROUNDS, STEPS = 2, 12  # steps in a round
ENGINE: dict[str, Any] = {
    "dtype": "bfloat16" if BF16 else "float32",
    "engine_args": {"enforce_eager": True, "use_tqdm_on_load": False, "max_model_len": 512},
}
TRAIN: dict[str, Any] = {
    "strategy": "uniform",
    "distill_interval": STEPS,
    "max_steps": STEPS,
    "max_epochs": 20,
    "per_device_train_batch_size": 2,
    "learning_rate": 1.0e-4,
    "min_learning_rate": 2.0e-5,
    "warmup_steps": 2,
    "bf16": BF16,
    "logging_steps": 4,
    "save_steps": STEPS,
    "sample_tokens": 0,
    "report_to": "none",
}


def texts_by_domain() -> dict[str, list[str]]:
    """Return documents long enough to be continued, the held-out ones first."""
    files = write_domains(FOLDER / "text", TOKENS)
    domains = {}
    for name in DOMAINS:
        texts = [json.loads(line)["text"] for line in files[name].read_text(encoding="utf-8").splitlines()]
        domains[name] = [text for text in texts if len(text) > 4 * PROMPT][: HELD_OUT + PROMPTS]
    return domains


def sources(kind: str, texts: dict[str, list[str]], column: str) -> dict[str, dict[str, Any]]:
    """Write texts as JSON lines, and return the domains of a configuration that reads them."""
    domains = {}
    for name, documents in texts.items():
        path = FOLDER / f"{kind}-{name}.jsonl"
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in documents), encoding="utf-8")
        domains[name] = {"path": str(path), f"{column}_column": column}
        if column == "prompt":  # to be continued, not answered
            domains[name]["prompt_format"] = "plain"
    return domains


def reverse_kl(
    student: Path, teacher: Path, prompts: dict[str, dict[str, Any]]
) -> dict[str, tuple[float, float]]:
    """Return mean and standard error of log q - log p by domain, on what the student writes."""
    name = f"measured-{student.parent.name}-{student.name}"
    text, cache = FOLDER / name / "text", FOLDER / name / "cache"
    keys = ENGINE | {"model": str(student), "output": str(text), "sampling": {"max_tokens": WRITTEN}}
    run("generate", write_yaml(FOLDER / f"{name}-generate.yaml", keys | {"domains": prompts}))
    domains = {domain: {"path": str(text / domain)} for domain in prompts}
    build = build_keys(teacher, "label") | {"cache": str(cache), "domains": domains}
    run("build", write_yaml(FOLDER / f"{name}-build.yaml", build))
    result = {}
    for domain, splits in open_cache(cache).items():
        by_row = []
        for split in (splits.train, splits.validation):
            for index in range(len(split)):
                rows = split.read([index])
                assert rows.writer_logprob is not None
                assert rows.label_logprob is not None
                gap = (rows.writer_logprob - rows.label_logprob)[rows.loss_mask]
                by_row.append((gap.sum(dtype=np.float64), gap.size))
        total, labels = np.array(by_row).T
        mean = total.sum() / labels.sum()
        error = np.sqrt(((total - mean * labels) ** 2).sum()) / labels.sum()
        result[domain] = float(mean), float(error)
    return result


def build_keys(teacher: Path, kind: str) -> dict[str, Any]:
    """Return the keys of a build without cache and domains."""
    model = ENGINE | {"model": str(teacher)}
    return {"teacher": model, "seq_length": 256, "target": {"kind": kind}, "validation_rows": 2}


@click.command()
def main() -> None:
    """Compare two rounds on the student's own text with as many steps on given text."""
    os.environ.update(ENVIRONMENT)
    began = time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)

    step(1, "Teacher: SmolLM2-135M-Instruct. Student: the teacher without its layers 12 to 15")
    teacher, student = teacher_folder(), FOLDER / "student"
    prune(teacher, student, parse_layers("12-15"))

    step(2, "Prompts: beginnings of documentation and Python files; some are held out")
    texts = texts_by_domain()
    held_out = {name: [text[:PROMPT] for text in documents[:HELD_OUT]] for name, documents in texts.items()}
    given = {name: documents[HELD_OUT:] for name, documents in texts.items()}
    to_measure = sources("held-out", held_out, "prompt")
    to_continue = sources(
        "prompts",
        {name: [text[:PROMPT] for text in documents] for name, documents in given.items()},
        "prompt",
    )
    click.echo(", ".join(f"{name}: {len(texts[name])} documents" for name in texts))

    step(3, f"{ROUNDS} rounds: the student writes, the teacher scores, the student trains")
    rounds = {
        "student": str(student),
        "output": str(FOLDER / "rounds"),
        "rounds": ROUNDS,
        "generate": ENGINE | {"sampling": {"max_tokens": WRITTEN}, "domains": to_continue},
        "build": build_keys(teacher, "label"),
        "train": TRAIN,
    }
    run("rounds", write_yaml(FOLDER / "rounds.yaml", rounds))

    step(4, "The control: as many steps on the documents' own text, by KL to the teacher's top 64")
    as_long = {name: [text[: PROMPT + 4 * WRITTEN] for text in given[name]] for name in given}
    cache = {"cache": str(FOLDER / "given")}
    build = build_keys(teacher, "topk") | cache | {"domains": sources("given", as_long, "text")}
    run("build", write_yaml(FOLDER / "given.yaml", build))
    control = cache | {"student": str(student), "output_dir": str(FOLDER / "off-policy")}
    steps = {"max_steps": ROUNDS * STEPS, "gamma": 1.0, "cross_entropy_weight": 0.0}
    run("train", write_yaml(FOLDER / "control.yaml", TRAIN | control | steps))

    step(5, "Reverse KL, nats a token, on what each student writes for the held-out prompts")
    students = {
        "before": student,
        "given text": FOLDER / "off-policy",
        f"{ROUNDS} rounds": FOLDER / "rounds" / f"round-{ROUNDS}" / "student",
    }
    figures = {name: reverse_kl(folder, teacher, to_measure) for name, folder in students.items()}
    click.echo(f"{'':<12}" + "".join(f"{name:>18}" for name in DOMAINS))
    for name, by_domain in figures.items():
        cells = (f"{mean:.3f} ± {error:.3f}" for mean, error in by_domain.values())
        click.echo(f"{name:<12}" + "".join(f"{cell:>18}" for cell in cells))
    click.echo(f"{time.monotonic() - began:.0f} seconds in all")


if __name__ == "__main__":
    main()
