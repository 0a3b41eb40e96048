"""The rows that a dry run announces are those that the run draws."""

import shutil
from pathlib import Path

import torch
from helpers.caches import edit
from helpers.training import MakeConfig

from ddk_cache import open_cache
from ddk_train.loop.mixture import is_plain_sample
from ddk_train.loop.plan import check_epochs, plan
from ddk_train.student.distributed import Ranks

CPU = Ranks(0, 1, torch.device("cpu"))


def test_a_domain_with_few_labels_in_a_row_is_read_more_often(
    make_config: MakeConfig, cache_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(cache_folder, tmp_path / "cache")
    for name, labels in {"code": 200, "prose": 12, "law": 80}.items():  # 10, 1 and 10 a row
        edit(folder / name / "zarr.json", lambda state, labels=labels: state["train"].update(labels=labels))
    keys = {"cache": str(folder), "strategy": "uniform", "max_steps": 60}
    epochs = {}
    for unit in ("labels", "rows"):
        config = make_config(**keys, share_of=unit)
        *_, code, prose, law = plan(config, open_cache(str(folder)), CPU).splitlines()
        epochs[unit] = [float(line.split()[-1]) for line in (code, prose, law)]
    # 240 rows, one part code, ten parts prose and one part law; or a third each.
    assert epochs == {"labels": [1.0, 16.67, 2.5], "rows": [4.0, 6.67, 10.0]}
    (warning,) = check_epochs(make_config(**keys | {"max_steps": 90}), open_cache(str(folder)), CPU)
    assert warning.startswith("max_steps: 90 steps read domain 'prose' about 25 times: ")


def test_plain_samples_draw_by_size(make_config: MakeConfig) -> None:
    samples = {
        strategy: [is_plain_sample(make_config(strategy=strategy), interval) for interval in (0, 1)]
        for strategy in ("ddk", "auto", "gap", "uniform", "proportional")
    }
    assert samples == {
        "ddk": [True, False],
        "auto": [True, False],
        "gap": [False, False],
        "uniform": [False, False],
        "proportional": [True, True],
    }


def test_the_advice_depends_on_whether_max_epochs_is_set(make_config: MakeConfig, cache_folder: Path) -> None:
    keys = {"max_steps": 300, "strategy": "proportional"}  # 30 passes
    for given, advice in (({}, "set max_epochs"), ({"max_epochs": 30}, "lower max_epochs")):
        lines = check_epochs(make_config(**keys, **given), open_cache(str(cache_folder)), CPU)
        assert [line.rpartition("; ")[2] for line in lines] == [advice] * 3
