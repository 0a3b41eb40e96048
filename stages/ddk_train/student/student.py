"""The student: a module whose forward pass is its loss on a batch."""

from typing import Any

import torch
from torch import Tensor, nn

from ddk_cache.errors import ConfigError
from ddk_train.config import TrainConfig
from ddk_train.data.batches import PACKED, Batch, Layout
from ddk_train.loss.fused import DistillationLoss, distillation_loss
from ddk_train.loss.policy import UNKNOWN, Policy
from ddk_train.student.architecture import (
    LogitTransform,
    body,
    inner_model,
    largest_dropout,
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
        measured_at: float | None = None,
    ) -> DistillationLoss:
        """Return the loss of the batch's M labels; a weight is a number, or one for each label, [M].

        A batch without targets has no KL term, and one without labels' log-probabilities no policy gradient.
        With ``measured_at``, a temperature, the KL is the forward one over entries and tail, not the run's.
        """
        config, head, transform = self.config, self.head, self.transform
        kl: dict[str, Any] = {"temperature": measured_at}
        if measured_at is None:
            kl = {name: getattr(config, name) for name in ("temperature", "tail", "divergence", "beta")}
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
                **kl,
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


def count(parameter: Tensor) -> int:
    """Return the number of weights in a parameter; a byte of a quantised one has two."""
    return parameter.numel() * (2 if is_quantized(parameter) else 1)


def is_quantized(parameter: Tensor) -> bool:
    """Return whether bitsandbytes stores a parameter in 4 bits."""
    return hasattr(parameter, "quant_state")
