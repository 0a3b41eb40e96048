"""The vLLM engine: the fast path, and the public path where the fast one fails its check."""

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ddk_build.config import TeacherConfig
from ddk_build.teacher import vllm_check
from ddk_build.teacher.capture import out_of_memory
from ddk_build.teacher.engines import NOISE, Answers, EngineDiedError, Teacher
from ddk_build.teacher.hooked_engine import HookedEngine, Submission
from ddk_build.teacher.model import model_config
from ddk_build.teacher.vllm_arguments import check_arguments as check_arguments
from ddk_build.teacher.vllm_arguments import engine_arguments, prepare_environment
from ddk_cache.errors import CacheError, ConfigError, brief
from ddk_cache.format.layout import Target

logger = logging.getLogger(__name__)

MEMORY_ADVICE = (
    "lower teacher.engine_args.max_num_batched_tokens or teacher.engine_args.gpu_memory_utilization"
)


class VllmTeacher(Teacher):
    """Answers with vLLM; ``fast`` tells whether the fast path does."""

    def __init__(self, llm: Any, config: TeacherConfig, target: Target, max_length: int) -> None:
        self.engine = HookedEngine(llm, max_length)
        self.vocab_size = self.engine.vocab_size
        self.target = target
        self._submissions: deque[Submission] = deque()  # whose answers are not returned
        self._part_tokens = math.inf  # asked at once; halved when memory runs out
        problem = vllm_check.problem(self.engine, target, NOISE[config.dtype], max_length)
        self.fast = problem is None
        if problem is None:
            return
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

        self.engine.llm.llm_engine.engine_core.shutdown()
        del self.engine
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
        submission = Submission(documents, None if target is None else offsets, target)
        self._submissions.append(submission)
        in_parts = not documents or self._part_tokens < math.inf
        answer = self._answer_in_parts if in_parts else self._ask
        return self._ready_after(lambda: answer(submission))

    def drain(self) -> list[Callable[[], Answers]]:
        """Answer all documents; see :meth:`ddk_build.teacher.engines.Teacher.drain`."""
        return self._ready_after(self.engine.finish)

    def _ready_after(self, work: Callable[[], None]) -> list[Callable[[], Answers]]:
        """Work with the engine; return the answers to the first submissions, as far as they are there."""
        try:
            self._work(work)
        except BaseException:
            self._submissions.clear()  # none of them will be answered
            raise
        ready = []
        while self._submissions and (answers := self._submissions[0].answers) is not None:
            ready.append(answers)
            self._submissions.popleft()
        return ready

    def _work(self, work: Callable[[], None]) -> None:
        """Work; where memory runs out, answer what has no answers yet in smaller parts."""
        try:
            work()
        except (ConfigError, CacheError):
            raise
        except Exception as error:  # any type: vLLM passes on the errors of its parts
            unanswered = [submission for submission in self._submissions if submission.answers is None]
            self._ask_for_less([document for part in unanswered for document in part.documents], error)
            for submission in unanswered:
                self._answer_in_parts(submission)

    def _ask(self, submission: Submission) -> None:
        if self.fast:
            self.engine.ask(submission)
        else:
            answers = self.engine.public_answers(submission.documents, submission.target)
            submission.answers = lambda: answers

    def _answer_in_parts(self, submission: Submission) -> None:
        """Answer documents in parts of at most ``_part_tokens``, one at a time."""
        parts: list[Callable[[], Answers]] = [lambda: Answers.empty(submission.width)]
        start = 0
        while start < len(submission.documents):
            ends = np.cumsum([len(document) for document in submission.documents[start:]])
            count = max(1, int(np.searchsorted(ends, self._part_tokens, side="right")))
            part = submission.part(start, start + count)
            try:
                self._ask(part)
                self.engine.finish()
            except Exception as error:  # any type, as above
                self._ask_for_less(part.documents, error)
                continue
            assert part.answers is not None
            parts.append(part.answers)
            start += count
        submission.answers = lambda: Answers.concatenate([part() for part in parts])

    def _ask_for_less(self, documents: Sequence[np.ndarray], error: Exception) -> None:
        """Halve the tokens that are asked at once if ``error`` is memory that ran out with ``documents``.

        Raises any other error, one after which the engine cannot go on, and ConfigError for one document.
        """
        if not self.engine.is_one_process:
            raise died(error) from error
        self.engine.abort()
        if not out_of_memory(error):
            raise error
        if len(documents) == 1:
            raise ConfigError(f"out of memory with {len(documents[0])} tokens: {MEMORY_ADVICE}") from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        # A call of more than one step has the memory peak of a full step.
        self._part_tokens = min(sum(map(len, documents)), self.engine.step_tokens) // 2
        logger.warning("out of memory: retrying with %d tokens a call", self._part_tokens)


def died(error: Exception) -> ConfigError | EngineDiedError:
    """Return the error, in one line, of an engine whose processes cannot continue after it."""
    if out_of_memory(error):
        return ConfigError(f"teacher: out of memory in vLLM's processes: {MEMORY_ADVICE}")
    return EngineDiedError(
        f"teacher: vLLM's processes failed: {brief(error)}; vLLM's own lines above have the cause, and the "
        "finished shards stay: run the build again"
    )


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
