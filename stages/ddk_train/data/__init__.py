"""A cache for torch's DataLoader: dataset, sampler that mixes the domains, collator."""

from ddk_train.data.dataset import CacheDataset, Collator, MixtureSampler, Row

__all__ = ["CacheDataset", "Collator", "MixtureSampler", "Row"]
