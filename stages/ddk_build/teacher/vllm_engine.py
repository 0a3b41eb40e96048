"""The vLLM engine: the fast path with its self-check, and the fallback to the public path."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch

from ddk_build.config import TeacherConfig
from ddk_build.teacher import capture
from ddk_build.teacher.capture import out_of_memory
from ddk_build.teacher.engines import NOISE, Answers, EngineDiedError, Teacher
from ddk_build.teacher.model import model_config
from ddk_build.teacher.vllm_arguments import PROBE_TOP_K, engine_arguments, prepare_environment
from ddk_build.teacher.vllm_arguments import check_arguments as check_arguments
from ddk_cache.errors import CacheError, ConfigError, brief
from ddk_cache.format.layout import Target

logger = logging.getLogger(__name__)

MEMORY_ADVICE = (
    "lower teacher.engine_args.max_num_batched_tokens or teacher.engine_args.gpu_memory_utilization"
)

# Nats, at any position: in bfloat16 a hook that was wrong in the first row of each chunk, by up to 1.8, was
# within NOISE on average (0.06).
LARGEST = 1.0

# The fewest tokens that vLLM generates; the token is dropped.
ONE_TOKEN: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}


@dataclass(eq=False)
class Asked:
    """A call of ``submit``."""

    documents: Sequence[np.ndarray]
    offsets: Sequence[np.ndarray] | None
    target: Target | None
    unread: int = 0
    """Documents that the engine has not finished."""
    answers: Callable[[], Answers] | None = None

    @property
    def width(self) -> int:
        """The entries of a position."""
        return self.target.width if self.target else 0

    def part(self, start: int, stop: int) -> "Asked":
        """Return a call of some of the documents."""
        offsets = None if self.offsets is None else self.offsets[start:stop]
        return Asked(self.documents[start:stop], offsets, self.target)

    def as_bytes(self) -> capture.Call:
        """Return what the workers get."""
        return capture.Call(
            np.concatenate(self.documents).astype(np.int32).tobytes(),
            np.array([len(document) for document in self.documents], np.int64).tobytes(),
            None if self.offsets is None else np.concatenate(self.offsets).astype(np.float64).tobytes(),
            None if self.target is None else self.target.model_dump(),
        )


class VllmTeacher(Teacher):
    """Answers with vLLM; ``fast`` tells whether the fast path does.

    The engine is asked ahead: a call leaves the work of two steps or more in it, so that the next call's
    documents follow without a pause, and one step runs documents of both.
    """

    def __init__(self, llm: Any, config: TeacherConfig, target: Target, max_length: int) -> None:
        import vllm

        self.engine_version = str(vllm.__version__)
        self.llm = llm
        self.target = target
        text = llm.llm_engine.vllm_config.model_config.hf_text_config
        self.vocab_size = int(text.vocab_size)
        scheduler = llm.llm_engine.vllm_config.scheduler_config
        self.step_tokens, self.step_documents = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        # Tokens asked at once, None for any number; halved when memory runs out.
        self.call_tokens: int | None = None
        self._calls: deque[Asked] = deque()  # whose answers are not returned
        # The engine's documents by request id: the call's number, the call, the document's length.
        self._held: dict[str, tuple[int, Asked, int]] = {}
        self._tokens = 0  # of these documents
        self._numbers = count()  # of calls
        parallel = llm.llm_engine.vllm_config.parallel_config
        # The steps under way, the next one, and the document that it cuts.
        self.most_held = (parallel.pipeline_parallel_size + 1) * self.step_tokens + max_length
        # Where vLLM has more processes than this one, out of memory in one of them stops the others.
        self.is_one_process = parallel.world_size == 1 and not vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING
        self.fast = True
        problem = self._problem(NOISE[config.dtype], max_length)
        if problem is None:
            return
        self.fast = False
        if target.kind == "sampled" or target.temperature != 1.0:
            key = "kind: sampled" if target.kind == "sampled" else f"temperature: {target.temperature}"
            raise ConfigError(
                f"target.{key} cannot be made from vLLM's public prompt_logprobs, and {problem}; "
                "use another vLLM version or teacher.engine: transformers"
            )
        logger.warning("%s: capturing through the slower public prompt_logprobs", problem)

    def close(self) -> None:
        """Free the engine's memory."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

    def submit(
        self,
        documents: Sequence[np.ndarray],
        offsets: Sequence[np.ndarray] | None = None,
        *,
        labels_only: bool = False,
    ) -> list[Callable[[], Answers]]:
        """Ask for answers; see :meth:`ddk_build.teacher.engines.Teacher.submit`."""
        target = None if labels_only else self.target
        call = Asked(documents, None if target is None else offsets, target)
        self._calls.append(call)
        at_once = not documents or self.call_tokens is not None
        return self._ready_after(lambda: self._answer_in_parts(call) if at_once else self._ask(call))

    def drain(self) -> list[Callable[[], Answers]]:
        """Answer all calls; see :meth:`ddk_build.teacher.engines.Teacher.drain`."""
        return self._ready_after(self._finish)

    def _ready_after(self, work: Callable[[], None]) -> list[Callable[[], Answers]]:
        """Work with the engine; return the answers of the first calls, as far as they are there."""
        try:
            self._work(work)
        except BaseException:
            self._calls.clear()  # none of them will be answered
            raise
        ready = []
        while self._calls and (answers := self._calls[0].answers) is not None:
            ready.append(answers)
            self._calls.popleft()
        return ready

    def _work(self, work: Callable[[], None]) -> None:
        """Work; where memory runs out, ask all calls without an answer again in smaller parts."""
        try:
            work()
        except (ConfigError, CacheError):
            raise
        except Exception as error:  # any type: vLLM passes on the errors of its parts
            unanswered = [call for call in self._calls if call.answers is None]
            self._ask_for_less([document for call in unanswered for document in call.documents], error)
            for call in unanswered:
                self._answer_in_parts(call)

    def _ask(self, call: Asked) -> None:
        """Hand a call's documents to the engine; run steps as long as it holds enough for them."""
        from vllm import SamplingParams

        if not self.fast:
            answers = self._public(call.documents, call.target)
            call.answers = lambda: answers
            return
        number, call.unread = next(self._numbers), len(call.documents)
        self.llm.collective_rpc("ddk_begin", args=(number, *call.as_bytes()))
        for index, document in enumerate(call.documents):
            request = f"{number}/{index}"
            params = SamplingParams(**ONE_TOKEN, extra_args={capture.DOCUMENT: [number, index]})
            self.llm.llm_engine.add_request(request, prompt(document), params)
            self._held[request] = number, call, len(document)
            self._tokens += len(document)
            while self._tokens >= self.most_held:
                self._step()

    def _step(self) -> None:
        """Run one step of the engine; take the answers of the calls that end with it."""
        for output in self.llm.llm_engine.step():
            number, call, tokens = self._held.pop(output.request_id)
            self._tokens -= tokens
            call.unread -= 1
            if not call.unread:
                call.answers = self._taken(number, call)

    def _taken(self, number: int, call: Asked) -> Callable[[], Answers]:
        by_worker = self.llm.collective_rpc("ddk_take", args=(number, self.is_one_process))
        answers = next((answers for answers in by_worker if answers is not None), None)
        if answers is None:
            raise RuntimeError("vLLM did not call the hook")

        def wait() -> Answers:
            memory = answers.wait() if self.is_one_process else np.frombuffer(answers, np.int32)
            return Answers.from_memory(memory, call.width)

        return wait

    def _finish(self) -> None:
        """Run steps until the engine holds no documents."""
        while self._held:
            self._step()

    def _answer_at_once(self, call: Asked) -> Callable[[], Answers]:
        self._ask(call)
        self._finish()
        assert call.answers is not None
        return call.answers

    def _answer_in_parts(self, call: Asked) -> None:
        """Answer a call in parts of ``call_tokens``, one at a time."""
        parts: list[Callable[[], Answers]] = []
        start = 0
        while start < len(call.documents):
            part = call.part(start, self._call_end(call.documents, start))
            try:
                parts.append(self._answer_at_once(part))
                start += len(part.documents)
            except Exception as error:  # any type, as above
                self._ask_for_less(part.documents, error)
        none = Answers.empty(call.width)
        call.answers = lambda: Answers.concatenate([part() for part in parts] or [none])

    def _call_end(self, documents: Sequence[np.ndarray], start: int) -> int:
        """Return the end of the documents, at least one, that are asked at once from ``start``."""
        if self.call_tokens is None:
            return len(documents)
        ends = np.cumsum([len(document) for document in documents[start:]])
        return start + max(1, int(np.searchsorted(ends, self.call_tokens, side="right")))

    def _ask_for_less(self, documents: Sequence[np.ndarray], error: Exception) -> None:
        """Halve the tokens that are asked at once if ``error`` is memory that ran out with ``documents``.

        Raises any other error, one after which the engine cannot go on, and ConfigError for one document.
        """
        if not self.is_one_process:
            raise died(error) from error
        if not out_of_memory(error):
            raise error
        self._abort()
        if len(documents) == 1:
            raise ConfigError(f"out of memory with {len(documents[0])} tokens: {MEMORY_ADVICE}") from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        # A call of more than one step has the memory peak of a full step.
        self.call_tokens = min(sum(map(len, documents)), self.step_tokens) // 2
        logger.warning("out of memory: retrying with %d tokens a call", self.call_tokens)

    def _abort(self) -> None:
        """Empty the engine."""
        engine = self.llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        self.llm.collective_rpc("ddk_drop")
        self._held.clear()
        self._tokens = 0

    def _public(self, documents: Sequence[np.ndarray], target: Target | None) -> Answers:
        """Answer documents through vLLM's prompt_logprobs; the last label is the token that it generates."""
        from vllm import SamplingParams

        width = target.width if target else 0
        params = ONE_TOKEN | {"prompt_logprobs": width, "logprobs": width, "flat_logprobs": True}
        outputs: list[Any] = self.llm.generate(
            [prompt(document) for document in documents],
            [SamplingParams(**params, allowed_token_ids=[int(document[-1])]) for document in documents],
            use_tqdm=False,
        )
        # A document's first token has no logprobs; all others, and the generated token, have the label's,
        # then the best.
        flat = [part for output in outputs for part in (output.prompt_logprobs, output.outputs[0].logprobs)]
        ids = np.concatenate([np.array(part.token_ids, np.int32) for part in flat])
        logprobs = np.concatenate([np.array(part.logprobs, np.float32) for part in flat])
        return from_public(ids.reshape(-1, width + 1), logprobs.reshape(-1, width + 1), target)

    def _problem(self, noise: float, max_length: int) -> str | None:
        """Compare the fast path with the public path; return why it cannot be used, or None.

        Both read short documents of random tokens. The fast path reads them behind others that fill a step,
        so that the last document is cut and all of a step's memory is in use.
        """
        probe, fill = self._probe(max_length)
        top = Target(top_k=min(PROBE_TOP_K, self.vocab_size))
        public = self._public(probe, top)
        draws = None
        try:
            self.llm.collective_rpc("ddk_install")
            fast = self._answer_at_once(Asked([*fill, *probe], None, top))()
            if self.target.kind == "sampled" and self.target.temperature == 1.0:
                offsets = [np.random.default_rng(0).random(len(document) - 1) for document in probe]
                draws = self._answer_at_once(Asked(probe, offsets, self.target))()
        except Exception as error:  # any type: a vLLM that differs from the tested versions
            if out_of_memory(error):
                raise
            self._abort()
            return f"the fast path fails with vLLM {self.engine_version} ({brief(error)})"
        where = f"the fast path and vLLM {self.engine_version}'s prompt_logprobs differ by"
        mean, largest = difference(fast[-len(public) :], public)
        if not (mean < noise and largest < LARGEST):
            return f"{where} {mean:.2g} nats on average, {largest:.2g} at most"
        if (
            draws is not None
            and not (share := draw_difference(draws, public)) < 1 / self.target.samples + noise
        ):
            return f"{where} {share:.2g} of a position's draws"
        return None

    def _probe(self, max_length: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return short documents, and longer ones that fill a step up to the middle of the last short one."""
        short = [min(max_length, length) for length in (2, 17, 40)]
        # vLLM reads a document without its last token.
        room = max(0, self.step_tokens - sum(length - 1 for length in short[:-1]) - short[-1] // 2)
        count, rest = divmod(room, max_length - 1)
        fill = ([rest + 1] * (rest > 0) + [max_length] * count)[: self.step_documents]
        generator = np.random.default_rng(0)
        documents = [generator.integers(0, self.vocab_size, length, np.int32) for length in [*short, *fill]]
        return documents[: len(short)], documents[len(short) :]


def prompt(document: np.ndarray) -> dict[str, list[int]]:
    """Return what vLLM reads of a document: all but its last token, whose answer is not needed."""
    return {"prompt_token_ids": document[:-1].tolist()}


def from_public(ids: np.ndarray, logprobs: np.ndarray, target: Target | None) -> Answers:
    """Convert vLLM's columns [N, 1 + E], the label and then the best; the tail is the rest of 1.

    Log-probabilities are float32, so a tail below about 1e-6 is rounding.
    """
    label = logprobs[:, 0]
    ids, logprobs = ids[:, 1:], logprobs[:, 1:]
    mass = np.exp(logprobs.astype(np.float64))
    if target is not None and target.top_p < 1:
        outside = mass.cumsum(-1) - mass >= target.top_p
        ids, logprobs = np.where(outside, -1, ids), np.where(outside, -np.inf, logprobs)
        mass = np.where(outside, 0, mass)
    rest = (1 - mass.sum(-1)).clip(0)
    has_tail = (rest > 0) & (target is not None)
    tail = np.log(rest, out=np.full_like(rest, -np.inf), where=has_tail)
    return Answers(ids, logprobs.astype(np.float32), tail.astype(np.float32), label)


def died(error: Exception) -> ConfigError | EngineDiedError:
    """Return the error, in one line, of an engine whose processes cannot continue after it."""
    if out_of_memory(error):
        return ConfigError(f"teacher: out of memory in vLLM's processes: {MEMORY_ADVICE}")
    return EngineDiedError(
        f"teacher: vLLM's processes failed: {brief(error)}; vLLM's own lines above have the cause, and the "
        "finished shards stay: run the build again"
    )


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


def load(config: TeacherConfig, target: Target, max_length: int) -> VllmTeacher:
    """Start vLLM; ``engine_args`` go to ``vllm.LLM``, such as tensor_parallel_size or hf_overrides."""
    prepare_environment()
    arguments = engine_arguments(config, target, max_length)
    import vllm

    try:
        return VllmTeacher(vllm.LLM(**arguments), config, target, max_length)
    except ConfigError:
        raise
    except Exception as error:  # any type: vLLM passes on the errors of its parts
        if out_of_memory(error):
            raise ConfigError(f"teacher: out of memory while vLLM started: {MEMORY_ADVICE}") from error
        raise ConfigError(
            f"teacher: vLLM cannot run {model_config(config).model_type}: {brief(error)}; "
            "use teacher.engine: transformers, or see vLLM's log with VLLM_LOGGING_LEVEL=INFO"
        ) from error
