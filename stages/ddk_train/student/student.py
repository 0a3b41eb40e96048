"""The student: a module whose forward pass is its loss on a batch; how it is loaded and saved."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddk_cache import Cache
from ddk_cache.errors import ConfigError
from ddk_train.config import LoraConfig, TrainConfig
from ddk_train.data.batches import PACKED, Batch, Layout
from ddk_train.errors import writing
from ddk_train.loss.fused import DistillationLoss, distillation_loss
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
    exist. Everything is one module's forward pass, so DDP and FSDP2 see every weight in use.

    Parameters
    ----------
    model
        A ``PreTrainedModel`` or a ``PeftModel`` around one.
    config
        The run's configuration.
    layout
        How rows reach the model; ``probe.examine`` chooses it.
    """

    def __init__(self, model: Any, config: TrainConfig, layout: Layout = PACKED) -> None:
        super().__init__()
        self.model = model
        self.temperature = config.temperature
        self.tail = config.tail
        self.divergence = config.divergence
        self.beta = config.beta
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
        """The linear layer that makes the logits."""
        return self.inner.get_output_embeddings()

    @property
    def vocab_size(self) -> int:
        """The number of logits, padding of the vocabulary included."""
        size: int = self.head.out_features
        return size

    def forward(
        self, batch: Batch, gamma: float | Tensor, cross_entropy_weight: float | Tensor = 1.0
    ) -> DistillationLoss:
        """Return the loss of the batch's M labels; a weight is a number, or one for each label, [M].

        Without targets in the batch there is no KL term, whatever ``gamma`` is.
        """
        head, transform = self.head, self.transform
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
                temperature=self.temperature,
                tail=self.tail,
                divergence=self.divergence,
                beta=self.beta,
                softcap=transform.softcap,
                all_labelled=True,
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
        """Return ``hidden`` from outside a forward pass: FSDP2 gathers the weights for this method too."""
        return self.hidden(batch).clone()  # FSDP2 warns of views

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V], float32, of last hidden states [..., H]; training never needs them."""
        scaled = hidden * self.transform.scale
        logits = nn.functional.linear(scaled, self.head.weight, self.head.bias).float()
        cap = self.transform.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def continued(self, tokens: Tensor, uniforms: Tensor) -> Tensor:
        """Return the C tokens that the student adds to each prompt, drawn at temperature 1: int64 [n, C].

        ``tokens`` int64 [n, L]. Each added token is the one at which the cumulative distribution passes its
        number of ``uniforms`` [n, C], in [0, 1). Every token reads the whole text again: right for every
        architecture, and cheap for few tokens.
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
        """Return one line about what the architecture led to: attention, layout, dropout, logits."""
        model, transform = self.inner, self.transform
        rows = "documents packed in rows" if self.layout.packed else "each document a row, padded"
        scale = "" if transform.scale == 1 else f", logits scaled by {transform.scale:.6g}"
        cap = "" if transform.softcap is None else f", capped at {transform.softcap:g}"
        attention, largest = model.config._attn_implementation, largest_dropout(model)
        dropout = f"dropout {largest:g}" if largest else "no dropout"
        return f"student: {type(model).__name__}, {attention} attention, {rows}, {dropout}{scale}{cap}"


def load_model(config: TrainConfig, cache: Cache, tokenizer: Any) -> Any:
    """Load the student on the CPU, with LoRA adapters if configured; float32 weights, from safetensors only.

    For ``fsdp`` the weights keep the type that their configuration names, mapped from the files: the
    processes of a machine share that memory, and only their shards become float32.

    Raises
    ------
    ConfigError
        There is no such model, weights are missing, its head is narrower than ``tokenizer``, or it cannot
        take rows of the cache's length.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    # A frozen base needs no float32 master weights. FSDP needs one type in a layer: there it becomes float32.
    dtype: Any = torch.bfloat16 if config.lora is not None and config.bf16 else torch.float32
    with _loading(config.student):
        architecture = AutoConfig.from_pretrained(config.student, trust_remote_code=config.trust_remote_code)
    attention = choose_attention(config.attn_implementation, architecture)
    if config.dropout is not None:
        set_dropout_keys(architecture, config.dropout)
    with _loading(config.student):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.student,
            config=architecture,
            dtype="auto" if config.fsdp else dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    model, report = loaded
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
    return model if config.lora is None else _with_adapters(model, config.lora)


@contextmanager
def _loading(student: str) -> Iterator[None]:
    """Raise errors of loading a model, of any type (a repository's code may raise any), as ConfigError."""
    try:
        yield
    except Exception as error:
        # transformers hides why an import failed ("Could not import module 'LlamaConfig'"): the function that
        # stage one has for it, moved to ddk_cache, is to be called here and in tokenizer.load_tokenizer.
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise ConfigError(f"student: cannot load {student}: {reason}") from error


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
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ConfigError(f"lora.target_modules: {first_line}") from error


def save_student(student: Student, folder: Path, config: TrainConfig, *, is_main: bool) -> None:
    """Write the student as ``save_pretrained`` does, in bfloat16 if it was trained with ``bf16``.

    All processes call it, since a sharded student is gathered; only the main one writes. With LoRA the
    adapters are written, or with ``merge`` the full model.
    """
    if config.bf16:
        student.to(torch.bfloat16)
    weights = _gather(student.model, keep=is_main)
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
def _gather(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return the state dict with sharded tensors gathered to the CPU; empty unless ``keep``.

    Gathering is collective: every process takes part, one weight at a time. A tied weight is gathered once,
    so that ``save_pretrained`` still recognises it as tied.
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
