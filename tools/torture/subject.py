"""What is under torture: a command on a tiny model and a few rows, in a fraction of a second."""

import json
import logging
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any
from unittest import mock

from obstore.store import MemoryStore

from ddk_build import BuildConfig, build_cache
from ddk_build.config import TeacherConfig
from ddk_cache.cache.verify import verify
from ddk_cache.format.commit_record import DIGEST
from ddk_cache.util.durable import is_staged

Objects = dict[str, bytes]
BUCKET = "s3://bucket/cache"
TEXT = "One build may be killed, cut off or refused at every step; the next one ends in the same bytes. "
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}<eos>{% endfor %}"


class Subject:
    """A command under torture: it must end in the same files wherever it was interrupted."""

    sources: tuple[Path, ...] = ()  # the folders it reads, whose files may fail too

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.output = folder, folder / "output"
        self.begin()
        self.run(str(self.output))
        self.reference = self.output.rename(folder / "reference")
        self.expected = self.comparable(stored(self.reference))

    def begin(self) -> None:
        """Make the output as it is before the command: empty."""
        shutil.rmtree(self.output, ignore_errors=True)

    def run(self, output: str) -> None:
        """Run the command, or run it again after an interruption."""
        raise NotImplementedError

    def comparable(self, objects: Objects) -> Mapping[str, Any]:
        """Return what two runs share."""
        return objects

    def damage(self, output: str) -> Iterable[str]:
        """Return what ``ddk-cache verify`` finds."""
        return ()

    def problems(self, output: str, objects: Objects) -> list[str]:
        """Return what is wrong at the end: other files than expected, leftovers, damage."""
        try:
            found = self.comparable({key: data for key, data in objects.items() if not is_staged(key)})
        except ValueError as error:
            return [repr(error)]
        names = sorted(found.keys() | self.expected.keys())
        differing = [f"{name}: differs" for name in names if found.get(name) != self.expected.get(name)]
        staged = [f"{key}: is left over" for key in objects if is_staged(key)]
        return [*differing, *staged, *self.damage(output)]


class Build(Subject):
    """``ddk-cache build`` with a tiny teacher.

    ``keys`` are those of its configuration that differ from ``config``, and ``base`` those of the cache that
    it extends.
    """

    hidden_size = 16  # of the teacher

    def __init__(
        self, folder: Path, keys: Mapping[str, Any] | None = None, base: Mapping[str, Any] | None = None
    ) -> None:
        self.teacher, self._keys, self._base = folder / "teacher", keys or {}, base
        _make_teacher(self.teacher, self.hidden_size)
        lines = (json.dumps(_document(index)) for index in range(9))
        (folder / "prose.jsonl").write_text("\n".join(lines), encoding="utf-8")
        self._loaded: dict[str, Any] = {}
        super().__init__(folder)

    def begin(self) -> None:
        """Make the cache that is extended, if there is one."""
        super().begin()
        if self._base is not None:
            finished = self.folder / "base"
            if not finished.exists():
                self._build(self.config(str(finished), self._base))
            shutil.copytree(finished, self.output)

    def config(self, cache: str, keys: Mapping[str, Any] | None = None) -> BuildConfig:
        """Return the configuration of a build into ``cache``."""
        prose = {"path": str(self.folder / "prose.jsonl")}
        keys = dict(self._keys if keys is None else keys)
        domains = {name: prose | domain for name, domain in keys.pop("domains", {"prose": {}}).items()}
        return BuildConfig.model_validate(
            {
                "teacher": {
                    "model": str(self.teacher),
                    "engine": "transformers",
                    "dtype": "float32",
                    "check": "never",
                }
                | keys.pop("teacher", {}),
                "cache": cache,
                "seq_length": 32,
                "overlap": 0,
                "shard_tokens": 32 * 8,
                "target": {"top_k": 4},
                "validation_rows": 3,
                "domains": domains,
            }
            | keys
        )

    def run(self, output: str) -> None:
        """Build, or resume."""
        self._build(self.config(output))

    def _build(self, config: BuildConfig) -> None:
        """Run a build, but load each teacher once for all."""
        from ddk_build.capture.check import checked_teacher

        def load(config: TeacherConfig, *arguments: Any) -> Any:
            key = config.model_dump_json()
            if key not in self._loaded:
                self._loaded[key] = checked_teacher(config, *arguments)
            return copy(self._loaded[key])  # which the build may close

        with mock.patch("ddk_build.build.checked_teacher", load):
            build_cache(config)

    def comparable(self, objects: Objects) -> Mapping[str, Any]:
        """Leave out the builds' ids."""
        return comparable(objects)

    def damage(self, output: str) -> Iterable[str]:
        """Verify the cache."""
        return map(str, verify(output))


class TokensFirst(Build):
    """``ddk-cache build --tokens-only``, and the build that finishes the cache."""

    def _build(self, config: BuildConfig) -> None:
        build_cache(config, tokens_only=True)
        super()._build(config)


def stored(cache: Path) -> Objects:
    """Return the content of every file by its path in the folder."""
    files = (path for path in cache.rglob("*") if path.is_file() and path.name != "ddk.lock")
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def comparable(objects: Mapping[str, bytes]) -> dict[str, Any]:
    """Return what two builds of one cache share, by object key: all but their build ids.

    Of a commit record everything is left but the shard digest at its end, of the manifest and the domains'
    states all but the ids and digests.
    """
    domains = json.loads(objects["zarr.json"])["attributes"]["ddk_cache"]["domains"]
    states = {f"{domain['name']}/zarr.json" for domain in domains}
    return {key: _without_build_ids(key, data, states) for key, data in objects.items()}


def _without_build_ids(key: str, data: bytes, states: Collection[str]) -> Any:
    if "commits/c/" in key:
        return data[:-DIGEST]
    if key == "zarr.json" or key in states:
        attribute = json.loads(data)["attributes"]["ddk_cache"]
        for part in (attribute, *attribute.get("domains", ())):
            for name in ("build_id", "fingerprint", "sha256"):
                part.pop(name, None)
        return attribute
    return data


@contextmanager
def bucket() -> Iterator[MemoryStore]:
    """Let every object store be one in memory, without delays between retries."""
    store, module = MemoryStore(), "ddk_cache.storage.object_store"
    with (
        mock.patch(f"{module}.from_url", return_value=store),
        mock.patch(f"{module}.FIRST_DELAY", 0.0),
        mock.patch(f"{module}.RETRY_TIMEOUT", 1.0),
    ):
        yield store


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings and bars of many runs off the terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)


def _document(index: int) -> dict[str, Any]:
    text = f"Document {index}: {TEXT * (1 + index % 3)}"
    messages = [{"role": "user", "content": f"Which {index}?"}, {"role": "assistant", "content": text}]
    return {"text": text, "messages": messages}


def _make_teacher(folder: Path, hidden_size: int) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
