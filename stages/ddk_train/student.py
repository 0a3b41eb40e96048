"""The student: loaded from a folder or the hub, one module that turns a batch into losses, saved again."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddk_cache import Cache
from ddk_cache.errors import ConfigError
from ddk_train.architecture import (
    body,
    choose_attention,
    inner_model,
    largest_dropout,
    set_dropout_keys,
    set_dropout_modules,
)
from ddk_train.batches import PACKED, Batch, Layout
from ddk_train.config import LoraConfig, TrainConfig
from ddk_train.errors import writing
from ddk_train.loss import DistillationLoss, distillation_loss


@dataclass(frozen=True)
class Traits:
    """How a model makes its logits from the last hidden state h: cap(scale * W h + bias_scale * b).

    Found by :func:`ddk_train.probe.examine`.
    """

    scale: float = 1.0  # MiniCPM3's, Granite's, Cohere's
    bias_scale: float = 1.0
    softcap: float | None = None  # c of c * tanh(logits / c): Gemma 2's
    layout: Layout = PACKED


class Student(nn.Module):
    """A causal language model whose forward pass is its loss on a batch.

    The head is applied inside, chunk by chunk (``distillation_loss``), so the logits [n, S, V] never exist;
    and since all of it is one module's forward, DDP and FSDP2 see every weight in use.

    Parameters
    ----------
    model
        A ``PreTrainedModel`` or a ``PeftModel`` around one.
    config
        The run's configuration.
    traits
        What the model does to its logits, and how it takes rows.
    """

    def __init__(self, model: Any, config: TrainConfig, traits: Traits = Traits()) -> None:
        super().__init__()
        self.model = model
        self.temperature = config.temperature
        self.tail = config.tail
        self.divergence = config.divergence
        self.beta = config.beta
        self.bf16 = config.bf16
        # Flash attention tells documents apart by position only within one long sequence.
        self.flatten = config.attn_implementation == "flash_attention_2"
        self.traits, self.layout = traits, traits.layout
        self.vocab_size = inner_model(model).get_output_embeddings().weight.shape[0]

    @property
    def inner(self) -> Any:
        """The transformers model, without peft's wrapper."""
        return inner_model(self.model)

    def forward(
        self, batch: Batch, gamma: float | Tensor, cross_entropy_weight: float | Tensor = 1.0
    ) -> DistillationLoss:
        """The loss of the batch's M positions with a label; a weight is one for all or one for each, [M].

        A batch without targets has no KL term, whatever ``gamma`` says.
        """
        head = self.inner.get_output_embeddings()
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.hidden(batch).index_select(0, batch.label_positions)
            return distillation_loss(
                hidden * self.traits.scale,
                head.weight,
                batch.labels,
                batch.ids,
                batch.logprobs,
                batch.tail_logprob,
                gamma=0.0 if batch.ids is None else gamma,
                cross_entropy_weight=cross_entropy_weight,
                temperature=self.temperature,
                tail=self.tail,
                divergence=self.divergence,
                beta=self.beta,
                softcap=self.traits.softcap,
                all_labelled=True,
                head_bias=None if head.bias is None else head.bias * self.traits.bias_scale,
            )

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden state of every place that ``batch.label_positions`` may mean: [n * S, H] if packed.

        Positions that begin anew at each document keep documents apart, in every attention implementation,
        but only with ``use_cache=False``: with a cache transformers takes them for one document.
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

    def continued(self, tokens: Tensor, uniforms: Tensor) -> Tensor:
        """What the student adds to documents' beginnings, drawn at temperature 1: [n, C].

        tokens int64 [n, L]; each of the C tokens of a row is the one at which the summed distribution passes
        its number of uniforms [n, C], in [0, 1). The whole text is read again for each: simple, right for
        every architecture, and for few tokens cheap.
        """
        head, length = self.inner.get_output_embeddings(), tokens.shape[1]
        for uniform in uniforms.T:
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
                last = body(self.inner)(input_ids=tokens, use_cache=False).last_hidden_state[:, -1]
                bias = None if head.bias is None else head.bias * self.traits.bias_scale
                logits = nn.functional.linear(last * self.traits.scale, head.weight, bias).float()
            if (cap := self.traits.softcap) is not None:
                logits = cap * torch.tanh(logits / cap)
            mass = logits.softmax(-1).cumsum(-1)
            drawn = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)
            tokens = torch.cat([tokens, drawn.clamp(max=mass.shape[-1] - 1)], dim=1)
        return tokens[:, length:]

    def description(self) -> str:
        """One line: what was taken for this architecture."""
        model, traits = self.inner, self.traits
        rows = "documents packed in rows" if self.layout.packed else "each document a row, padded"
        scale = "" if traits.scale == 1 else f", logits scaled by {traits.scale:.6g}"
        cap = "" if traits.softcap is None else f", capped at {traits.softcap:g}"
        attention, largest = model.config._attn_implementation, largest_dropout(model)
        dropout = f"dropout {largest:g}" if largest else "no dropout"
        return f"student: {type(model).__name__}, {attention} attention, {rows}, {dropout}{scale}{cap}"


def load_model(config: TrainConfig, cache: Cache, tokenizer: Any) -> Any:
    """The student's weights in float32 (safetensors only), with LoRA adapters if wanted, on the CPU.

    For ``fsdp`` they keep the type that their configuration names, mapped from the files: the processes of a
    machine share that memory, and only their shards become float32.

    Raises
    ------
    ConfigError
        There is no such model, its weights are not all there, its head is narrower than ``tokenizer``, or
        it cannot take rows of the cache's length.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    # A frozen base needs no float32 master weights. FSDP wants one type in a layer: there it becomes float32.
    dtype: Any = torch.bfloat16 if config.lora is not None and config.bf16 else torch.float32
    try:
        architecture = AutoConfig.from_pretrained(config.student, trust_remote_code=config.trust_remote_code)
        attention = choose_attention(config.attn_implementation, architecture)
        if config.dropout is not None:
            set_dropout_keys(architecture, config.dropout)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.student,
            config=architecture,
            dtype="auto" if config.fsdp else dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # of any type: transformers hands on what its parts, and a model's code, raise
        said = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise ConfigError(f"student: cannot load {config.student}: {said}") from error
    model, report = loaded
    if report["missing_keys"]:  # transformers would make them up
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
    return model if config.lora is None else _with_adapters(model, config.lora)


def _with_adapters(model: Any, lora: LoraConfig) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("lora: needs the package peft: pip install 'ddk-cache[lora]'") from error
    wanted = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    try:
        return peft.get_peft_model(model, wanted)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {_first_line(error)}") from error


def save_student(student: Student, folder: Path, config: TrainConfig, *, is_main: bool) -> None:
    """Write the student as ``save_pretrained`` does, in bfloat16 if it was trained with ``bf16``.

    All processes call it, since a sharded student is gathered; only the main one writes. With LoRA the
    adapters are written, or with ``merge`` the full model.
    """
    if config.bf16:
        student.to(torch.bfloat16)
    weights = _whole(student.model, keep=is_main)
    if not is_main:
        return
    if config.lora is None or not config.lora.merge:
        with writing(folder):
            student.model.save_pretrained(folder, state_dict=weights)
        return
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        config.student,
        dtype=student.inner.dtype,
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
    )
    full = peft.get_peft_model(base, student.model.peft_config["default"])
    full.load_state_dict(weights)
    with writing(folder):
        full.merge_and_unload().save_pretrained(folder)


@torch.no_grad()
def _whole(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The state dict with sharded tensors gathered to the CPU; empty where it is not kept.

    Gathering is a common action: every process takes part, one weight at a time. A tied weight is gathered
    once, so that it is still known as tied when it is saved.
    """
    gathered: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, DTensor) and id(tensor) not in gathered:
            whole = tensor.full_tensor().cpu()
            gathered[id(tensor)] = whole if keep else torch.empty(0)
        if keep:
            found[name] = gathered.get(id(tensor), tensor.detach())
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
