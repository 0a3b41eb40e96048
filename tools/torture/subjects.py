"""The commands under torture, by name."""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from tools.torture.processes import Ranks, RayBuild, VllmBuild
from tools.torture.subject import Build, Subject, TokensFirst
from tools.torture.training import Exporting, Report, Training

Kind = TypeVar("Kind")
SMALLEST = {"target": {"kind": "label"}, "shard_tokens": 2048, "domains": {"prose": {"max_tokens": 96}}}
BUILDS: dict[str, Callable[[Path], Build]] = {
    "build": Build,
    "build-label": partial(Build, keys={"target": {"kind": "label"}}),
    "build-sampled": partial(Build, keys={"target": {"kind": "sampled", "samples": 4}}),
    "build-all-targets": partial(Build, keys={"validation_targets": True}),
    "build-smallest": partial(Build, keys=SMALLEST),
    "build-chat": partial(Build, keys={"domains": {"chat": {"messages_column": "messages"}}}),
    "build-teachers": partial(
        Build, keys={"domains": {"prose": {}, "law": {"teacher": {"dtype": "bfloat16"}}}}
    ),
    "build-tokens-first": TokensFirst,
    "build-more-tokens": partial(Build, base={"domains": {"prose": {"max_tokens": 300}}}),
    "build-more-domains": partial(Build, keys={"domains": {"prose": {}, "law": {}}}, base={}),
}
TRAININGS: dict[str, Callable[[Path, Build], Training]] = {
    "train": Training,
    "train-bf16": partial(Training, bf16=True),
    "train-lora": partial(Training, lora={"r": 2, "alpha": 4}),
    "train-behind": partial(Training, save_behind=True),
}
IN_PROCESSES: dict[str, Callable[[Path], Build] | Callable[[Path, Build], Training]] = {
    "build-vllm": VllmBuild,
    "build-ray": RayBuild,
    "train-ddp": partial(Ranks, worlds=(2,)),
    "train-fsdp": partial(Ranks, worlds=(2,), fsdp=True),
    "train-ddp-or-one": partial(Ranks, worlds=(1, 2)),
    "train-fsdp-or-one": partial(Ranks, worlds=(1, 2), fsdp=True),
}
OTHERS = ("report", "export")
SUBJECTS = (*BUILDS, *TRAININGS, *IN_PROCESSES, *OTHERS)


@lru_cache
def make_subject(name: str, folder: Path) -> Subject:
    """Return a subject, with the caches and runs that it reads, in a folder of its own."""
    inside = folder / name
    if name == "report":
        return Report(inside, _of(Training, "train", folder))
    if name == "export":
        return Exporting(inside, _of(Build, "build", folder))
    make: Any = (BUILDS | TRAININGS | IN_PROCESSES)[name]
    return make(inside, *([] if name.startswith("build") else [_of(Build, "build", folder)]))


def _of(kind: type[Kind], name: str, folder: Path) -> Kind:
    subject = make_subject(name, folder)
    assert isinstance(subject, kind)
    return subject
