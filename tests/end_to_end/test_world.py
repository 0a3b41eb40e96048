"""The small world of the studies: made once, and its held-out text is unknown to its teacher."""

import math
from pathlib import Path

import numpy as np
import pytest
import real_data
import world
from builds import write_corpus

from ddk_build.build import build_cache
from ddk_cache import open_cache
from ddk_train.run_files import read_run

TRAINING = {"max_steps": 6, "distill_interval": 6, "per_device_train_batch_size": 4, "warmup_steps": 1}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> world.World:
    """A world that is made, of two domains and 20 kB of text."""
    folder = tmp_path_factory.mktemp("world")
    texts = {
        name: file.read_text("utf-8").splitlines()
        for name, file in write_corpus(folder, characters=1500).items()
    }
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    described = world.World.model_validate(
        {
            "folder": str(folder / "world"),
            "characters": dict.fromkeys(texts, 10_000),
            "vocab_size": 300,
            "seq_length": 64,
            "validation_rows": 6,
            "teacher": shape,
            "student": shape,
            "teacher_training": {"strategy": "proportional", "learning_rate": 0.02, **TRAINING},
            "student_training": {"strategy": "uniform", **TRAINING, "max_steps": 1},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_data, "DOMAINS", {name: lambda t=t: iter(t) for name, t in texts.items()})
        world.make(described)
    return described


def test_teacher_has_learnt_and_is_made_once(small: world.World) -> None:
    run = read_run(small.root / "teacher")
    first, last = run.intervals[0], run.intervals[-1]
    for name in small.characters:
        assert last.student_ppl[name] < first.student_ppl[name] / 1.2
    weights = small.root / "teacher" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert world.make(small) == small.root / "teacher"
    assert weights.stat().st_mtime_ns == before


def test_students_differ_by_seed_alone(small: world.World) -> None:
    one, other = (world.make_student(small, seed) for seed in (0, 1))
    assert one != other
    weights = [(folder / "model.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] != weights[1]
    assert len(weights[0]) == len(weights[1])


def test_a_cache_of_the_world_holds_out_what_the_teacher_has_not_seen(
    small: world.World, tmp_path: Path
) -> None:
    config = world.build_config(small, tmp_path / "cache", {"kind": "topk", "top_k": 8})
    build_cache(config)
    labels, cache = open_cache(str(small.root / "labels")), open_cache(str(tmp_path / "cache"))
    for name in cache.domains:
        for split in ("train", "validation"):
            rows = [getattr(one[name], split) for one in (labels, cache)]
            found = [split.read(range(len(split)), targets=False).tokens for split in rows]
            np.testing.assert_array_equal(*found)
        assert cache[name].validation.read([0]).ids is not None  # KL to the teacher can be measured
        measured = read_run(small.root / "teacher").intervals[-1].student_ppl[name]
        # Both are float32 means over the same labels, one by whole documents, one by packed rows.
        assert math.exp(cache[name].teacher_cross_entropy) == pytest.approx(measured, rel=1e-4)
