"""Dataset, sampler and collator give what our own loop reads; the example trains with them."""

import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import ROWS, VOCABULARY
from numpy.testing import assert_allclose, assert_array_equal
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TrainingArguments

from ddk_cache import Rows, open_cache
from ddk_cache.discrepancy import initial_factor, update_factor
from ddk_cache.sampler import RowSampler, SamplerState, natural_share
from ddk_train.config import TrainConfig
from ddk_train.data.batches import Batch, reader
from ddk_train.data.dataset import CacheDataset, Collator, MixtureSampler
from ddk_train.loss.fused import reference_loss
from tools import hf_trainer


def same(one: Rows, other: Rows) -> None:
    for name, values in one.arrays().items():
        assert_array_equal(values, getattr(other, name), err_msg=name)


def test_splits_are_indexed_and_iterated(cache_folder: Path) -> None:
    split = open_cache(str(cache_folder))["code"].train
    whole = split.read(np.arange(ROWS["code"]))
    assert split[3].tokens.shape == (split.read([0]).tokens.shape[1],)
    assert_array_equal(split[3].ids, whole.ids[3] if whole.ids is not None else None)
    assert_array_equal(split[-1].tokens, whole.tokens[-1])
    same(split[2:9:3], split.read([2, 5, 8]))
    rows = list(split)
    assert len(rows) == ROWS["code"]
    logprobs = [row.label_logprob for row in rows if row.label_logprob is not None]
    assert_array_equal(np.stack(logprobs), whole.label_logprob)
    with pytest.raises(IndexError):
        split[ROWS["code"]]


def test_dataset_has_every_domains_rows(cache_folder: Path) -> None:
    rows = CacheDataset(str(cache_folder))
    assert len(rows) == sum(ROWS.values())
    cache = open_cache(str(cache_folder))
    for index, (domain, row) in {0: ("code", 0), 19: ("code", 19), 20: ("prose", 0), 39: ("law", 7)}.items():
        assert rows.domains[rows[index].domain] == domain
        same(rows[index].rows, cache[domain].train.read([row]))
    assert [item.domain for item in rows.__getitems__([39, 0, 20, 39])] == [2, 0, 1, 2]
    with pytest.raises(IndexError, match="the rows are 0 to 39"):
        rows[40]


def test_a_worker_gets_it_unopened(cache_folder: Path) -> None:
    rows = CacheDataset(str(cache_folder), "validation")
    again = pickle.loads(pickle.dumps(rows))
    assert again._cache is None
    same(again[7].rows, rows[7].rows)


def test_sampler_draws_as_training_does(cache_folder: Path) -> None:
    rows = CacheDataset(str(cache_folder))
    sampler = MixtureSampler(rows, 24, seed=3)
    state = SamplerState((0, 0, 0))
    for share in (natural_share(rows.rows), np.array([0.2, 0.2, 0.6])):
        domain, row, state = RowSampler(rows.rows, 3).draw(state, share, 24)
        sampler.share = share
        assert list(sampler) == rows.index(domain, row).tolist()
        assert sampler.state == state
    assert len(sampler) == 24


def test_loader_gives_the_batches_of_our_own_loop(cache_folder: Path) -> None:
    rows = CacheDataset(str(cache_folder))
    sampler = MixtureSampler(rows, 12)
    loader: Any = DataLoader(rows, 4, sampler=sampler, collate_fn=Collator(VOCABULARY))
    domain, row, _ = RowSampler(rows.rows, 0).draw(SamplerState((0, 0, 0)), sampler.share, 12)
    read = reader(rows.cache, targets=[True] * 3, labels=[True] * 3, vocab_size=VOCABULARY)
    for index, batch in enumerate(loader):
        some = slice(4 * index, 4 * index + 4)
        expected = vars(read(domain[some], row[some]))
        assert torch.equal(batch.pop("shift_labels"), batch["labels"])
        assert batch.keys() == expected.keys()
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)
        Batch(**batch)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same(cache_folder: Path, method: str) -> None:
    """In two processes, which start after this one has read from the cache."""
    rows = CacheDataset(str(cache_folder))
    settings: dict[str, Any] = {"batch_size": 8, "collate_fn": Collator(VOCABULARY)}
    alone = list(islice(DataLoader(rows, **settings), 2))
    workers = DataLoader(rows, num_workers=2, multiprocessing_context=method, timeout=120, **settings)
    for one, other in zip(alone, islice(workers, 2), strict=True):
        assert torch.equal(one["tokens"], other["tokens"])
        assert torch.equal(one["logprobs"], other["logprobs"])


def test_hugging_faces_trainer_with_ddk(cache_folder: Path, student_folder: Path, tmp_path: Path) -> None:
    """Three intervals of four steps; the factors are recomputed from the measurements."""
    settings = TrainingArguments(
        str(tmp_path / "out"),
        remove_unused_columns=False,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    measured = []
    plain = hf_trainer.update_factor

    def remember(*arguments: Any, **more: Any) -> np.ndarray:
        measured.append(arguments)
        return plain(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_trainer, "update_factor", remember)
        ddk = hf_trainer.main(
            str(cache_folder),
            str(student_folder),
            settings,
            rows_per_interval=16,
        )
    assert ddk.sampler.state.interval == 3
    assert sum(ddk.sampler.state.drawn) == 3 * 4 * 4
    assert len(ddk.history) == 3
    (first, student, teacher), (_, later, _) = measured
    assert_array_equal(first, ddk.history[0])
    assert_allclose(ddk.history[1], update_factor(first, student, teacher, 0.5))
    assert (later < student).all(), "it learns"
    assert ddk.history[0].sum() == pytest.approx(1)
    assert not np.array_equal(ddk.history[0], initial_factor(student, teacher))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_examples_loss_is_the_reference(cache_folder: Path, student_folder: Path) -> None:
    rows = CacheDataset(str(cache_folder))
    batch = Collator(VOCABULARY)([rows[0], rows[30]])
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    loss = hf_trainer.loss_of(model, batch, 0.2)
    logits = model(batch["tokens"], position_ids=batch["positions"].long(), use_cache=False).logits
    target = [batch[name] for name in ("labels", "ids", "logprobs", "tail_logprob")]
    expected = reference_loss(logits.flatten(0, 1)[batch["label_positions"]], *target, gamma=0.2)
    assert loss.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert TrainConfig.model_fields["gamma"].default == 0.2
