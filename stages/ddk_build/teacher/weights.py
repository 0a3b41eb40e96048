"""Check that a teacher's weight files have all weights of its architecture."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

from ddk_build.config import TeacherConfig
from ddk_build.teacher.model import full_config
from ddk_cache.errors import ConfigError, brief, counted

# Arguments of from_pretrained that need the weights themselves, or a device.
HEAVY = ("device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config")
PICKLED = ("pt", "npcache")  # vLLM's load formats that execute code in the files


def check_weights(config: TeacherConfig) -> None:
    """Compare names and shapes in the weight files with the architecture, without reading the weights.

    Both engines initialise missing weights at random without a warning. Takes seconds and little memory;
    downloads a model that is not on this machine yet.

    Raises ConfigError if no safetensors files exist, one is truncated or not in that format, or a weight is
    missing or has another shape.
    """
    load_format = config.engine_args.get("load_format", "auto")
    if load_format in PICKLED:
        raise ConfigError(
            f"teacher.engine_args.load_format: {load_format} executes code in the files; use safetensors"
        )
    if load_format == "dummy":  # random weights on purpose
        return
    architecture = full_config(config)
    quantized = getattr(architecture, "quantization_config", None) is not None
    if quantized:  # compare with the plain weights; quantised weights have their modules' names
        del architecture.quantization_config
    report = _load_on_meta(config, architecture)
    missing = report["missing_keys"]
    if quantized:
        modules = {name.rpartition(".")[0] for name in report["unexpected_keys"]}
        missing = {name for name in missing if name.rpartition(".")[0] not in modules}
    if missing:
        raise ConfigError(
            f"teacher.model: {config.model} lacks {counted(len(missing), 'weight')}, such as {min(missing)}"
        )
    if report["mismatched_keys"] and not quantized:
        name, stored, expected = min(report["mismatched_keys"])
        raise ConfigError(
            f"teacher.model: {config.model}: {name} has shape {list(stored)}; config.json requires "
            f"{list(expected)}"
        )


def _load_on_meta(config: TeacherConfig, architecture: Any) -> dict[str, Any]:
    """Return what transformers reports of the weight files: missing, unexpected and mismatched keys."""
    arguments = {}
    if config.engine == "transformers":
        arguments = {key: value for key, value in config.engine_args.items() if key not in HEAVY}
    import torch
    from safetensors import SafetensorError

    try:
        from transformers import AutoModelForCausalLM

        with _without_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                config.model,
                config=architecture,
                revision=config.revision,
                dtype=torch.bfloat16,
                device_map="meta",
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **arguments,
            )
    except TypeError as error:
        raise ConfigError(f"teacher.engine_args: transformers rejects them: {brief(error)}") from error
    except SafetensorError as error:
        raise ConfigError(f"teacher.model: {_damaged(config.model) or config.model}: {error}") from error
    except Exception as error:  # any type, as in full_config
        raise ConfigError(f"teacher.model: {config.model}: {brief(error)}") from error
    _, report = loaded
    return dict(report)


def _damaged(model: str) -> Path | None:
    """Return the first weight file of a folder that does not open."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(Path(model).glob("*.safetensors")):
        try:
            with safe_open(path, framework="np"):
                pass
        except SafetensorError:
            return path
    return None


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from printing its table of missing weights, which an error of one line replaces."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
