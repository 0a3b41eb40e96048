"""vLLM's engine, and the two ways to answers from it: the hook in its workers, and prompt_logprobs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from ddk_build.teacher import capture
from ddk_build.teacher.engines import Answers
from ddk_cache.format.layout import Target

# The fewest tokens that vLLM generates; the token is dropped.
ONE_TOKEN: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}


@dataclass(eq=False)
class Submission:
    """A call of ``submit``: its documents, and their answers once they are there."""

    documents: Sequence[np.ndarray]
    offsets: Sequence[np.ndarray] | None
    target: Target | None
    number: int = -1
    """What the workers know it by."""
    unread: int = 0
    """Documents that the engine has not finished."""
    answers: Callable[[], Answers] | None = None

    @property
    def width(self) -> int:
        """The entries of a position."""
        return self.target.width if self.target else 0

    def part(self, start: int, stop: int) -> "Submission":
        """Return one of some of the documents."""
        offsets = None if self.offsets is None else self.offsets[start:stop]
        return Submission(self.documents[start:stop], offsets, self.target)

    def as_call(self) -> capture.Call:
        """Return what the workers get."""
        return capture.Call(
            np.concatenate(self.documents).astype(np.int32).tobytes(),
            np.array([len(document) for document in self.documents], np.int64).tobytes(),
            None if self.offsets is None else np.concatenate(self.offsets).astype(np.float64).tobytes(),
            None if self.target is None else self.target.model_dump(),
        )


class HookedEngine:
    """vLLM's engine, which answers by the hook once it is installed, or by its public prompt_logprobs.

    The hooked engine is asked ahead: it holds documents of several submissions, and its steps run only while
    it holds those of the next one. So a step may run the end of a submission and the beginning of another.
    """

    def __init__(self, llm: Any, max_length: int) -> None:
        import vllm

        self.llm = llm
        self.version = str(vllm.__version__)
        config = llm.llm_engine.vllm_config
        self.vocab_size = int(config.model_config.hf_text_config.vocab_size)
        scheduler, parallel = config.scheduler_config, config.parallel_config
        self.step_tokens, self.step_documents = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        # Where vLLM has more processes than this one, out of memory in one of them stops the others.
        self.is_one_process = parallel.world_size == 1 and not vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING
        # The steps under way, the next one, and the document that it cuts.
        self._tokens_ahead = (parallel.pipeline_parallel_size + 1) * self.step_tokens + max_length
        self._documents: dict[str, tuple[Submission, int]] = {}  # in the engine, with their lengths
        self._tokens = 0  # of these documents
        self._numbers = count()
        self._is_hooked = False

    def install(self) -> None:
        """Install the hook; see :meth:`ddk_build.teacher.capture.WorkerExtension.ddk_install`."""
        self.llm.collective_rpc("ddk_install")
        self._is_hooked = True

    def ask(self, submission: Submission) -> None:
        """Hand documents, at least one, to the engine; run steps as long as it holds enough of them."""
        from vllm import SamplingParams

        submission.number, submission.unread = next(self._numbers), len(submission.documents)
        self.llm.collective_rpc("ddk_begin", args=(submission.number, *submission.as_call()))
        for index, document in enumerate(submission.documents):
            request = f"{submission.number}/{index}"
            params = SamplingParams(**ONE_TOKEN, extra_args={capture.DOCUMENT: [submission.number, index]})
            self.llm.llm_engine.add_request(request, prompt(document), params)
            self._documents[request] = submission, len(document)
            self._tokens += len(document)
            while self._tokens >= self._tokens_ahead:
                self._step()

    def finish(self) -> None:
        """Run steps until the engine holds no documents."""
        while self.llm.llm_engine.has_unfinished_requests():
            self._step()

    def answer(self, submission: Submission) -> Answers:
        """Ask for documents alone, and wait for their answers."""
        self.ask(submission)
        self.finish()
        assert submission.answers is not None
        return submission.answers()

    def abort(self) -> None:
        """Empty the engine."""
        engine = self.llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        if self._is_hooked:
            self.llm.collective_rpc("ddk_drop")
        self._documents.clear()
        self._tokens = 0

    def _step(self) -> None:
        """Run one step of the engine; take the answers that end with it."""
        for output in self.llm.llm_engine.step():
            submission, tokens = self._documents.pop(output.request_id)
            self._tokens -= tokens
            submission.unread -= 1
            if not submission.unread:
                submission.answers = self._taken(submission)

    def _taken(self, submission: Submission) -> Callable[[], Answers]:
        arguments = submission.number, self.is_one_process
        by_worker = self.llm.collective_rpc("ddk_take", args=arguments)
        answers = next((answers for answers in by_worker if answers is not None), None)
        if answers is None:
            raise RuntimeError("vLLM did not call the hook")

        def wait() -> Answers:
            memory = answers.wait() if self.is_one_process else np.frombuffer(answers, np.int32)
            return Answers.from_memory(memory, submission.width)

        return wait

    def public_answers(self, documents: Sequence[np.ndarray], target: Target | None) -> Answers:
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
