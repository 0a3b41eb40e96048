"""README.md of a trained student, in the form that model hubs show."""

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ddk_cache.errors import without_markup
from ddk_train.config import TrainConfig
from ddk_train.output.facts import FACTS, Facts

LOAD = {
    False: """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")""",
    True: """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{folder}")  # the base model and these adapters
tokenizer = AutoTokenizer.from_pretrained("{folder}")""",
}


class _Measurement(BaseModel):
    step: int
    student_ppl: dict[str, float] = {}
    teacher_ppl: dict[str, float] = {}


def student_card(folder: Path, config: TrainConfig, step: int) -> str:
    """Return the card of the student of ``step``, made from the files of its run."""
    facts = Facts.model_validate_json((folder / FACTS).read_bytes())
    measured = {line.step: line for line in _measurements(folder)}
    before, after = (measured.get(at, _Measurement(step=at)) for at in (0, step))  # if its line is damaged
    adapters = config.lora is not None and not config.lora.merge
    is_local = Path(config.student).exists()
    head: dict[str, Any] = {} if is_local else {"base_model": config.student}
    head |= {
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "ddk-cache"],
    }
    base = Path(config.student).name if is_local else config.student
    teachers = ", ".join(f"`{without_markup(teacher)}`" for teacher in facts.teachers)
    kind = "Adapters for" if adapters else "Trained from"
    stored = " in nf4" if config.lora is not None and config.lora.quantize else ""
    rows = [
        f"| {without_markup(name)} | {tokens:,} | {before.student_ppl.get(name, math.nan):.2f} "
        f"| {after.student_ppl.get(name, math.nan):.2f} | {after.teacher_ppl.get(name, math.nan):.2f} |"
        for name, tokens in facts.train_tokens.items()
    ]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).strip(),
            "---",
            f"# {without_markup(config.run_name or folder.resolve().name)}",
            "",
            f"{kind} `{without_markup(base)}`{stored}, distilled from {teachers} "
            f"({without_markup(facts.target)}) in {step:,} steps "
            f"by ddk-cache {facts.versions['ddk-cache']}.",
            "",
            "Perplexity a token on held-out text:",
            "",
            "| domain | tokens in the cache | before | after | teacher |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "```python",
            LOAD[adapters].format(folder=folder.name),
            "```",
            "",
        ]
    )


def _measurements(folder: Path) -> Iterator[_Measurement]:
    """Yield the lines of discrepancy.jsonl that are not damaged."""
    for line in (folder / "discrepancy.jsonl").read_bytes().splitlines():
        with suppress(ValidationError):
            yield _Measurement.model_validate_json(line)
