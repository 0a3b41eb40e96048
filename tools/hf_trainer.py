"""Train by Hugging Face's Trainer with our loss and DDK: python -m tools.hf_trainer CACHE STUDENT OUTPUT."""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ddk_cache.discrepancy import initial_factor, update_factor
from ddk_train.data.dataset import CacheDataset, Collator, MixtureSampler
from ddk_train.loss import distillation_loss


def loss_of(model, batch, gamma):
    """Return loss, cross-entropy and KL. Restarting positions, and no cache, isolate the documents."""
    inputs = {"input_ids": batch["tokens"], "position_ids": batch["positions"].long(), "use_cache": False}
    hidden = model(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[-1].flatten(0, 1)
    head = getattr(model, "module", model).get_output_embeddings()
    target = [batch[name] for name in ("labels", "ids", "logprobs", "tail_logprob")]
    return distillation_loss(hidden[batch["label_positions"]], head.weight, *target, gamma=gamma)


class DDK(TrainerCallback):  # an epoch is an interval of Algorithm 1: it begins with a measurement
    def __init__(self, rows, sampler, validation):
        self.sampler, self.validation, self.history = sampler, validation, []
        self.teacher = np.exp([rows.cache[name].teacher_cross_entropy for name in rows.domains])

    @torch.no_grad()
    def on_epoch_begin(self, args, state, control, model=None, **options):
        sums = np.zeros((len(self.teacher), 2))
        for batch in self.validation:
            inputs = {k: v.to(args.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            cross_entropy = loss_of(model.eval(), inputs, gamma=0.0).row_cross_entropy
            sums[batch["domain"][0]] += [cross_entropy.sum().item(), len(cross_entropy)]
        student = np.exp(sums[:, 0] / sums[:, 1])
        if self.history:  # before, the first interval draws by size
            self.sampler.share = update_factor(self.history[-1], student, self.teacher, smoothing=0.5)
        self.history.append(self.sampler.share if self.history else initial_factor(student, self.teacher))


class DistillationTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        share = len(inputs["labels"]) * self.accelerator.num_processes / num_items_in_batch
        return loss_of(model, inputs, gamma=0.2).loss * share  # a mean over the labels of the global batch


def main(cache, student, settings, rows_per_interval=800):
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, use_safetensors=True)
    rows, collate = CacheDataset(cache), Collator(model.get_output_embeddings().weight.shape[0])
    held_out = torch.utils.data.DataLoader(CacheDataset(cache, "validation"), collate_fn=collate)
    ddk = DDK(rows, MixtureSampler(rows, rows_per_interval, settings.seed), held_out)
    trainer = DistillationTrainer(model, settings, collate, rows, callbacks=[ddk])
    trainer._get_train_sampler = lambda dataset=None: ddk.sampler  # type: ignore[method-assign, assignment]
    trainer.train()
    trainer.save_model()
    return ddk


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], TrainingArguments(sys.argv[3], remove_unused_columns=False))
