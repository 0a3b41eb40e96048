"""A student's files: loading it, with adapters or in 4 bits if configured, and saving it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddk_cache import Cache
from ddk_cache.errors import ConfigError, brief
from ddk_cache.util.model_folder import check_layers
from ddk_cache.util.packages import require
from ddk_train.config import LoraConfig, TrainConfig
from ddk_train.errors import writing
from ddk_train.student.architecture import choose_attention, set_dropout_keys, set_dropout_modules
from ddk_train.student.student import Student


def load_model(config: TrainConfig, cache: Cache, tokenizer: Any) -> Any:
    """Load the student on the CPU, with LoRA adapters if configured; float32 weights, from safetensors only.

    With ``fsdp`` the weights keep their configuration's type, mapped from the files: the processes of a
    machine share that memory, and only the shards become float32. Raises ConfigError if the model does not
    load, lacks weights, or does not fit the tokenizer or the cache's row length.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    # A frozen base needs no float32 master weights; FSDP, which needs one type in a layer, gives it some.
    dtype: Any = torch.bfloat16 if config.lora is not None and config.bf16 else torch.float32
    with loading(config.student):
        architecture = AutoConfig.from_pretrained(config.student, trust_remote_code=config.trust_remote_code)
    check_layers("student", architecture)
    attention = choose_attention(config.attn_implementation, architecture)
    if config.dropout is not None:
        set_dropout_keys(architecture, config.dropout)
    with loading(config.student):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.student,
            config=architecture,
            dtype="auto" if config.fsdp else dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **_quantization(config, dtype),
        )
        model, report = loaded
        if (Path(config.student) / "generation_config.json").exists():
            # The model takes a file that cannot be read for a missing one.
            model.generation_config = GenerationConfig.from_pretrained(config.student)
    if report["missing_keys"]:  # transformers would fill them with random numbers
        raise ConfigError(f"student: {config.student} lacks weights, such as {min(report['missing_keys'])}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and longest < cache.seq_length:
        raise ConfigError(
            f"student: {config.student} takes at most {longest} tokens; the cache's rows have "
            f"{cache.seq_length}"
        )
    width, last = model.get_output_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    if last >= width:
        raise ConfigError(f"student: {config.student} has {width} logits; its tokenizer has the id {last}")
    if config.dropout is not None:
        set_dropout_modules(model, config.dropout)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.freeze == "body":
        model.requires_grad_(False)
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.requires_grad_(True)
    return model if config.lora is None else _with_adapters(model, config.lora)


def _quantization(config: TrainConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the argument of ``from_pretrained`` that keeps frozen weights in 4 bits, if configured."""
    if config.lora is None or config.lora.quantize is None:
        return {}
    from transformers import BitsAndBytesConfig

    require("qlora", "bitsandbytes")
    settings = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=config.lora.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings}


@contextmanager
def loading(student: str) -> Iterator[None]:
    """Raise any error of the block as ConfigError: a repository's code may raise any type.

    transformers' table of missing weights is not logged: they are an error here, in one line.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_load_report)
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = brief(error)
        if "ignore_mismatched_sizes" in reason:  # an option that is not here, and a table that is not shown
            reason = "its weights do not have the shapes that its config.json requires"
        raise ConfigError(f"student: cannot load {student}: {reason}") from error
    finally:
        logger.removeFilter(_is_no_load_report)


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _with_adapters(model: Any, lora: LoraConfig) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("lora: needs the package peft: pip install 'ddk-cache[lora]'") from error
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    if lora.quantize is not None:  # measuring would pack the weights for a CPU's kernel without a gradient
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    name = model.config.name_or_path
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {brief(error)}") from error
    if Path(name).is_dir():  # for loading the adapters from any working directory
        adapted.peft_config["default"].base_model_name_or_path = str(Path(name).resolve())
    return adapted


def save_student(student: Student, folder: Path, config: TrainConfig, *, is_main: bool) -> None:
    """Write the student as ``save_pretrained`` does, in bfloat16 if it was trained with ``bf16``.

    With LoRA it writes the adapters, or with ``merge`` the full model. Collective; only the main process
    writes.
    """
    if config.bf16:
        student.to(torch.bfloat16)
    weights: dict[str, Tensor] | None = _gather(student.model, keep=is_main)
    if not is_main:
        return
    model = student.model
    if config.lora is not None and config.lora.merge:
        import peft
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(
            config.student,
            dtype=student.inner.dtype,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
        )
        adapted = peft.get_peft_model(base, model.peft_config["default"])
        adapted.load_state_dict(weights)
        model, weights = adapted.merge_and_unload(), None
    with writing(folder):
        save_model(model, folder, state_dict=weights)


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """Save a transformers model; whoever may read its configuration may read its weights.

    safetensors makes files that only their owner may read.
    """
    model.save_pretrained(folder, **options)
    mode = next(folder.glob("*config.json")).stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


@torch.no_grad()
def _gather(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return the state dict with sharded tensors gathered to the CPU; empty unless ``keep``.

    Collective, one weight at a time. A tied weight is gathered once, so that ``save_pretrained`` still
    recognises it as tied.
    """
    gathered: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, DTensor) and id(tensor) not in gathered:
            full = tensor.full_tensor().cpu()
            gathered[id(tensor)] = full if keep else torch.empty(0)
        if keep:
            weights[name] = gathered.get(id(tensor), tensor.detach())
    return weights
