"""The student: a module whose forward pass is its loss on a batch; loading and saving it."""

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
from ddk_train.data.batches import PACKED, Batch, Layout
from ddk_train.errors import writing
from ddk_train.loss.fused import DistillationLoss, distillation_loss
from ddk_train.loss.policy import UNKNOWN, Policy
from ddk_train.student.architecture import (
    LogitTransform,
    body,
    choose_attention,
    inner_model,
    largest_dropout,
    set_dropout_keys,
    set_dropout_modules,
)


class Student(nn.Module):
    """A causal language model whose forward pass is its loss on a batch.

    The head is applied inside the loss, chunk by chunk (``distillation_loss``), so the logits [n, S, V] never
    exist. One forward pass uses every weight, as DDP and FSDP2 need. ``model`` is a ``PreTrainedModel`` or a
    ``PeftModel``; ``probe.examine`` chooses the layout.
    """

    def __init__(self, model: Any, config: TrainConfig, layout: Layout = PACKED) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.bf16 = config.bf16
        # Flash attention isolates documents by their positions only within one long sequence.
        self.flatten = config.attn_implementation == "flash_attention_2"
        self.layout = layout
        self.transform = LogitTransform.of(self.inner.config)

    @property
    def inner(self) -> Any:
        """The transformers model, without peft's wrapper."""
        return inner_model(self.model)

    @property
    def head(self) -> Any:
        """The linear layer that computes the logits."""
        return self.inner.get_output_embeddings()

    @property
    def vocab_size(self) -> int:
        """The number of logits, including the vocabulary's padding."""
        size: int = self.head.out_features
        return size

    def forward(
        self,
        batch: Batch,
        gamma: float | Tensor,
        cross_entropy_weight: float | Tensor = 1.0,
        policy_weight: Tensor | None = None,
    ) -> DistillationLoss:
        """Return the loss of the batch's M labels; a weight is a number, or one for each label, [M].

        A batch without targets has no KL term, and one without labels' log-probabilities no policy gradient.
        """
        config, head, transform = self.config, self.head, self.transform
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.hidden(batch).index_select(0, batch.label_positions)
            return distillation_loss(
                hidden if transform.scale == 1 else hidden * transform.scale,
                head.weight,
                batch.labels,
                batch.ids,
                batch.logprobs,
                batch.tail_logprob,
                gamma=0.0 if batch.ids is None else gamma,
                cross_entropy_weight=cross_entropy_weight,
                temperature=config.temperature,
                tail=config.tail,
                divergence=config.divergence,
                beta=config.beta,
                softcap=transform.softcap,
                all_labelled=True,
                policy=None if policy_weight is None else batch_policy(batch, policy_weight, config),
                head_bias=head.bias,
            )

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states that ``batch.label_positions`` index: [n * S, H] if packed.

        Positions that restart at each document isolate documents in every attention implementation, but only
        with ``use_cache=False``: with a cache transformers treats the row as one document.
        """
        run = body(self.inner)
        if batch.documents:
            tokens = batch.tokens.flatten()
            outputs = [run(input_ids=tokens[index], use_cache=False) for index in batch.documents]
            return torch.cat([output.last_hidden_state.flatten(0, 1) for output in outputs])
        shape = (1, -1) if self.flatten else tuple(batch.tokens.shape)
        output = run(
            input_ids=batch.tokens.view(shape),
            position_ids=batch.positions.view(shape).long(),
            use_cache=False,
        )
        last: Tensor = output.last_hidden_state
        return last.flatten(0, 1)

    def hidden_only(self, batch: Batch) -> Tensor:
        """Return ``hidden`` outside a forward pass: FSDP2 gathers the weights for this method too."""
        return self.hidden(batch).clone()  # FSDP2 warns of views

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V], float32, of last hidden states [..., H]; unused in training."""
        scaled = hidden * self.transform.scale
        logits = nn.functional.linear(scaled, self.head.weight, self.head.bias).float()
        cap = self.transform.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def continued(self, tokens: Tensor, uniforms: Tensor) -> Tensor:
        """Return C tokens sampled at temperature 1 after each prompt ``tokens`` [n, L]: int64 [n, C].

        A token is where the cumulative distribution passes its value of ``uniforms`` [n, C], in [0, 1). The
        whole text is read again for each token: correct for every architecture, and cheap for few tokens.
        """
        length = tokens.shape[1]
        for uniform in uniforms.T:
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
                hidden = body(self.inner)(input_ids=tokens, use_cache=False).last_hidden_state
                logits = self.logits(hidden[:, -1])
            mass = logits.softmax(-1).cumsum(-1)
            drawn = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)
            tokens = torch.cat([tokens, drawn.clamp(max=mass.shape[-1] - 1)], dim=1)
        return tokens[:, length:]

    def description(self) -> str:
        """Return a line with the choices for this architecture: attention, layout, dropout, logits."""
        model, transform = self.inner, self.transform
        rows = "documents packed in rows" if self.layout.packed else "each document a row, padded"
        scale = "" if transform.scale == 1 else f", logits scaled by {transform.scale:.6g}"
        cap = "" if transform.softcap is None else f", capped at {transform.softcap:g}"
        attention, largest = model.config._attn_implementation, largest_dropout(model)
        dropout = f"dropout {largest:g}" if largest else "no dropout"
        weights = list(self.model.parameters())
        trained = sum(count(weight) for weight in weights if weight.requires_grad)
        total = sum(map(count, weights))
        part = f"all {total:,}" if trained == total else f"{trained:,} of {total:,} ({trained / total:.2%})"
        return (
            f"student: {type(model).__name__}, {attention} attention, {rows}, {dropout}{scale}{cap}; "
            f"trains {part} weights"
        )


def compile_body(student: Student) -> None:
    """Compile the part of the student that reads tokens, in place: its weights keep their names.

    Raises ConfigError if its rows are not packed: each new length of a document would be compiled again.
    """
    if not student.layout.packed:
        raise ConfigError(
            "torch_compile: this student reads each document by itself, in arrays of many shapes"
        )
    body(student.inner).compile()


def batch_policy(batch: Batch, weight: Tensor, config: TrainConfig) -> Policy | None:
    """Return the policy gradient's arguments for a batch, with a weight for each label, [M]."""
    teacher, writer = batch.teacher_logprob, batch.writer_logprob
    if teacher is None:
        return None
    writer = torch.full_like(teacher, UNKNOWN) if writer is None else writer
    return Policy(weight, teacher, writer, config.advantage_clip, config.importance_clip)


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


def count(parameter: Tensor) -> int:
    """Return the number of weights in a parameter; a byte of a quantised one has two."""
    return parameter.numel() * (2 if is_quantized(parameter) else 1)


def is_quantized(parameter: Tensor) -> bool:
    """Return whether bitsandbytes stores a parameter in 4 bits."""
    return hasattr(parameter, "quant_state")


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
        model.save_pretrained(folder, state_dict=weights)


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
