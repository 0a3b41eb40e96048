"""The check of vLLM's fast path against its public path, at every start."""

import numpy as np

from ddk_build.teacher.capture import out_of_memory
from ddk_build.teacher.engines import Answers
from ddk_build.teacher.hooked_engine import HookedEngine, Submission
from ddk_build.teacher.vllm_arguments import PROBE_TOP_K
from ddk_cache.errors import brief
from ddk_cache.format.layout import Target

# Nats, at any position: in bfloat16 a hook that was wrong in the first row of each chunk, by up to 1.8, was
# within NOISE on average (0.06).
LARGEST = 1.0


def problem(engine: HookedEngine, target: Target, noise: float, max_length: int) -> str | None:
    """Install the fast path and compare it with the public path; return why it cannot be used, or None.

    Both read short documents of random tokens. The fast path reads them behind others that fill a step, so
    that the last document is cut and all of a step's memory is in use. ``noise`` is the mean difference, in
    nats, that the dtype explains.
    """
    probe, fill = _documents(engine, max_length)
    top = Target(top_k=min(PROBE_TOP_K, engine.vocab_size))
    public = engine.public_answers(probe, top)
    draws = None
    try:
        engine.install()
        fast = engine.answer(Submission([*fill, *probe], None, top))
        if target.kind == "sampled" and target.temperature == 1.0:
            offsets = [np.random.default_rng(0).random(len(document) - 1) for document in probe]
            draws = engine.answer(Submission(probe, offsets, target))
    except Exception as error:  # any type: a vLLM that differs from the tested versions
        if out_of_memory(error):
            raise
        engine.abort()
        return f"the fast path fails with vLLM {engine.version} ({brief(error)})"
    where = f"the fast path and vLLM {engine.version}'s prompt_logprobs differ by"
    mean, largest = difference(fast[-len(public) :], public)
    if not (mean < noise and largest < LARGEST):
        return f"{where} {mean:.2g} nats on average, {largest:.2g} at most"
    if draws is not None and not (share := draw_difference(draws, public)) < 1 / target.samples + noise:
        return f"{where} {share:.2g} of a position's draws"
    return None


def _documents(engine: HookedEngine, max_length: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return short documents, and longer ones that fill a step up to the middle of the last short one."""
    short = [min(max_length, length) for length in (2, 17, 40)]
    # vLLM reads a document without its last token.
    room = max(0, engine.step_tokens - sum(length - 1 for length in short[:-1]) - short[-1] // 2)
    count, rest = divmod(room, max_length - 1)
    fill = ([rest + 1] * (rest > 0) + [max_length] * count)[: engine.step_documents]
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, engine.vocab_size, length, np.int32) for length in [*short, *fill]]
    return documents[: len(short)], documents[len(short) :]


def difference(a: Answers, b: Answers) -> tuple[float, float]:
    """Return how two answers to the same documents differ, in nats: the mean and the largest difference.

    Of labels or of entries, whichever is more. Entries are compared by rank, since equal logits may come in
    another order.
    """
    differences = [np.abs(a.label_logprob - b.label_logprob), np.abs(a.logprobs - b.logprobs)]
    return max(float(part.mean()) for part in differences), max(float(part.max()) for part in differences)


def draw_difference(draws: Answers, expected: Answers) -> float:
    """Return by how much an entry's share of a position's draws differs most from its probability.

    Systematic draws take floor(n p) or ceil(n p) of n. Only tokens among ``expected``'s entries count.
    """
    same = draws.ids[:, :, None] == expected.ids[:, None, :]
    shares = np.where(same, np.exp(draws.logprobs)[:, :, None], 0).sum(axis=1)
    return float(np.abs(shares - np.exp(expected.logprobs)).max())
