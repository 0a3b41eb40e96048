"""Two rounds with real engines: the student writes, the teacher scores, the student trains."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.commands import ddk_cache
from helpers.documents import write_rows
from helpers.models import make_model
from helpers.training import read_lines

import ddk_cache as library

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of two rounds that have run."""
    folder = tmp_path_factory.mktemp("rounds")
    engine = {"dtype": "float32", "engine_args": {"enforce_eager": True, "num_gpu_blocks_override": 64}}
    prompts = [{"question": f"print {index} and the sum"} for index in range(24)]
    config = {
        "student": str(make_model(folder / "student", hidden=128)),
        "output": str(folder / "rounds"),
        "rounds": 2,
        "generate": engine
        | {
            "sampling": {"max_tokens": 24},
            "domains": {
                "ask": {"path": write_rows(folder / "p.jsonl", prompts), "prompt_column": "question"}
            },
        },
        "build": {
            "teacher": {
                "model": str(make_model(folder / "teacher", seed=1, hidden=128)),
                "engine": "transformers",  # starts faster
                "dtype": "float32",
            },
            "seq_length": 64,
            "target": {"kind": "label"},
            "validation_rows": 2,
        },
        "train": {
            "max_steps": 8,
            "distill_interval": 8,
            "max_epochs": 100,
            "per_device_train_batch_size": 2,
            "learning_rate": 1.0e-3,
            "warmup_steps": 0,
            "bf16": False,
            "logging_steps": 4,
            "sample_tokens": 0,
            "report_to": "none",
        },
    }
    (folder / "rounds.yaml").write_text(yaml.safe_dump(config))
    done = ddk_cache("rounds", folder / "rounds.yaml", **ENVIRONMENT)
    assert done.code == 0, done.err
    return folder / "rounds"


def test_the_second_round_trains_on_both_texts(folder: Path) -> None:
    line = read_lines(folder / "round-2" / "student", "metrics")[-1]
    assert line["reverse_kl"] > 0  # the student writes what it finds likelier than the teacher does
    assert {"left_out/ask-1", "left_out/ask-2"} <= line.keys()
    assert line["importance/ask-2"] == pytest.approx(1, abs=0.5)


def test_the_writer_of_a_round_is_the_student_of_the_round_before(folder: Path) -> None:
    rows = library.open_cache(folder / "round-2" / "cache")["ask-2"].train.read([0])
    assert rows.writer_logprob is not None
    assert np.isfinite(rows.writer_logprob[rows.loss_mask]).all()
    note = yaml.safe_load((folder / "round-2" / "text" / "generate.json").read_text())
    assert str(folder / "round-1" / "student") in yaml.safe_dump(note)
