"""What the Hugging Face configuration says of a teacher's model."""

from typing import Any

from pydantic import ValidationError

from ddk_build.config import TeacherConfig
from ddk_cache.addresses import check_model, explain_load_failure
from ddk_cache.errors import ConfigError


def full_config(config: TeacherConfig) -> Any:
    """The model's Hugging Face configuration; a new one at each call.

    Raises
    ------
    ConfigError
        There is no such model, or its configuration contradicts itself.
    """
    from transformers import AutoConfig

    check_model("teacher.model", config.model)
    try:
        found = AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # of any type: transformers hands on what its parts, and a model's code, raise
        raise ConfigError(f"teacher.model: {explain_load_failure(config.model, brief(error))}") from error
    return found


def model_config(config: TeacherConfig) -> Any:
    """The text part of the model's Hugging Face configuration."""
    return full_config(config).get_text_config()


def brief(error: BaseException, most: int = 300) -> str:
    """What an engine or library says, in one line: some say it in 10 kB."""
    text = str(error)
    if isinstance(error, ValidationError):
        problems = ((".".join(map(str, one["loc"])), one["msg"]) for one in error.errors())
        text = "; ".join(f"{key}: {said}" if key else said for key, said in problems)
    line = " ".join(text.split()).removeprefix("Value error, ") or type(error).__name__
    return line if len(line) <= most else f"{line[:most].rstrip()} ..."
