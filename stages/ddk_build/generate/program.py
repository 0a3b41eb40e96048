"""Write completions: read the prompts, let the engine complete what is missing, keep it shard by shard."""

import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from ddk_build.capture.cluster import Cluster
from ddk_build.data.corpus import HINTS
from ddk_build.data.written import Written, WrittenDomain, teachers_of
from ddk_build.generate import vllm_engine
from ddk_build.generate.config import GenerateConfig
from ddk_build.generate.engine import Completion, Engine, Request, Shard, completion_seed
from ddk_build.generate.folder import Counts, Folder, check_folder, digest_of, open_folder
from ddk_build.generate.prompts import TOO_LONG, PromptReader
from ddk_build.generate.ray_engines import RayEngines
from ddk_build.teacher.identity import teacher_info
from ddk_build.teacher.model import model_config
from ddk_build.teacher.tokenizer import load_tokenizer, vocabulary
from ddk_build.teacher.weights import check_weights
from ddk_cache.errors import ConfigError, counted
from ddk_cache.format.vocabulary import Vocabulary
from ddk_cache.util.packages import package_version
from ddk_cache.util.progress import meter

logger = logging.getLogger(__name__)

PACKAGES = ("ddk-cache", "torch", "transformers")  # whose versions the note has, beside the engine's


def generate(
    config: GenerateConfig, cluster: Cluster | None = None, *, report: Callable[[str], object] = logger.info
) -> Path:
    """Write completions, or resume an earlier run of it; files that are there are not written again.

    Parameters
    ----------
    cluster
        The Ray cluster whose engines write; None runs one engine in this process.
    report
        Called with one line for each domain.

    Returns
    -------
    The folder.

    Raises
    ------
    ConfigError
        The configuration is wrong, or differs from the one that the folder was begun with.
    CacheError
        Another process writes to the folder.
    """
    plan = make_plan(config, is_here=cluster is None)
    for name, reader in plan.readers.items():
        if reader.text_format is not None:
            report(f"{name}: {reader.text_format}")
    kept = {name: reader.kept_types for name, reader in plan.readers.items()}
    output = Path(config.output)
    with open_folder(output, plan.note, plan.vocabulary, config.shard_prompts, kept) as folder:
        if missing := folder.missing():
            arguments = config, plan.max_length, plan.added_tokens
            engine: Engine
            if cluster is None:
                engine = vllm_engine.VllmEngine(*arguments)
            else:
                engine = RayEngines(cluster, *arguments)
            completed = engine.complete(requests(config, plan.readers, missing))
            write(folder, missing, completed, config.sampling.samples)
        counts = folder.finish()
    for name, domain in plan.note.domains.items():
        report(summary(name, domain, counts[name]))
    return folder.path


@dataclass(frozen=True)
class Plan:
    """What is to be written, checked."""

    note: Written
    readers: Mapping[str, PromptReader]
    """Of each domain's prompts."""
    prompt_tokens: Mapping[str, list[int]]
    """The length of each prompt, by domain."""
    max_length: int
    """Tokens of the longest prompt with its completion."""
    vocabulary: Vocabulary
    added_tokens: Mapping[str, int]
    """The tokenizer's special tokens."""


def make_plan(config: GenerateConfig, *, is_here: bool = True) -> Plan:
    """Read all prompts, and check all that can be checked before the engine starts.

    ``is_here``: it starts in this process, not on other machines, so vLLM must be installed.

    Raises ConfigError if vLLM is not installed or has no such argument; the model, its weights or a source
    cannot be read; a domain has no prompt; or the folder was written with another configuration.
    """
    if is_here and find_spec("vllm") is None:
        raise ConfigError(
            "vllm is not installed; pip install 'ddk-cache[build]' (without a GPU: 'ddk-cache[build-cpu]')"
        )
    with keys_of_generate():
        room = _longest_prompt(config)
        tokenizer = load_tokenizer(config.writer)
        writer = teacher_info(config.writer)
    writer_vocabulary = vocabulary(tokenizer)
    readers = {name: PromptReader(name, domain, tokenizer, room) for name, domain in config.domains.items()}
    ids: dict[str, list[str]] = {}
    lengths: dict[str, list[int]] = {}
    domains: dict[str, WrittenDomain] = {}
    for name, reader in readers.items():
        prompts = [(prompt.id, len(prompt.tokens)) for prompt in reader]
        if not prompts:
            raise ConfigError(f"domains.{name}: {_no_prompts(reader.skipped)}")
        ids[name], lengths[name] = ([*column] for column in zip(*prompts, strict=True))
        domains[name] = WrittenDomain(
            source=config.domains[name].model_dump(exclude={"max_prompts"}, exclude_defaults=True),
            prompts=len(prompts),
            prompt_ids=digest_of(ids[name]),
            skipped=dict(reader.skipped),
            completions=None,
        )
    note = Written(
        writer=writer,
        tokenizer_hash=writer_vocabulary.fingerprint(),
        seed=config.seed,
        sampling=config.sampling.model_dump(),
        drop_truncated=config.drop_truncated,
        shard_tokens=config.shard_tokens,
        versions={"vllm": writer.engine_version, **{name: package_version(name) for name in PACKAGES}},
        domains=domains,
        writer_teachers=teachers_of(config.model),
    )
    max_length = max(map(max, lengths.values())) + config.sampling.max_tokens
    if is_here:
        vllm_engine.check_arguments(config, max_length)
    with keys_of_generate():
        check_weights(config.writer)
    note = check_folder(Path(config.output), note, ids)
    return Plan(note, readers, lengths, max_length, writer_vocabulary, tokenizer.get_added_vocab())


def _longest_prompt(config: GenerateConfig) -> int:
    """Return the most tokens of a prompt that leaves room for a completion."""
    positions = getattr(model_config(config.writer), "max_position_embeddings", None) or sys.maxsize
    limit = config.engine_args.get("max_model_len", positions)
    if not isinstance(limit, int):
        raise ConfigError(
            f"engine_args.max_model_len: must be a whole number, not {limit!r}; leave it out for as many "
            "tokens as the prompts need"
        )
    if limit <= config.sampling.max_tokens:
        raise ConfigError(
            f"sampling.max_tokens: {config.sampling.max_tokens} leaves no room for a prompt in the {limit} "
            f"tokens of {config.model}"
        )
    return limit - config.sampling.max_tokens


def _no_prompts(skipped: Counter[str]) -> str:
    """Return why a domain has no prompt."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items()) or "it has no rows"
    hint = next((f"; {HINTS[reason]}" for reason in skipped if reason in HINTS), "")
    hint = "; lower sampling.max_tokens" if skipped[TOO_LONG] else hint
    return f"has no prompt ({reasons}){hint}"


@contextmanager
def keys_of_generate() -> Iterator[None]:
    """Let errors of what reads a build's teacher name the keys of this configuration."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("teacher.")) from error


def requests(
    config: GenerateConfig, readers: Mapping[str, PromptReader], missing: Sequence[Shard]
) -> Iterator[Request]:
    """Yield a request for each completion of the missing shards."""
    for name, reader in readers.items():
        shards = {shard.first: shard for shard in missing if shard.domain == name}
        end = max((shard.end for shard in shards.values()), default=0)
        for index, prompt in enumerate(islice(reader, end)):
            if shard := shards.get(index - index % config.shard_prompts):
                for sample in range(config.sampling.samples):
                    seed = completion_seed(config.seed, prompt, sample)
                    yield Request(shard, index, prompt, sample, seed)


def write(
    folder: Folder,
    missing: Sequence[Shard],
    completed: Iterator[tuple[Request, Completion]],
    samples: int,
) -> None:
    """Gather completions, which come in any order, and write each shard that they fill.

    Raises ConfigError if all completions of the first shard of a domain are empty.
    """
    total, done, tokens = Counter[str](), Counter[str](), Counter[str]()
    for shard in missing:
        total[shard.domain] += (shard.end - shard.first) * samples
    waiting: dict[Shard, list[tuple[Request, Completion]]] = defaultdict(list)
    with meter("writing", "tokens", parts=dict.fromkeys(total)) as progress:
        for request, completion in completed:
            shard = request.shard
            waiting[shard].append((request, completion))
            done[shard.domain] += 1
            tokens[shard.domain] += len(completion.tokens)
            progress.expect(tokens[shard.domain] * total[shard.domain] // done[shard.domain], shard.domain)
            progress.advance(len(completion.tokens), shard.domain)
            if len(waiting[shard]) == (shard.end - shard.first) * samples:
                folder.write(shard, waiting.pop(shard))


def dry_run(config: GenerateConfig, *, is_here: bool = True) -> str:
    """Return the merged configuration as YAML, with what would be written as comments; write nothing.

    ``is_here``: the engine will run in this process, not on a cluster.

    Raises ConfigError if the command would fail: the model, vLLM's arguments, a source, or the folder.
    """
    plan, sampling = make_plan(config, is_here=is_here), config.sampling
    text = config.to_yaml()
    for name, lengths in plan.prompt_tokens.items():
        completions = len(lengths) * sampling.samples
        text += (
            f"# {name}: {counted(len(lengths), 'prompt')} ({sum(lengths):,} tokens, the longest "
            f"{max(lengths):,}), {counted(completions, 'completion')} of at most "
            f"{completions * sampling.max_tokens:,} tokens{_left_out(plan.note.domains[name].skipped)}\n"
        )
        if (text_format := plan.readers[name].text_format) is not None:
            text += f"# {name}: {text_format}\n"
    folder = Folder(Path(config.output), plan.note, config.shard_prompts)
    total, missing = len(folder.shards), len(folder.missing())
    return f"{text}# {config.output}: can be written; {counted(total, 'file')}, {total - missing} done\n"


def summary(name: str, domain: WrittenDomain, counts: Counts) -> str:
    """Return one line on a domain: prompts, completions, tokens, and what was cut, empty or left out."""
    parts = [
        counted(domain.prompts, "prompt"),
        f"{counted(counts.completions, 'completion')} ({counts.tokens:,} tokens)",
        f"{counts.truncated:,} cut by max_tokens",
        f"{counts.empty:,} empty",
    ]
    return f"{name}: {', '.join(parts)}{_left_out(domain.skipped)}"


def _left_out(skipped: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    return f"; left out: {reasons}" if reasons else ""
