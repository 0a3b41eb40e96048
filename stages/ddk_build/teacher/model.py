"""Load the Hugging Face configuration of a teacher's model."""

from typing import Any

from ddk_build.config import TeacherConfig
from ddk_cache.errors import ConfigError
from ddk_cache.util.model_folder import check_layers, check_model, load_failure


def full_config(config: TeacherConfig) -> Any:
    """Return the model's Hugging Face configuration, a new object at each call.

    Raises ConfigError if the model does not exist, its configuration contradicts itself, or its class cannot
    be imported.
    """
    check_model("teacher.model", config.model)
    try:
        from transformers import AutoConfig

        settings = AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # any type: transformers passes on the errors of its parts
        raise ConfigError(f"teacher.model: {load_failure(config.model, error)}") from error
    check_layers("teacher.model", settings)
    return settings


def model_config(config: TeacherConfig) -> Any:
    """Return the text part of the model's Hugging Face configuration."""
    return full_config(config).get_text_config()
