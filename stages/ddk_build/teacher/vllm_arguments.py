"""Arguments of vLLM, and the environment variables and loggers that it reads from its process."""

import difflib
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from glob import glob
from inspect import signature
from typing import Any

import torch

from ddk_build.config import ModelConfig, TeacherConfig
from ddk_build.teacher import capture
from ddk_cache.errors import ConfigError, brief
from ddk_cache.format.layout import Target

logger = logging.getLogger(__name__)

PROBE_TOP_K = 16  # entries of the check in vllm_check
# Arguments with one valid value: with any other, positions lack the model's log-probabilities.
REQUIRED = {
    "enable_prefix_caching": (False, "false; cached positions have no logits"),
    "kv_sharing_fast_prefill": (
        False,
        "false; it skips layers at prompt positions, so their logits are wrong",
    ),
    "logprobs_mode": ("raw_logprobs", "raw_logprobs; the other modes are not the model's log-probabilities"),
}


def engine_arguments(config: TeacherConfig, target: Target, max_length: int) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM``: safe defaults, overridden by the user's ``engine_args``.

    vLLM's profiling does not include the memory of prompt logprobs. So the defaults leave room for it and
    keep the steps from growing with the device.
    """
    for key, (required, reason) in REQUIRED.items():
        if config.engine_args.get(key, required) != required:
            raise ConfigError(f"teacher.engine_args.{key}: must be {reason}")
    defaults = {
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.85,
        "max_logprobs": max(target.width, PROBE_TOP_K),
        "enable_prefix_caching": False,
        "worker_extension_cls": f"{capture.__name__}.{capture.WorkerExtension.__name__}",
    }
    return model_arguments(config, max_length, defaults)


def model_arguments(config: ModelConfig, max_length: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``defaults``, overridden by the user's ``engine_args``, with what loads the model."""
    common = {
        # No more than rows need: above the model's original length, vLLM applies the long factors of long
        # RoPE (Phi-3) at all positions of all documents.
        "max_model_len": max_length,
        "use_tqdm_on_load": sys.stderr.isatty(),
    }
    fixed = {
        "model": config.model,
        "revision": config.revision,
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
    }
    arguments = {**common, **defaults, **config.engine_args, **fixed}
    head = config.head_dtype
    if head == "auto" and not torch.cuda.is_available() and not torch.cpu._is_avx512_bf16_supported():
        head = "float32"  # such a CPU multiplies five times faster, with finer logits
    if head != "auto":
        arguments["hf_overrides"] = {**config.hf_overrides, "head_dtype": head}
    return arguments


def check_arguments(config: TeacherConfig, max_length: int) -> None:
    """Raise ConfigError if vLLM does not accept ``engine_args``."""
    prepare_environment()
    arguments = engine_arguments(config, Target(), max_length)
    length = arguments["max_model_len"]
    if not isinstance(length, int) or length < max_length:
        raise ConfigError(f"teacher.engine_args.max_model_len: {length} is less than seq_length {max_length}")
    check_accepted(config, arguments, "teacher.", "; teacher.engine: transformers does without vLLM")


def check_accepted(config: ModelConfig, arguments: Mapping[str, Any], prefix: str, remedy: str) -> None:
    """Raise ConfigError if vLLM does not accept these arguments, ``engine_args`` among them.

    vLLM builds its whole configuration, which examines the model and the device, and selects its loader.
    ``prefix`` and ``remedy`` are the beginning and the end of the message.
    """
    import vllm
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.platforms import current_platform

    if current_platform.is_unspecified():
        raise ConfigError(
            f"{prefix}engine: vLLM {vllm.__version__} is built for GPUs and finds none on this machine: "
            f"check nvidia-smi, or install 'ddk-cache[build-cpu]' in another environment{remedy}"
        )
    fields_of_engine = {field.name for field in fields(vllm.EngineArgs)}
    accepted = fields_of_engine | signature(vllm.LLM).parameters.keys()
    for key in config.engine_args:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{prefix}engine_args.{key}: vLLM {vllm.__version__} has no such argument{hint}"
            )
    try:
        engine_config = vllm.EngineArgs(
            **{key: value for key, value in arguments.items() if key in fields_of_engine}
        ).create_engine_config()
        get_model_loader(engine_config.load_config)
    except Exception as error:  # any type: vLLM passes on the errors of its parts
        reason, _, supported = brief(error).partition(" Supported architectures:")  # a list of hundreds
        what = "model: vLLM refuses it" if supported else "engine_args: vLLM refuses them"
        raise ConfigError(f"{prefix}{what}: {reason}{remedy}") from error
    if current_platform.is_cpu():  # with GPUs, vLLM has compared them with its processes
        _check_nodes(prefix, engine_config.parallel_config.world_size)


def _check_nodes(prefix: str, processes: int) -> None:
    """Raise ConfigError where vLLM would start more processes than it has groups of cores: memory nodes."""
    groups = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto").split("|")
    count = len(groups) if groups != ["auto"] else max(1, len(glob("/sys/devices/system/node/node[0-9]*")))
    if processes > count:
        raise ConfigError(
            f"{prefix}engine_args: tensor and pipeline parallel sizes ask for {processes} GPUs, and this "
            f"machine has none; its memory nodes allow {count}: leave them out"
        )


class _Forward(logging.Handler):
    """Log vLLM's warnings in one line, once for each line of its code and not for each weight."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: set[tuple[str, int]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        source = record.pathname, record.lineno
        if source not in self.seen:
            self.seen.add(source)
            logger.warning("vLLM: %s", " ".join(record.getMessage().split()))


FORWARD = _Forward()
# Loggers of warnings about what may change the numbers: long RoPE, windows. Others are about the machine.
# Warnings in worker processes (tensor_parallel_size) are not forwarded.
ABOUT_THE_MODEL = ("vllm.model_executor.layers", "vllm.config.model", "vllm.transformers_utils")


def prepare_environment() -> None:
    """Set what vLLM and torch read once; call it before anything asks for CUDA.

    vLLM prints errors only, unless ``VLLM_LOGGING_LEVEL`` is set; its warnings about the model are logged
    by this module's logger.
    """
    # With NVML, torch.cuda.is_available leaves CUDA uninitialised; spawned workers do not inherit CUDA where
    # the teacher's check has run on the GPU.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level)  # vLLM itself sets it after its first warnings
    if level == "ERROR":
        for name in ABOUT_THE_MODEL:
            logging.getLogger(name).setLevel(logging.WARNING)
            logging.getLogger(name).addHandler(FORWARD)
    # With the engine in this process, the build survives its memory errors.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if not torch.cuda.is_available():
        # GiB, all touched, for the tokens of a step and those waiting; by default vLLM takes all memory.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        # Torch reads it once, at its first tensor. A step's logits are new memory: with small pages, it takes
        # longer to allocate than to fill.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
