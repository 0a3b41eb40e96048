"""Whether a teacher's weight files have all that its architecture needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

from ddk_build.config import TeacherConfig
from ddk_build.model import brief, full_config
from ddk_cache.errors import ConfigError

# Arguments of from_pretrained that need the weights themselves, or a device.
HEAVY = ("device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config")
PICKLED = ("pt", "npcache")  # vLLM's load formats that execute what the files say


def check_weights(config: TeacherConfig) -> None:
    """Open the weight files without reading the weights, and compare them with what the architecture has.

    Both engines would make up what is missing, without a word. Takes seconds and no memory to speak of; a
    model that is not on this machine yet is downloaded.

    Raises
    ------
    ConfigError
        There are no safetensors files, one is cut off or none of the kind, or a weight is missing or of
        another shape.
    """
    load_format = config.engine_args.get("load_format", "auto")
    if load_format in PICKLED:
        raise ConfigError(
            f"teacher.engine_args.load_format: {load_format} executes what the files say; use safetensors"
        )
    if load_format == "dummy":  # random weights on purpose
        return
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    shape = full_config(config)
    arguments = {}
    if config.engine == "transformers":
        arguments = {key: value for key, value in config.engine_args.items() if key not in HEAVY}
    quantized = getattr(shape, "quantization_config", None) is not None
    if quantized:  # the architecture's plain weights; the quantised ones stand under their modules' names
        del shape.quantization_config
    try:
        with _without_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                config.model,
                config=shape,
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
        raise ConfigError(f"teacher.engine_args: transformers does not take them: {brief(error)}") from error
    except SafetensorError as error:
        raise ConfigError(f"teacher.model: {_damaged(config.model) or config.model}: {error}") from error
    except Exception as error:  # of any type, as in full_config
        raise ConfigError(f"teacher.model: {config.model}: {brief(error)}") from error
    _, report = loaded
    missing = report["missing_keys"]
    if quantized:
        modules = {name.rpartition(".")[0] for name in report["unexpected_keys"]}
        missing = {name for name in missing if name.rpartition(".")[0] not in modules}
    if missing:
        raise ConfigError(
            f"teacher.model: {config.model} lacks {len(missing)} weights, such as {min(missing)}"
        )
    if report["mismatched_keys"] and not quantized:
        name, held, wanted = min(report["mismatched_keys"])
        raise ConfigError(
            f"teacher.model: {config.model}: {name} is {list(held)}, and config.json wants {list(wanted)}"
        )


def _damaged(model: str) -> Path | None:
    """The first weight file of a folder that cannot be opened."""
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
    """transformers prints a table of what is missing; one line of ours says it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
