"""Complete prompts with vLLM."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from ddk_build.generate.config import GenerateConfig
from ddk_build.generate.engine import Completion, Request
from ddk_build.teacher.capture import out_of_memory
from ddk_build.teacher.vllm_arguments import check_accepted, model_arguments, prepare_environment
from ddk_cache.errors import CacheError, ConfigError, brief

MEMORY_ADVICE = "lower engine_args.gpu_memory_utilization or engine_args.max_num_seqs"
WAITING = 2  # requests in the engine for each that it can run at once, so that none of its places stays empty


class VllmEngine:
    """A :class:`ddk_build.generate.engine.Engine` in this process.

    Parameters
    ----------
    max_length
        Tokens of the longest prompt with its completion.
    added_tokens
        The tokenizer's special tokens by text. A stop text that is one of them is given to vLLM by its id:
        special tokens are not in the text that it compares.

    Raises
    ------
    ConfigError
        vLLM cannot load or run the model.
    """

    def __init__(self, config: GenerateConfig, max_length: int, added_tokens: Mapping[str, int]) -> None:
        prepare_environment()
        arguments = engine_arguments(config, max_length)
        import vllm
        from vllm.sampling_params import RequestOutputKind

        try:
            self._engine = vllm.LLM(**arguments).llm_engine
        except Exception as error:  # any type: vLLM passes on the errors of its parts
            if out_of_memory(error):
                raise ConfigError(f"model: out of memory while vLLM started: {MEMORY_ADVICE}") from error
            raise ConfigError(
                f"model: vLLM cannot run {config.model}: {brief(error)}; see vLLM's log with "
                "VLLM_LOGGING_LEVEL=INFO"
            ) from error
        stop = config.sampling.stop
        self._params: dict[str, Any] = config.sampling.model_dump(exclude={"stop", "samples"}) | {
            "stop": [text for text in stop if text not in added_tokens],
            "stop_token_ids": [added_tokens[text] for text in stop if text in added_tokens],
            "logprobs": 0,  # of the token that was chosen
            "flat_logprobs": True,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        self.most: int = WAITING * self._engine.vllm_config.scheduler_config.max_num_seqs
        """Requests to hold."""
        self._held: dict[str, Request] = {}
        self._count = 0

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        """Yield completions as they end; see :meth:`ddk_build.generate.engine.Engine.complete`."""
        remaining = iter(requests)
        while ended := self.advance(list(islice(remaining, self.most - len(self._held)))):
            yield from ended

    def advance(self, requests: Sequence[Request], seconds: float = 0.0) -> list[tuple[Request, Completion]]:
        """Take requests, and work for so many seconds, or until a completion has ended.

        Returns the completions that have ended; none if the engine holds no requests.
        """
        from vllm import SamplingParams

        for request in requests:
            params = SamplingParams(**self._params, seed=request.seed)
            self._engine.add_request(str(self._count), {"prompt_token_ids": request.prompt.tokens}, params)
            self._held[str(self._count)] = request
            self._count += 1
        ended: list[tuple[Request, Completion]] = []
        stop = time.monotonic() + seconds
        while self._held and not (ended and time.monotonic() >= stop):
            ended += [
                (self._held.pop(output.request_id), completion(output.outputs[0]))
                for output in self._step()
                if output.finished
            ]
        return ended

    def _step(self) -> list[Any]:
        """Run one step of the engine; return the requests that ended in it."""
        try:
            return list(self._engine.step())
        except Exception as error:  # any type: vLLM passes on the errors of its processes
            advice = MEMORY_ADVICE if out_of_memory(error) else "vLLM's own lines above have the cause"
            raise CacheError(
                f"vLLM failed while it wrote: {brief(error)}; {advice}; the files that are done stay"
            ) from error


def completion(output: Any) -> Completion:
    """Return vLLM's ``CompletionOutput``, with one log-probability a token."""
    tokens, logprobs = list(output.token_ids), output.logprobs
    assert logprobs.token_ids == tokens
    return Completion(tokens, list(logprobs.logprobs), output.finish_reason, output.text)


def engine_arguments(config: GenerateConfig, max_length: int) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM``."""
    if config.engine_args.get("logprobs_mode", "raw_logprobs") != "raw_logprobs":
        raise ConfigError(
            "engine_args.logprobs_mode: must be raw_logprobs; the other modes are not the model's "
            "log-probabilities"
        )
    from vllm.platforms import current_platform

    # Where a step cuts a prompt, vLLM 0.32 takes back the prompt's random numbers, which fails on a CPU:
    # "CPU Generator does not use offset".
    return model_arguments(
        config, max_length, {"enable_chunked_prefill": False} if current_platform.is_cpu() else {}
    )


def check_arguments(config: GenerateConfig, max_length: int) -> None:
    """Raise ConfigError if vLLM does not accept ``engine_args``."""
    prepare_environment()
    check_accepted(config, engine_arguments(config, max_length), "", "")
