"""Whole short runs: what they draw, what they write, when they stop, and that their numbers are right."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers.training
import numpy as np
import pytest
import torch
import transformers
import yaml
from helpers.caches import edit
from helpers.training import (
    ROWS,
    SEQ_LENGTH,
    make_cache,
    plain_losses,
    plain_perplexity,
    read_lines,
    write_split,
)
from safetensors.torch import load_file

import ddk_cache
import ddk_train.loop.run
import ddk_train.train
from ddk_cache.discrepancy import initial_factor, update_factor
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.format.layout import Target
from ddk_cache.sampler import RowSampler, SamplerState, natural_share
from ddk_train.config import TrainConfig
from ddk_train.data.batches import Batch, make_batch
from ddk_train.errors import TrainingError
from ddk_train.loop.evaluate import _Sums, standard_error
from ddk_train.loop.mixture import most_rows, row_share, steps_within_epochs
from ddk_train.loop.schedule import learning_rate
from ddk_train.loss.fused import reference_loss
from ddk_train.train import train

NATURAL = natural_share(list(ROWS.values()))


def run(config: TrainConfig) -> Path:
    train(config)
    return Path(config.output_dir)


@pytest.fixture
def batches_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Counter[int], Batch]]:
    """Return what runs of this test read to train on: rows by domain index, and the batch."""
    original, seen = ddk_train.loop.run.reader, []

    def watched(*args: Any, **kwargs: Any) -> Callable[..., Batch]:
        read = original(*args, **kwargs)

        def read_and_note(domain: np.ndarray, row: np.ndarray) -> Batch:
            batch = read(domain, row)
            seen.append((Counter(domain.tolist()), batch))
            return batch

        return read_and_note

    monkeypatch.setattr(ddk_train.loop.run, "reader", watched)
    return seen


@pytest.mark.parametrize(
    ("keys", "share"),
    [
        ({"strategy": "uniform"}, [1 / 3, 1 / 3, 1 / 3]),
        ({"strategy": "proportional"}, NATURAL),
        ({"strategy": "static", "weights": {"code": 1, "prose": 0, "law": 3}}, [0.25, 0, 0.75]),
        ({"strategy": "ddk"}, None),
        ({"strategy": "ddk", "smoothing": None}, None),
        ({"strategy": "gap", "gap_temperature": 0.1}, None),
        ({"strategy": "auto", "smoothing": 0.8}, None),
    ],
)
def test_a_strategy_draws_what_it_says(
    make_config: Any, keys: dict[str, Any], share: Any, batches_read: list[tuple[Counter[int], Batch]]
) -> None:
    lines = read_lines(run(make_config(share_of="rows", **keys)), "discrepancy")
    assert [(line["interval"], line["step"]) for line in lines] == [(0, 0), (1, 4), (2, 8), (3, 10)]
    drawn = np.array([list(line["rows"].values()) for line in lines])
    assert drawn.sum(-1).tolist() == [16, 16, 8, 0]  # 4 + 4 + 2 steps of 4 rows; then the run is over
    trained_on = sum((rows for rows, _ in batches_read), Counter())
    assert [trained_on[index] for index in range(len(ROWS))] == drawn.sum(0).tolist()

    factor = None
    for line, rows in zip(lines, drawn, strict=True):
        assert list(line["factor"]) == list(line["student_ppl"]) == list(line["teacher_ppl"]) == list(ROWS)
        if keys["strategy"] in ("ddk", "auto"):
            student, teacher = (np.array(list(line[f"{who}_ppl"].values())) for who in ("student", "teacher"))
            factor = (
                initial_factor(student, teacher)
                if factor is None
                else update_factor(factor, student, teacher, keys.get("smoothing", 0.5))
            )
            # Algorithm 1: the first interval's data is a plain sample.
            share = NATURAL if line["interval"] == 0 else factor
            assert np.abs(factor - NATURAL).max() > 0.05  # the two differ
        elif keys["strategy"] == "gap":
            ratio = np.array(list(line["student_ppl"].values())) / list(line["teacher_ppl"].values())
            factor = share = ratio**10 / (ratio**10).sum()
            assert np.abs(factor - 1 / 3).max() > 0.05
        else:
            factor = share = np.array(share)
        np.testing.assert_allclose(list(line["factor"].values()), factor, rtol=1e-12)
        assert (np.abs(rows - share * rows.sum()) < 1).all()


def test_the_factor_shares_labels_by_default(make_config: Any) -> None:
    config = make_config(strategy="uniform", per_device_train_batch_size=16)
    lines = read_lines(run(config), "discrepancy")
    cache = ddk_cache.open_cache(config.cache)
    states = [cache[name].state.train for name in cache.domains]
    per_row = np.array([state.labels / state.rows for state in states])
    so_far = np.zeros(len(ROWS))
    for line in lines:
        drawn = np.array(list(line["rows"].values()))
        labels = drawn * per_row
        np.testing.assert_allclose(list(line["labels"].values()), labels, atol=0.5)  # whole labels
        # Whole rows: a domain is off by one row at most.
        assert (np.abs(labels - labels.sum() / 3) <= 2 * per_row.max()).all()
        np.testing.assert_allclose(list(line["epochs"].values()), so_far / list(ROWS.values()))
        so_far += drawn


@pytest.mark.parametrize("resume_at", [None, 4])
def test_no_domain_is_read_more_often_than_it_may_be(
    make_config: Any, batches_read: list[tuple[Counter[int], Batch]], resume_at: int | None
) -> None:
    """20, 12 and 8 rows: twice, once and twice; 68 of a run of 80."""
    keys = {
        "strategy": "uniform",
        "share_of": "rows",
        "max_epochs": 2,
        "domains": {"prose": {"max_epochs": 1}},
    }
    config = make_config(**keys, max_steps=20, save_steps=4)
    folder = run(config)
    lines = read_lines(folder, "discrepancy")
    assert [line["step"] for line in lines] == [0, 4, 8, 12, 16, 17]
    assert lines[-1]["epochs"] == {"code": 2, "prose": 1, "law": 2}
    assert [line["step"] for line in read_lines(folder, "metrics")][-1] == 17
    assert read_lines(folder, "metrics")[-1]["learning_rate"] == pytest.approx(config.min_learning_rate)
    assert yaml.safe_load((folder / "config.yaml").read_text())["max_steps"] == 17
    rows = sum((rows for rows, _ in batches_read), Counter())
    assert rows == {0: 40, 1: 12, 2: 16}
    if resume_at is not None:
        for path in folder.glob("checkpoint-*"):
            if int(path.name.removeprefix("checkpoint-")) > resume_at:
                shutil.rmtree(path)
        train(config, resume=True)
        assert read_lines(folder, "discrepancy") == lines


def test_a_limit_is_spread_over_the_run(make_config: Any) -> None:
    folder = run(make_config(strategy="uniform", max_epochs=1.5, max_steps=8, distill_interval=2))
    drawn = [line["rows"]["law"] for line in read_lines(folder, "discrepancy")[:-1]]
    assert max(drawn) - min(drawn) <= 1  # 12 of 32 rows, in 4 intervals


def test_auto_bounds_the_epochs_of_a_domain_and_ends_no_run(make_config: Any) -> None:
    rows = [1000, 10]
    config = make_config(strategy="auto", domains={"law": {"max_epochs": 2}})
    assert most_rows(config, ("code", "prose"), rows, 2000).tolist() == [8000, 80]
    assert most_rows(config, ("code", "law"), rows, 2000).tolist() == [8000, 20]
    assert most_rows(config, ("code", "prose"), rows, 10_100).tolist() == [20_000, 200]  # 10 passes, so 20
    assert most_rows(make_config(strategy="ddk"), ("code", "prose"), rows, 2000).tolist() == [np.inf, np.inf]


def test_the_bound_of_auto_holds_in_the_steps_that_max_epochs_leaves(make_config: Any) -> None:
    keys = {"strategy": "auto", "domains": {"code": {"max_epochs": 0.5}, "prose": {"max_epochs": 0.5}}}
    last = read_lines(run(make_config(**keys, max_steps=100)), "discrepancy")[-1]
    # 8 passes over law's 8 rows: twice the passes of 80 rows over 40 are fewer, those of 400 are 20.
    assert (last["step"], last["epochs"]) == (20, {"code": 0.5, "prose": 0.5, "law": 8})
    config = make_config(strategy="auto", domains={"code": {"max_epochs": 1}}, max_steps=60_000)
    rows = [100_000, 1000]
    steps = steps_within_epochs(config, ("code", "law"), rows, 8)
    assert steps == 13_500
    assert most_rows(config, ("code", "law"), rows, steps * 8).sum() == steps * 8


def test_several_caches_are_trained_on_together(
    make_config: Any, teacher_folder: Path, tmp_path: Path
) -> None:
    domains = {"poems": 6, "letters": 10}
    make_cache(tmp_path / "second", teacher_folder, domains=domains)
    config = make_config()
    config = make_config(cache=[str(config.cache), str(tmp_path / "second")], strategy="uniform")
    folder = run(config)
    last = read_lines(folder, "discrepancy")[-1]
    assert [*last["student_ppl"]] == [*ROWS, *domains]
    assert min(last["epochs"].values()) > 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["cache"] == config.cache
    assert TrainConfig.from_yaml(folder / "config.yaml") == config


@pytest.mark.parametrize("order", [1, -1])
def test_labels_alone_are_trained_on_beside_entries(
    make_config: Any, teacher_folder: Path, tmp_path: Path, order: int
) -> None:
    own = make_cache(tmp_path / "own", teacher_folder, Target(kind="label"), domains={"own": 8})
    keys = {"cache": [str(make_config().cache), str(own)][::order], "strategy": "uniform"}
    with pytest.raises(
        ConfigError, match=r"^domains\.own\.gamma: must be 0: its cache has target kind label"
    ):
        run(make_config(**keys))
    weights = {"gamma": 0, "cross_entropy_weight": 0, "policy_gradient_weight": 1.0}
    (line,) = read_lines(run(make_config(**keys, domains={"own": weights}, logging_steps=10)), "metrics")
    assert line["reverse_kl"] == line["reverse_kl/own"] != 0
    assert line["kl/code"] > 0


def test_a_policy_gradient_moves_the_labels_to_the_teachers_log_probabilities(make_config: Any) -> None:
    keys = {"gamma": 0, "cross_entropy_weight": 0, "policy_gradient_weight": 1.0, "advantage_clip": 5}
    folder = run(make_config(**keys, max_steps=60, logging_steps=10, learning_rate=1e-2))
    first, *_, last = read_lines(folder, "metrics")
    measures = {"reverse_kl", "advantage", "importance", "importance_spread", "left_out"}
    assert measures <= first.keys()
    assert {f"{measure}/{domain}" for measure in measures for domain in ROWS} <= first.keys()
    assert -5 <= first["advantage"] <= 5
    assert (first["importance"], first["importance_spread"], first["left_out"]) == (1, 0, 0)  # no writer
    assert abs(last["reverse_kl"]) < 0.5 * abs(first["reverse_kl"])


def test_one_domain_alone_can_have_a_policy_gradient(make_config: Any) -> None:
    domains = {"law": {"gamma": 0, "cross_entropy_weight": 0, "policy_gradient_weight": 1.0}}
    first = read_lines(run(make_config(domains=domains, share_of="rows", strategy="uniform")), "metrics")[0]
    assert first["reverse_kl"] == first["reverse_kl/law"] != 0
    assert "reverse_kl/code" not in first
    assert first["kl"] == pytest.approx((first["kl/code"] + first["kl/prose"]) / 2, rel=0.5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # by torch's compiler
def test_a_compiled_student_learns_the_same(make_config: Any, tmp_path: Path) -> None:
    keys = {"max_steps": 3, "logging_steps": 1, "distill_interval": 3}
    plain, compiled = (
        run(make_config(**keys, torch_compile=on, output_dir=str(tmp_path / str(on)))) for on in (False, True)
    )
    for before, after in zip(*(read_lines(folder, "metrics") for folder in (plain, compiled)), strict=True):
        for name in ("loss", "cross_entropy", "kl", "grad_norm"):
            assert after[name] == pytest.approx(before[name], rel=1e-4), name
    weights = [load_file(folder / "model.safetensors") for folder in (plain, compiled)]
    assert weights[0].keys() == weights[1].keys()


def test_with_a_frozen_body_the_embeddings_alone_are_trained(make_config: Any) -> None:
    config = make_config(freeze="body", max_steps=2, learning_rate=1e-2, warmup_steps=0)
    before, after = (
        load_file(Path(folder) / "model.safetensors") for folder in (config.student, run(config))
    )
    trained = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert trained == {"model.embed_tokens.weight", "lm_head.weight"}


def test_an_unfinished_cache_needs_training_rows_of_each_domain(
    make_config: Any, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(writer: Any, model: Any, name: str, split: Any, rows: Any) -> None:
        if (name, split) != ("law", "train"):
            write_split(writer, model, name, split, rows)

    monkeypatch.setattr(helpers.training, "write_split", interrupted)
    cache = make_cache(tmp_path / "cache", teacher_folder)
    with pytest.raises(CacheError, match="domain 'law' has no training rows yet"):
        run(make_config(cache=str(cache), allow_incomplete=True))


def test_a_limit_of_less_than_a_step_is_refused(make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"^max_epochs: leaves 3 rows, and a step takes 4$"):
        run(make_config(max_epochs=0.1))
    # Nothing is drawn from a domain without weight, so its rows do not count.
    weights = {"code": 0, "prose": 0, "law": 1}
    with pytest.raises(ConfigError, match="leaves 2 rows"):
        run(make_config(max_epochs=0.25, strategy="static", weights=weights))


def test_few_labels_a_row_mean_more_rows() -> None:
    keys = {"cache": "c", "student": "s", "output_dir": "o"}
    share, per_row = np.array([0.5, 0.5]), np.array([2000.0, 200.0])
    config = TrainConfig.model_validate(keys)
    np.testing.assert_allclose(row_share(config, 1, share, per_row), [1 / 11, 10 / 11])
    np.testing.assert_allclose(row_share(config, 0, share, per_row), share)  # Algorithm 1: a plain sample
    np.testing.assert_allclose(row_share(config, 1, share, np.full(2, 2047.0)), share)  # packed text
    by_rows = TrainConfig.model_validate(keys | {"share_of": "rows"})
    np.testing.assert_allclose(row_share(by_rows, 1, share, per_row), share)


def test_the_files_of_a_run(
    make_config: Any, batches_read: list[tuple[Counter[int], Batch]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ddk_train")
    config = make_config(gradient_accumulation_steps=2, gamma=0.3, num_reader_threads=1)
    folder = run(config)
    assert TrainConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text())) == config
    lines = read_lines(folder, "metrics")
    assert [line["step"] for line in lines] == [3, 6, 9, 10]
    by_domain = {f"{name}/{domain}" for name in ("cross_entropy", "kl") for domain in ROWS}
    assert by_domain <= set(lines[0])  # a domain that no row was drawn of has no mean
    for line in lines:
        assert set(line) - by_domain == {
            "step", "loss", "cross_entropy", "kl", "learning_rate", "grad_norm", "tokens",
            "tokens_per_second", "data_wait_fraction",
        }  # fmt: skip
        assert line["loss"] == pytest.approx(line["cross_entropy"] + 0.3 * line["kl"])
        assert line["tokens"] == sum(batch.text_tokens for _, batch in batches_read[: 2 * line["step"]])
        assert line["learning_rate"] == learning_rate(line["step"], config)
        assert 0 <= line["data_wait_fraction"] <= 1
        assert line["tokens_per_second"] > 0
    assert lines[-1]["tokens"] < 10 * 2 * 4 * SEQ_LENGTH  # padding does not count

    for line in read_lines(folder, "discrepancy"):
        ratios = (f"{name} {line['student_ppl'][name] / line['teacher_ppl'][name]:.3f}" for name in ROWS)
        assert f"student/teacher perplexity at step {line['step']}: {' '.join(ratios)}" in caplog.messages
    memory, *steps = [line for line in caplog.messages if line.startswith(("memory", "step"))]
    assert memory.startswith("memory needed: about ")
    progress = [line.split("  ") for line in steps]
    assert [parts[0] for parts in progress] == ["step 3/10", "step 6/10", "step 9/10", "step 10/10"]
    factor = read_lines(folder, "discrepancy")[2]["factor"]
    assert progress[-1][1] == f"loss {lines[-1]['loss']:.3f}"
    assert progress[-1][2].endswith(" tokens/s")
    assert progress[-1][3] == "0:00:00 left"
    # The first interval draws by size, not by the factor.
    assert progress[0][4] == "by size " + " ".join(
        f"{name} {share:.2f}" for name, share in zip(ROWS, NATURAL, strict=True)
    )
    assert progress[-1][4] == "factor " + " ".join(f"{name} {share:.2f}" for name, share in factor.items())


def rows_of(cache: ddk_cache.Cache, config: TrainConfig) -> list[ddk_cache.Rows]:
    """Return the rows of a proportional run, in its order."""
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    state = SamplerState((0,) * len(ROWS))
    drawn = RowSampler(list(ROWS.values()), config.seed).draw(state, NATURAL, config.max_steps * per_step)[:2]
    splits = [cache[name].train for name in cache.domains]
    return [splits[domain].read([row]) for domain, row in zip(*drawn, strict=True)]


def plain_logits(model: Any, rows: ddk_cache.Rows) -> torch.Tensor:
    """Return transformers' logits of a row, [S, V], a document at a time."""
    logits = torch.zeros(SEQ_LENGTH, model.config.vocab_size)
    for segment in set(rows.segments[0].tolist()) - {0}:
        inside = torch.from_numpy(rows.segments[0] == segment)
        logits[inside] = model(torch.from_numpy(rows.tokens[0])[inside].long()[None]).logits[0]
    return logits


@pytest.mark.parametrize(("gamma", "tail"), [(0.0, "bucket"), (0.5, "bucket"), (0.5, "label"), (0.5, "drop")])
@pytest.mark.parametrize("split", [(8, 1), (2, 4)])
def test_training_is_that_of_a_plain_loop(
    make_config: Any, student_folder: Path, gamma: float, tail: Any, split: tuple[int, int]
) -> None:
    """Full logits, a document at a time, one batch a step: the same weights, however a step is split."""
    config = make_config(
        strategy="proportional",
        gamma=gamma,
        tail=tail,
        per_device_train_batch_size=split[0],
        gradient_accumulation_steps=split[1],
        distill_interval=1000,  # more than max_steps
        max_steps=4,
        max_grad_norm=0.5,
    )
    folder = run(config)
    assert [line["step"] for line in read_lines(folder, "discrepancy")] == [0, 4]

    model = transformers.AutoModelForCausalLM.from_pretrained(student_folder)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    matrices = [p for name, p in model.named_parameters() if "norm" not in name]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": norms, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    rows = rows_of(ddk_cache.open_cache(config.cache), config)
    losses = []
    for step, rate in enumerate((1.5e-3, 3e-3, 1.65e-3, 3e-4)):  # warm-up of 2 steps, half a cosine of 2
        logits, labels, targets = [], [], []
        for row in rows[8 * step : 8 * step + 8]:
            batch = make_batch({0: row}, 400)
            logits.append(plain_logits(model, row)[batch.label_positions])
            labels.append(batch.labels)
            targets.append((batch.ids, batch.logprobs, batch.tail_logprob))
        target = [torch.cat(part) for part in zip(*targets, strict=True)]
        loss = reference_loss(torch.cat(logits), torch.cat(labels), *target, gamma=gamma, tail=tail).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    first, second = read_lines(folder, "metrics")  # steps 1 to 3, weighted by their labels, and step 4
    assert second["loss"] == pytest.approx(losses[3], rel=1e-4)
    assert min(losses[:3]) < first["loss"] < max(losses[:3])
    before, after = (load_file(path / "model.safetensors") for path in (student_folder, folder))
    for name, weight in model.state_dict().items():
        off, moved = (after[name] - weight).norm(), (weight - before[name]).norm()
        assert off <= 1e-3 * moved


def test_the_perplexities_are_those_of_transformers(
    make_config: Any, student_folder: Path, teacher_folder: Path
) -> None:
    config = make_config(per_device_train_batch_size=3)  # of 5 validation rows: the last batch is smaller
    folder = run(config)
    cache, lines = ddk_cache.open_cache(config.cache), read_lines(folder, "discrepancy")
    for path, line, key in (
        (student_folder, lines[0], "student_ppl"),
        (folder, lines[-1], "student_ppl"),
        (teacher_folder, lines[-1], "teacher_ppl"),
    ):
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        for name in cache.domains:
            expected = plain_perplexity(model, cache[name].validation)
            assert line[key][name] == pytest.approx(expected, rel=1e-4)
    assert all(lines[-1]["student_ppl"][name] < lines[0]["student_ppl"][name] for name in cache.domains)


def test_the_standard_error_is_that_of_a_mean_over_rows(make_config: Any, student_folder: Path) -> None:
    config = make_config(per_device_train_batch_size=3)
    line = read_lines(run(config), "discrepancy")[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(student_folder)
    cache = ddk_cache.open_cache(config.cache)
    for name in cache.domains:
        loss, labels = plain_losses(model, cache[name].validation)
        away = loss - labels * loss.sum() / labels.sum()
        expected = np.sqrt(len(loss) / (len(loss) - 1) * (away**2).sum()) / labels.sum()
        assert line["standard_error"][name] == pytest.approx(expected, rel=1e-3)
        assert expected > 0


def test_the_standard_error_of_one_row_is_unknown() -> None:
    one, two = np.ones(2), np.array([1.0, 2.0])
    total = _Sums(*(one if name != "labels" else two for name in _Sums._fields))
    error = standard_error(total, np.array([1, 2]))
    assert np.isnan(error[0])
    assert np.isfinite(error[1])


def test_a_student_close_to_its_teacher_is_done(make_config: Any, tmp_path: Path) -> None:
    whole = read_lines(run(make_config(output_dir=str(tmp_path / "whole"))), "discrepancy")
    ratios = [max(line["student_ppl"][name] / line["teacher_ppl"][name] for name in ROWS) for line in whole]
    assert ratios[1] < ratios[0]
    stopped = run(make_config(stop_ratio=(ratios[0] + ratios[1]) / 2))
    assert [line["step"] for line in read_lines(stopped, "metrics")] == [3, 4]  # the last steps are in it too
    lines = read_lines(stopped, "discrepancy")
    assert lines[:1] == whole[:1]
    assert lines[1] == whole[1] | dict.fromkeys(("rows", "labels"), dict.fromkeys(ROWS, 0))
    assert len(lines) == 2
    assert (stopped / "model.safetensors").exists()


def test_a_sampled_cache_trains(make_config: Any, teacher_folder: Path, tmp_path: Path) -> None:
    target = Target(kind="sampled", samples=12)
    cache = str(make_cache(tmp_path / "cache", teacher_folder, target))
    losses = {
        tail: read_lines(run(make_config(cache=cache, output_dir=str(tmp_path / tail), tail=tail)), "metrics")
        for tail in ("bucket", "label", "drop")
    }
    assert all(line["kl"] > 0 for line in losses["bucket"])
    assert losses["bucket"][-1]["kl"] < losses["bucket"][0]["kl"]
    # There is no tail for the modes to differ in.
    for tail in ("label", "drop"):
        for line, expected in zip(losses[tail], losses["bucket"], strict=True):
            assert line["kl"] == pytest.approx(expected["kl"], rel=1e-4)


@pytest.mark.parametrize(("rate", "interval", "step"), [(1e30, 10, 2), (1e10, 1, 1)])
def test_a_run_whose_numbers_explode_says_so(make_config: Any, rate: float, interval: int, step: int) -> None:
    """In the step after the weights have gone, or in a measurement: the perplexity overflows."""
    config = make_config(warmup_steps=0, distill_interval=interval)
    config = config.model_copy(update={"learning_rate": rate})  # beyond what a configuration may ask for
    with pytest.raises(
        TrainingError, match=f"step {step}: .* is not a finite number; there is no checkpoint"
    ):
        train(config)


def test_a_full_gpu_has_an_error_with_advice(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(ddk_train.train, "learning_rate", full)
    with pytest.raises(TrainingError, match="halve per_device_train_batch_size"):
        train(make_config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(teacher_cross_entropy=1.001 * s["teacher_cross_entropy"]), "cross-entropy"),
        (lambda s: s["validation"].update(labels=s["validation"]["labels"] - 1), "labels"),
    ],
)
def test_a_wrong_state_ends_the_run(
    make_config: Any, cache_folder: Path, tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    """Its digest fits, and the ratio to the student, which steers the data, would be wrong."""
    cache = shutil.copytree(cache_folder, tmp_path / "cache")
    name = next(iter(ROWS))
    edit(cache / name / "zarr.json", change)
    with pytest.raises(CacheError, match=f"domain '{name}' records .*{message}"):
        train(make_config(cache=str(cache)))
