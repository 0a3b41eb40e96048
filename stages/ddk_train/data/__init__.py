"""A cache as a torch data set: rows, a sampler that mixes the domains, and a collator."""

from ddk_train.data.dataset import CacheDataset, Collator, MixtureSampler, Row

__all__ = ["CacheDataset", "Collator", "MixtureSampler", "Row"]
