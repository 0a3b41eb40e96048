"""Estimate what ``ddk-cache generate`` writes: completions, tokens and bytes; with a probe, hours too."""

import time
from itertools import islice
from pathlib import Path
from typing import Any

from ddk_build.generate import vllm_engine
from ddk_build.generate.config import GenerateConfig
from ddk_build.generate.folder import Folder
from ddk_build.generate.program import Plan, make_plan, requests

PROBE = 32  # completions of each domain
# Of a token in the files, measured on prose and code with a vocabulary of 1,024: 3.6 for its log-probability.
BYTES = 5.8


def estimate(config: GenerateConfig, *, probe: bool) -> dict[str, Any]:
    """Read all prompts and count; write nothing. Without ``probe`` every completion has ``max_tokens``.

    With it the model writes a few completions of each domain, to measure their length and tokens a second.

    Raises ConfigError as ``generate`` does before its engine starts.
    """
    plan = make_plan(config, is_here=probe)
    written, seconds = _probe(config, plan) if probe else ({}, 0.0)
    domains: dict[str, dict[str, int]] = {}
    for name, lengths in plan.prompt_tokens.items():
        count = len(lengths) * config.sampling.samples
        each = written.get(name, [config.sampling.max_tokens])
        tokens = round(count * sum(each) / len(each))
        stored = round(BYTES * (tokens + config.sampling.samples * sum(lengths)))
        domains[name] = {"prompts": len(lengths), "completions": count, "tokens": tokens, "bytes": stored}
    total = {key: sum(domain[key] for domain in domains.values()) for key in next(iter(domains.values()))}
    speed = sum(map(sum, written.values())) / seconds if probe else None
    return {
        "domains": domains,
        "total": total,
        "tokens_per_second": speed,
        "hours": total["tokens"] / speed / 3600 if speed else None,
    }


def _probe(config: GenerateConfig, plan: Plan) -> tuple[dict[str, list[int]], float]:
    """Return the lengths of some completions by domain, and the seconds that all took together."""
    engine = vllm_engine.VllmEngine(config, plan.max_length, plan.added_tokens)
    shards = Folder(Path(config.output), plan.note, config.shard_prompts).shards
    asked = [
        request
        for name, reader in plan.readers.items()
        for request in islice(requests(config, {name: reader}, shards), PROBE)
    ]
    lengths: dict[str, list[int]] = {}
    began = time.perf_counter()
    for request, completion in engine.complete(asked):
        lengths.setdefault(request.shard.domain, []).append(len(completion.tokens))
    return lengths, time.perf_counter() - began


def as_text(estimate: dict[str, Any]) -> str:
    """Format the result of ``estimate`` as a table."""
    at_most = "" if estimate["hours"] else " at most"
    lines = [f"{'domain':<24} {'prompts':>12} {'completions':>12} {'tokens':>16} {'bytes':>18}"]
    lines += [
        f"{name:<24} {part['prompts']:>12,} {part['completions']:>12,} {part['tokens']:>16,} "
        f"{part['bytes']:>18,}{at_most}"
        for name, part in [*estimate["domains"].items(), ("all", estimate["total"])]
    ]
    if estimate["hours"]:
        lines.append(
            f"{estimate['tokens_per_second']:,.0f} tokens/s in a probe of {PROBE} completions a domain: "
            f"{estimate['hours']:.1f} hours; with more at once the engine is faster"
        )
    else:
        lines.append("as if all had max_tokens; --probe measures their length, and the time")
    return "\n".join(lines)
