"""Identify a teacher in the manifest by everything that decides its numbers."""

from pathlib import Path

from ddk_build.config import TeacherConfig
from ddk_build.teacher.model import full_config
from ddk_cache.format.layout import TeacherInfo
from ddk_cache.util.model_folder import model_digest
from ddk_cache.util.packages import package_version

# Engine arguments that affect speed, device and memory. Another value gives the same teacher, up to the order
# of sums, which batching changes too. All other arguments count as changing the numbers: quantization,
# hf_overrides, max_model_len (long RoPE), backends, cache dtypes, load formats.
# fmt: off
SPEED = frozenset(
    {
        "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "block_size",
        "cpu_offload_gb", "swap_space", "max_logprobs",
        "max_num_batched_tokens", "max_num_scheduled_tokens", "max_num_seqs", "max_num_partial_prefills",
        "enable_chunked_prefill", "long_prefill_token_threshold", "scheduling_policy", "async_scheduling",
        "watermark",
        "enforce_eager", "cudagraph_capture_sizes", "max_cudagraph_capture_size", "optimization_level",
        "performance_mode", "enable_flashinfer_autotune",
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "data_parallel_backend",
        "enable_expert_parallel", "distributed_executor_backend", "disable_custom_all_reduce",
        "distributed_timeout_seconds", "device_ids", "numa_bind",
        "max_parallel_loading_workers", "safetensors_load_strategy", "safetensors_prefetch_num_threads",
        "safetensors_prefetch_block_size", "download_dir", "use_tqdm_on_load",
        "device_map", "max_memory", "offload_folder", "offload_state_dict", "low_cpu_mem_usage",
        "disable_log_stats", "log_level", "enable_sleep_mode", "seed",
    }
)
# fmt: on
SECRET = frozenset({"hf_token", "token", "use_auth_token"})


def teacher_info(config: TeacherConfig) -> TeacherInfo:
    """Return the manifest's description of a teacher.

    Raises ConfigError if the model does not exist.
    """
    engine_args = {
        key: value
        for key, value in config.engine_args.items()
        if key not in SPEED | SECRET and value is not None
    }
    if config.head_dtype != "auto":
        engine_args["head_dtype"] = config.head_dtype
    return TeacherInfo(
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        engine=config.engine,
        engine_version=package_version(config.engine, f"{config.engine}-cpu"),
        weights=weights(config),
        engine_args=engine_args,
    )


def weights(config: TeacherConfig) -> str | None:
    """Return "commit:<sha>" of a hub id, "sha256:<digest>" of a folder, or None if the commit is unknown."""
    folder = Path(config.model)
    if not folder.is_dir():
        commit = getattr(full_config(config), "_commit_hash", None)
        return commit and f"commit:{commit}"
    return f"sha256:{model_digest(folder, code=config.trust_remote_code)}"
