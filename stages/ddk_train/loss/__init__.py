"""Cross-entropy and sparse KL from hidden states, without the logits in memory."""

from ddk_train.loss.fused import DistillationLoss, default_chunk_size, distillation_loss, reference_loss

__all__ = ["DistillationLoss", "default_chunk_size", "distillation_loss", "reference_loss"]
