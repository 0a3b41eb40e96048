"""What vLLM is started with: its arguments, and what it reads from the process that it runs in."""

import difflib
import logging
import os
import sys
from dataclasses import fields
from inspect import signature
from typing import Any

import torch

from ddk_build import capture
from ddk_build.config import TeacherConfig
from ddk_build.model import brief
from ddk_cache.errors import ConfigError
from ddk_cache.layout import Target

logger = logging.getLogger(__name__)

# The public path is compared with the fast one on entries of this many.
PROBE = Target(kind="topk", top_k=16)


def engine_arguments(config: TeacherConfig, target: Target, max_length: int) -> dict[str, Any]:
    """What vllm.LLM gets: safe defaults, then the user's ``engine_args``.

    The memory of prompt logprobs is not in vLLM's profiling: leave room for it, and do not let the
    steps grow with the device.
    """
    if config.engine_args.get("enable_prefix_caching"):
        raise ConfigError(
            "teacher.engine_args.enable_prefix_caching: must stay false; cached positions have no logits"
        )
    defaults = {
        # Not one more than rows need: where it passes the model's original length, vLLM takes the factors for
        # long texts in long RoPE (Phi-3) for all positions of all documents.
        "max_model_len": max_length,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.85,
        "max_logprobs": max(target.width, PROBE.width),
        "enable_prefix_caching": False,
        "use_tqdm_on_load": sys.stderr.isatty(),
        "worker_extension_cls": f"{capture.__name__}.{capture.WorkerExtension.__name__}",
    }
    fixed = {
        "model": config.model,
        "revision": config.revision,
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
    }
    arguments = defaults | config.engine_args | fixed
    if not torch.cuda.is_available() and not torch.cpu._is_avx512_bf16_supported():
        # Such a CPU multiplies by the head five times faster in float32, and gives finer logits.
        head = {"head_dtype": "float32"}
        arguments["hf_overrides"] = head | config.engine_args.get("hf_overrides", {})
    return arguments


def check_arguments(config: TeacherConfig, max_length: int) -> None:
    """Raise ConfigError where ``engine_args`` has what vLLM does not know, or a wrong value.

    vLLM makes its whole configuration of them, which looks at the model's and at the device, and finds who
    loads the weights.
    """
    arguments = engine_arguments(config, Target(), max_length)
    prepare_environment()
    import vllm
    from vllm.model_executor.model_loader import get_model_loader

    in_configuration = {field.name for field in fields(vllm.EngineArgs)}
    known = in_configuration | signature(vllm.LLM).parameters.keys()
    for key in config.engine_args:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"teacher.engine_args.{key}: vLLM {vllm.__version__} has no such argument{hint}"
            )
    length = config.engine_args.get("max_model_len", max_length)
    if not isinstance(length, int) or length < max_length:
        raise ConfigError(f"teacher.engine_args.max_model_len: {length} is less than seq_length {max_length}")
    try:
        found = vllm.EngineArgs(
            **{key: value for key, value in arguments.items() if key in in_configuration}
        ).create_engine_config()
        get_model_loader(found.load_config)
    except Exception as error:  # of any type: vLLM hands on what its parts raise
        said, _, supported = brief(error).partition(" Supported architectures:")  # a list of hundreds
        what = "model: vLLM refuses it" if supported else "engine_args: vLLM refuses them"
        raise ConfigError(
            f"teacher.{what}: {said}; teacher.engine: transformers does without vLLM"
        ) from error


class _Told(logging.Handler):
    """Hands on, in one line, what vLLM warns of: once for each place in its code, not for each weight."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: set[tuple[str, int]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        place = record.pathname, record.lineno
        if place not in self.told:
            self.told.add(place)
            logger.warning("vLLM: %s", " ".join(record.getMessage().split()))


TOLD = _Told()
# Where vLLM warns of what may change the numbers: long RoPE, windows. What it says elsewhere is about
# the machine. Workers of their own (tensor_parallel_size) keep theirs to themselves.
ABOUT_THE_MODEL = ("vllm.model_executor.layers", "vllm.config.model", "vllm.transformers_utils")


def prepare_environment() -> None:
    """What vLLM and torch read once, when they are imported or first used.

    ``VLLM_LOGGING_LEVEL`` as somebody set it decides what vLLM itself prints; else nothing but errors, and
    its warnings about the model come through ours.
    """
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level)  # vLLM itself sets it after its first warnings
    if level == "ERROR":
        for name in ABOUT_THE_MODEL:
            logging.getLogger(name).setLevel(logging.WARNING)
            logging.getLogger(name).addHandler(TOLD)
    # In this process, the engine's memory errors can be survived.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if not torch.cuda.is_available():
        # A step's tokens and those waiting; all of it is touched. Without it vLLM takes all memory.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        # Torch reads it once, at its first tensor. A step's logits are new memory, of small pages slower
        # to get than to fill.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
