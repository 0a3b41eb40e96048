"""On-policy distillation in rounds: the student writes, the teacher scores, the student trains; then again.

Each part is a command in a process of its own. So an engine's memory is free before the next model is
loaded, and each part resumes: after an interruption, run the same command again.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, PositiveInt, ValidationError, ValidationInfo, field_validator

from ddk_cache.cache.joined import conflict, join
from ddk_cache.cache.reader import open_cache
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.storage.addresses import Address, LocalFolder
from ddk_cache.util.configuration import CommandConfig, first_problem, stage_configurations
from ddk_cache.util.durable import make_folder, write
from ddk_cache.util.interrupt import Stopped, catch_signals

POLL_SECONDS = 0.1
Keys = dict[str, Any]

WRITTEN = {"gamma": 0.0, "cross_entropy_weight": 0.0, "policy_gradient_weight": 1.0}
FOLLOWS = {  # from the round, and is not given
    "generate": {"model", "output"},
    "build": {"cache", "domains"},
    "train": {"student", "cache", "output_dir"},
}


class RoundsConfig(CommandConfig):
    """A student, how often it writes and trains, and the keys of the three commands."""

    student: Address = Field(description="folder or hub id of the model that is trained, and writes first")
    output: LocalFolder = Field(description="folder of the rounds: round-1, round-2, ...")
    rounds: PositiveInt = Field(description="number of rounds")
    generate: Keys = Field(
        description="keys of generate.yaml, without model and output; seed is the first round's"
    )
    build: Keys = Field(description="keys of build.yaml, without cache and domains")
    train: Keys = Field(description="keys of train.yaml, without student, cache and output_dir")
    domains: dict[str, Keys] = Field(
        {},
        description="keys of build.yaml for the text that was written for a domain of `generate`, such as "
        "teacher_prefix_column or min_score",
    )
    caches: list[Address] = Field([], description="caches of given text that every round trains on too")
    written: dict[str, float] = Field(
        WRITTEN,
        description="weights of the loss on the written text, and its max_epochs; those that are not given "
        "are gamma 0, cross_entropy_weight 0, policy_gradient_weight 1. Those in `train` hold for `caches`",
    )
    replay: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5,
        description="factor on the weights for each round that a text is older than the newest; 0: the "
        "newest text alone",
    )

    @field_validator(*FOLLOWS)
    @classmethod
    def _check_part(cls, keys: Keys, part: ValidationInfo) -> Keys:
        if given := FOLLOWS[str(part.field_name)] & keys.keys():
            raise ConfigError(f"{min(given)}: follows from the round; leave it out")
        if type(keys.get("seed", 0)) is not int:
            raise ConfigError("seed: must be an integer")
        if not isinstance(keys.get("domains", {}), dict):
            raise ConfigError("domains: must hold keys and values")
        return keys

    @field_validator("written")
    @classmethod
    def _keep_defaults(cls, written: dict[str, float]) -> dict[str, float]:
        return WRITTEN | written

    def written_domains(self, index: int) -> dict[str, str]:
        """Return the domains of the text that is written in a round: theirs in `generate`, by name."""
        return {f"{name}-{index}": name for name in self.generate.get("domains", {})}


@dataclass(frozen=True)
class Part:
    """A command of a round and its configuration."""

    command: str
    keys: Keys
    file: Path

    @property
    def options(self) -> list[str]:
        """``--resume`` for a training run that has begun."""
        begun = self.command == "train" and (Path(self.keys["output_dir"]) / "config.yaml").is_file()
        return ["--resume"] if begun else []

    def has_ended(self) -> bool:
        """Return whether it is a training run that has saved its student; others find out by themselves."""
        if self.command != "train":
            return False
        try:
            facts = json.loads((Path(self.keys["output_dir"]) / "run.json").read_bytes())
            return facts["ended"] is not None
        except (OSError, ValueError, KeyError, TypeError):
            return False


def parts(config: RoundsConfig) -> Iterator[Part]:
    """Yield the parts of all rounds in order."""
    student = config.student
    for index in range(1, config.rounds + 1):
        folder = Path(config.output) / f"round-{index}"
        text, cache, trained = (str(folder / name) for name in ("text", "cache", "student"))
        first_seed = config.generate.get("seed", 0)
        changes: Mapping[str, Keys] = {
            "generate": {"model": student, "output": text, "seed": first_seed + index - 1},
            "build": {"cache": cache, "domains": _written_domains(config, index, text)},
            "train": {"student": student, "output_dir": trained, **_caches(config, index)},
        }
        for command, keys in changes.items():
            yield Part(command, getattr(config, command) | keys, folder / f"{command}.yaml")
        student = trained


def _written_domains(config: RoundsConfig, index: int, text: str) -> Keys:
    return {
        written: config.domains.get(name, {}) | {"path": f"{text}/{name}"}
        for written, name in config.written_domains(index).items()
    }


def _caches(config: RoundsConfig, index: int) -> Keys:
    """Return the caches that a round trains on, and the weights of the domains that were written."""
    oldest = 1 if config.replay else index
    caches = [f"{config.output}/round-{written}/cache" for written in range(oldest, index + 1)]
    domains = {
        name: {
            key: value if key == "max_epochs" else value * config.replay ** (index - written)
            for key, value in config.written.items()
        }
        for written in range(oldest, index + 1)
        for name in config.written_domains(written)
    }
    return {"cache": [*config.caches, *caches], "domains": config.train.get("domains", {}) | domains}


def check(config: RoundsConfig) -> None:
    """Raise ConfigError if a part's keys are wrong, or a given cache does not go with those of the rounds."""
    if unknown := config.domains.keys() - config.generate.get("domains", {}).keys():
        raise ConfigError(f"domains.{min(unknown)}: is not a domain of generate")
    models, last = stage_configurations(), dict[str, Any]()
    for part in parts(config):
        try:
            last[part.command] = models[part.command].model_validate(part.keys)
        except ValidationError as error:
            raise ConfigError(f"{part.command}: {first_problem(error, models[part.command])}") from error
    _check_last(config, last["build"], last["train"])
    written = {name for index in range(1, config.rounds + 1) for name in config.written_domains(index)}
    if taken := written & config.train.get("domains", {}).keys():
        raise ConfigError(
            f"train: domains.{min(taken)}: is text of a round; its weights are those of `written`"
        )
    given = [open_cache(url) for url in config.caches]
    for url, cache in zip(config.caches, given, strict=True):
        problem = conflict(last["build"], cache)
        if taken := written & cache.keys():
            problem = f"both have a domain {min(taken)!r}; give that of `generate` another name"
        if problem:
            raise ConfigError(f"caches: {url} does not go with what build makes: {problem}")
    if given:
        join(given)


def _check_last(config: RoundsConfig, built: Any, trained: Any) -> None:
    """Raise ConfigError if the last build and training run are valid, and cannot be those of rounds."""
    if built.target.kind == "label" and config.written["gamma"]:
        raise ConfigError("written.gamma: must be 0: KL needs target.kind topk or sampled in build")
    if config.rounds > 1 and trained.lora is not None and not trained.lora.merge:
        raise ConfigError("train: lora.merge: must be true: the next round's student is a whole model")


def run(config: RoundsConfig, announce: Callable[[str], object]) -> Path:
    """Run all rounds, or what is left of them, and return the folder of the last student.

    ``announce`` is called with one line before each part. Raises ConfigError or CacheError if a command
    fails, and Stopped after a signal.
    """
    check(config)
    for part in parts(config):
        name = f"{part.file.parent.name}, {part.command}"
        if part.has_ended():
            announce(f"{name}: done")
            continue
        announce(name)
        make_folder(part.file.parent)
        write(part.file, yaml.safe_dump(part.keys, sort_keys=False, allow_unicode=True))
        arguments = [sys.executable, "-P", "-m", "ddk_cache", part.command, str(part.file), *part.options]
        code = run_command(arguments)
        if code == ConfigError.exit_code:
            raise ConfigError(
                f"{name}: correct what the line above says in your rounds.yaml, not in {part.file}"
            )
        if code:
            raise CacheError(f"{name} ended with exit code {code}; the same command goes on from there")
    return Path(part.keys["output_dir"])


def run_command(arguments: list[str]) -> int:
    """Run a command and return its exit code; after a signal raise Stopped once the command has ended."""
    with catch_signals(once=True) as interrupt, subprocess.Popen(arguments) as command:
        while command.poll() is None and interrupt.signal is None:
            time.sleep(POLL_SECONDS)
        if interrupt.signal == signal.SIGTERM:  # a terminal sends SIGINT to both
            command.terminate()
    if interrupt.signal is not None:
        raise Stopped(interrupt.signal)
    return command.returncode
