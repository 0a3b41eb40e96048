"""A small, self-contained world to study in: real text, a tokenizer, a trained teacher, first students.

    python -m tools.studies.world tools/studies/configs/small.world.yaml

makes, in the world's ``folder`` (once; after an interruption, run it again and it resumes):

    text/<domain>.jsonl   documents of tools/real_data.py, near-copies left out within and across domains
    tokenizer/            byte-level BPE, trained on them
    labels/               a cache of the text alone: its rows train the teacher and the first students
    teacher/              trained on labels/ by ``ddk-cache train`` from random weights
    student-<seed>/       likewise, smaller and for a shorter time, on another mixture

A cache to study must hold out what the teacher has not trained on: ``build_config`` gives the same documents,
row length, number of held-out rows and seed as labels/, and so the same rows. From another tool:

    world = read_world("tools/studies/configs/small.world.yaml")
    make(world)                                            # nothing if it is there
    build_cache(build_config(world, "runs/cache", {"kind": "topk", "top_k": 64}))
    student = make_student(world, seed=0)                  # the folder
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Annotated, Any

import click
import yaml
from filelock import FileLock
from pydantic import Field

from ddk_build.build import build_cache
from ddk_build.config import BuildConfig
from ddk_cache.util.configuration import Config, load
from ddk_train.config import TrainConfig
from ddk_train.output.facts import FACTS, Facts
from ddk_train.train import train
from tools.real_data import texts

Positive = Annotated[int, Field(ge=1)]
PROMPTS = {"prompt_column": "prompt", "completion_column": "completion", "prompt_format": "plain"}


class Shape(Config):
    """A Llama's size; its input and output embeddings are one."""

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive


class Derived(Config):
    """A domain made of another one's documents, to see what a rule does with it."""

    of: str = Field(description="a domain of real_data.DOMAINS")
    containing: str = Field("", description="only documents with this text in them")
    shuffled: Annotated[float, Field(ge=0, le=1)] = Field(
        0, description="share of a document's words that change places: 1 leaves nothing to learn"
    )
    is_copy: bool = Field(False, description="of documents that an earlier domain has")
    prompt_words: int = Field(0, description="the first words of a document are a prompt, without loss")


class World(Config):
    """The parts of a world."""

    folder: str = Field(description="output folder; after a change choose another one")
    characters: dict[str, Positive] = Field(description="of text, at most, by domain")
    derived: dict[str, Derived] = Field({}, description="the domains that real_data.DOMAINS does not have")
    vocab_size: Positive
    seq_length: Positive
    validation_rows: Positive = Field(description="held out of each domain, as in a build")
    teacher: Shape | str = Field(description="trained here, or the folder of a finished model")
    engine: dict[str, Any] = Field(
        # Small weights are not worth the start of vLLM. The check would compare transformers with itself.
        {"engine": "transformers", "dtype": "float32", "check": "never"},
        description="keys of teacher in ddk-cache build",
    )
    student: Shape
    teacher_training: dict[str, Any] = Field({}, description="keys of ddk-cache train")
    student_training: dict[str, Any] = Field(description="keys of ddk-cache train")

    @property
    def root(self) -> Path:
        return Path(self.folder)

    @property
    def teacher_folder(self) -> Path:
        return Path(self.teacher) if isinstance(self.teacher, str) else self.root / "teacher"


def read_world(path: str | Path) -> World:
    """Read a world's YAML; raises ConfigError, in one line."""
    return load(path, [], World)


def make(world: World) -> Path:
    """Make the missing parts up to the trained teacher; return the teacher's folder."""
    make_text(world)
    if isinstance(world.teacher, str):
        return world.teacher_folder
    make_tokenizer(world)
    placeholder = Shape(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    unused = random_model(world, placeholder, "unused", seed=0)  # labels/ needs a teacher that nothing reads
    build_cache(build_config(world, world.root / "labels", {"kind": "label"}, teacher=unused))
    start = random_model(world, world.teacher, "teacher-start", seed=0)
    return trained(world, start, "teacher", world.teacher_training, seed=0)


def make_student(world: World, seed: int) -> Path:
    """Return the folder of the student that runs of ``seed`` start from, trained briefly on labels alone."""
    if isinstance(world.teacher, str):
        raise click.ClickException("student: must be given in a world whose teacher is finished")
    start = random_model(world, world.student, f"student-start-{seed}", seed)
    return trained(world, start, f"student-{seed}", world.student_training, seed)


def make_text(world: World) -> None:
    """Write text/<domain>.jsonl, whole documents up to the number of characters asked for."""
    if (world.root / "text").exists():
        return
    world.root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=world.root))
    seen: set[int] = set()
    for domain, limit in world.characters.items():
        rule = world.derived.get(domain, Derived(of=domain))
        total = 0
        with (scratch / f"{domain}.jsonl").open("w", encoding="utf-8") as lines:
            for text in texts(rule.of, set() if rule.is_copy else seen, rule.containing):
                total += len(text)
                if total > limit:
                    break
                lines.write(json.dumps(derive(text, rule), ensure_ascii=False) + "\n")
    settle(scratch, world.root / "text")


def derive(text: str, rule: Derived) -> dict[str, str]:
    """Return the line of a document: a prompt and its completion, or its text with words shuffled."""
    if rule.prompt_words:
        ends = [word.end() for word in re.finditer(r"\S+", text)]
        end = ends[min(rule.prompt_words, len(ends)) - 1]
        return {"prompt": text[:end], "completion": text[end:]}
    pieces = re.split(r"(\s+)", text)  # words, and between them what separates them
    random = Random(len(text))
    places = [place for place in range(0, len(pieces), 2) if random.random() < rule.shuffled]
    words = [pieces[place] for place in places]
    random.shuffle(words)
    for place, word in zip(places, words, strict=True):
        pieces[place] = word
    return {"text": "".join(pieces)}


def make_tokenizer(world: World) -> None:
    """Train a byte-level BPE on equally much text of every domain, so that a small domain gets tokens too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = world.root / "tokenizer"
    if folder.exists():
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=world.vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    domains = [
        (world.root / "text" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        for domain in world.characters
    ]
    least = min(sum(map(len, lines)) for lines in domains)
    sample = []
    for lines in domains:
        taken = 0
        for line in lines:
            if taken >= least:
                break
            sample.append("".join(json.loads(line).values()))
            taken += len(line)
    tokenizer.train_from_iterator(sample, trainer)
    scratch = Path(tempfile.mkdtemp(dir=world.root))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(scratch)
    settle(scratch, folder)


def build_config(
    world: World, cache: Path | str, target: Mapping[str, Any], *, teacher: Path | None = None
) -> BuildConfig:
    """Return a build over the world's text by its teacher, with the same held-out documents as labels/."""
    return BuildConfig.model_validate(
        {
            "teacher": {"model": str(teacher or world.teacher_folder), **world.engine},
            "cache": str(cache),
            "seq_length": world.seq_length,
            "target": target,
            "validation_rows": world.validation_rows,
            "validation_targets": target["kind"] != "label",
            "shard_tokens": 65_536,
            "domains": {
                domain: {"path": "json", "data_files": str(world.root / "text" / f"{domain}.jsonl")}
                | (PROMPTS if domain in world.derived and world.derived[domain].prompt_words else {})
                for domain in world.characters
            },
        }
    )


def random_model(world: World, shape: Shape, name: str, seed: int) -> Path:
    """Write a Llama with random weights and the world's tokenizer; return its folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = world.root / name
    if folder.exists():
        return folder
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(world.root / "tokenizer")
    config = LlamaConfig(
        vocab_size=world.vocab_size,
        max_position_embeddings=world.seq_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **shape.model_dump(),
    )
    scratch = Path(tempfile.mkdtemp(dir=world.root))
    LlamaForCausalLM(config).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    settle(scratch, folder)
    return folder


def settle(scratch: Path, folder: Path) -> None:
    """Rename a complete folder to its final name, or remove it if another process was first."""
    scratch.chmod(0o755)  # mkdtemp's are the owner's alone
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(scratch)


def trained(world: World, start: Path, name: str, training: Mapping[str, Any], seed: int) -> Path:
    """Train ``start`` on the labels alone; return the folder of the result."""
    folder = world.root / name
    given = {"cache": world.root / "labels", "student": start, "output_dir": folder}
    common = {"gamma": 0, "bf16": False, "report_to": "none", "seed": seed}
    values = {key: str(value) for key, value in given.items()}
    with FileLock(f"{folder}.lock"):  # a study in two processes asks twice
        finish(TrainConfig.model_validate({**common, **values, **training}))
    return folder


def finish(config: TrainConfig) -> None:
    """Train or resume up to the end; do nothing if a run with the same keys has ended.

    Raises
    ------
    ConfigError
        The folder holds an unfinished run of another configuration.
    click.ClickException
        It holds a finished one.
    """
    folder = Path(config.output_dir)
    if not has_ended(folder):
        train(config, resume=(folder / "config.yaml").exists())
        return
    saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    for key, value in config.model_dump(mode="json", exclude_unset=True).items():
        if saved.get(key) != value:
            raise click.ClickException(
                f"{folder}: the finished run has {key}: {saved.get(key)}, not {value}; remove the folder"
            )


def has_ended(folder: Path) -> bool:
    """Return whether a run in this folder has ended and saved its student."""
    facts = folder / FACTS
    return facts.is_file() and Facts.model_validate_json(facts.read_bytes()).ended is not None


@click.command()
@click.argument("world", type=click.Path(dir_okay=False))
@click.option("--seeds", default=0, show_default=True, help="Make the first students of seeds 0, 1, ... too.")
def main(world: str, seeds: int) -> None:
    """Make the world of WORLD.yaml, or what is missing of it."""
    described = read_world(world)
    click.echo(make(described))
    for seed in range(seeds):
        click.echo(make_student(described, seed))


if __name__ == "__main__":
    main()
