"""Generation with the real vLLM: its own tokens, their log-probabilities, and a kill in between."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers.documents import write_rows
from helpers.models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import ddk_cache
from ddk_build.build import build_cache
from ddk_build.config import BuildConfig
from ddk_train import TrainConfig, train

TESTS = Path(__file__).parents[2]
CHATS = [
    [
        {"role": "system", "content": "You watch the fox."},
        {"role": "user", "content": f"print {number}"},
        {"role": "assistant", "content": "for index in range(10)"},
        {"role": "user", "content": f"add {number} and {7 * number}"},
        {"role": "assistant", "content": "an answer of another model"},
    ]
    for number in range(10)
]
TEXTS = [f"def add(a, b): return {number}" for number in range(6)]
SAMPLES = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), seed=1, hidden=128)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Return the folder of what ``helpers/generate_run.py`` leaves."""
    folder = tmp_path_factory.mktemp("runs")
    config = {
        "model": str(model),
        "dtype": "float32",
        "engine_args": {
            "enforce_eager": True,
            "num_gpu_blocks_override": 64,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,  # less than 8 prompts have: a step must not cut one
        },
        "output": "given by the run",
        "seed": 3,
        "sampling": {"max_tokens": 16, "samples": SAMPLES, "top_p": 0.95},
        "shard_tokens": 4 * 16 * SAMPLES,
        "domains": {
            "chat": {
                "path": write_rows(folder / "chats.jsonl", [{"conversation": chat} for chat in CHATS]),
                "messages_column": "conversation",
            },
            "text": {
                "path": write_rows(folder / "texts.jsonl", [{"start": text} for text in TEXTS]),
                "prompt_column": "start",
                "prompt_format": "plain",
            },
        },
    }
    (folder / "generate.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, TESTS / "helpers" / "generate_run.py", folder],
        env=os.environ | environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {
        "PYTHONPATH": f"{TESTS.parent}:{TESTS.parent / 'stages'}:{TESTS}",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }


def read(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_every_prompt_has_its_samples_in_order(runs: Path) -> None:
    for name, prompts in (("chat", CHATS), ("text", TEXTS)):
        rows = read(runs / "whole" / name)
        assert [row["sample"] for row in rows] == [*range(SAMPLES)] * len(prompts)
        assert len({row["prompt_id"] for row in rows}) == len(prompts)
        for row in rows:
            assert len(row["logprobs"]) == sum(row["loss_mask"]) <= 16
            assert (row["finish_reason"] == "length") == (row["tokens"][-1] != 0)


def test_only_what_the_model_wrote_carries_loss(runs: Path, model: Path) -> None:
    """Not the assistant's earlier turn; the data's own last answer is not there at all."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    for index, row in enumerate(read(runs / "whole" / "chat")):
        written = row["loss_mask"].index(True)
        assert all(row["loss_mask"][written:])
        prompt = tokenizer.apply_chat_template(
            CHATS[index // SAMPLES][:-1], add_generation_prompt=True, tokenize=False
        )
        assert tokenizer.decode(row["tokens"][:written]) == prompt
        text = tokenizer.decode(row["tokens"][written:], skip_special_tokens=True)
        assert row["text"].rstrip("\ufffd") == str(text).rstrip(
            "\ufffd"
        )  # vLLM drops half a character at the end
    for index, row in enumerate(read(runs / "whole" / "text")):
        written = row["loss_mask"].index(True)
        assert row["tokens"][:written] == tokenizer(TEXTS[index // SAMPLES])["input_ids"]


def test_tokens_are_the_ones_that_the_engine_chose(runs: Path, model: Path) -> None:
    """Their log-probabilities are the model's; text that is tokenised again gives others."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    changed = 0
    for row in read(runs / "whole" / "chat") + read(runs / "whole" / "text"):
        tokens = torch.tensor(row["tokens"])
        with torch.no_grad():
            logprobs = network(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0]
        written = row["loss_mask"].index(True)
        torch.testing.assert_close(logprobs[written - 1 :], torch.tensor(row["logprobs"]), atol=1e-3, rtol=0)
        again = tokenizer(tokenizer.decode(row["tokens"]))["input_ids"]
        changed += again != row["tokens"]
    assert changed > 5


@pytest.fixture(scope="module")
def cache_folder(runs: Path, model: Path) -> Path:
    """Return the cache of both domains, with the writer as its own teacher."""
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": str(model), "engine": "transformers", "dtype": "float32"},
            "cache": str(runs / "cache"),
            "seq_length": 128,
            "target": {"kind": "label"},
            "validation_rows": 2,
            "domains": {name: {"path": str(runs / "whole" / name)} for name in ("chat", "text")},
        }
    )
    build_cache(config)
    return runs / "cache"


def test_from_generation_to_a_cache_that_opens(runs: Path, model: Path, cache_folder: Path) -> None:
    """The teacher gives every token the log-probability that it had when it was written."""
    cache = ddk_cache.open_cache(cache_folder)
    for name in cache.domains:
        written = 0
        for split in (cache[name].train, cache[name].validation):
            rows = split.read(range(len(split)))
            assert rows.writer_logprob is not None
            assert rows.label_logprob is not None
            # Half a step of the grid, and rounding.
            np.testing.assert_allclose(rows.writer_logprob, rows.label_logprob, rtol=0, atol=1 / 512 + 1e-3)
            written += int(rows.loss_mask.sum())
        assert written == sum(len(row["logprobs"]) for row in read(runs / "whole" / name))
        assert cache.manifest.domain(name).source["writer"]["model"] == str(model)


def test_a_student_that_has_not_moved_since_it_wrote(runs: Path, model: Path, cache_folder: Path) -> None:
    """Its importance is 1 at every token; and with itself as the teacher there is nothing to learn."""
    config = TrainConfig.model_validate(
        {
            "cache": str(cache_folder),
            "student": str(model),
            "output_dir": str(runs / "student"),
            "gamma": 0,
            "cross_entropy_weight": 0,
            "policy_gradient_weight": 1,
            "max_steps": 1,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "bf16": False,
            "report_to": "none",
        }
    )
    line = json.loads((train(config) / "metrics.jsonl").read_text().splitlines()[0])
    # The grid of 1/256, and rounding.
    assert line["importance"] == pytest.approx(1, abs=1 / 512 + 1e-3)
    assert line["importance_spread"] < 1 / 256
    assert line["advantage"] == pytest.approx(0, abs=1e-3)
    assert line["left_out"] == 0


def test_a_killed_run_resumes_to_the_same_bytes(runs: Path) -> None:
    assert int((runs / "signal").read_text()) == -signal.SIGKILL
    assert len((runs / "after").read_text().split()) == 2
    whole, resumed = (
        {str(path.relative_to(runs / name)): path.read_bytes() for path in (runs / name).rglob("*.parquet")}
        for name in ("whole", "killed")
    )
    assert len(whole) == 3 + 2
    assert resumed == whole


def test_two_engines_on_ray_write_the_same_bytes(runs: Path) -> None:
    pytest.importorskip("ray")
    code = "from ddk_cache.cli.main import main; main()"
    output = runs / "ray"
    command = ["generate", str(runs / "generate.yaml"), "--ray", "--num-engines", "2"]
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        done = subprocess.run(
            [sys.executable, "-c", code, *command, "--set", f"output={output}"],
            env=os.environ | environment(runs) | {"RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "chat: 10 prompts, 20 completions (" in done.stdout
    for path in (runs / "whole").rglob("*.parquet"):
        assert (output / path.relative_to(runs / "whole")).read_bytes() == path.read_bytes()


def test_a_stop_text_may_be_a_special_token(runs: Path) -> None:
    ends = [
        row["tokens"][len(row["tokens"]) - sum(row["loss_mask"]) :] for row in read(runs / "stopped" / "chat")
    ]
    stopped = [tokens for tokens in ends if 2 in tokens]  # <|im_end|>
    assert stopped
    assert all(tokens.index(2) == len(tokens) - 1 for tokens in stopped)


def test_the_note_says_who_wrote(runs: Path, model: Path) -> None:
    note = json.loads((runs / "killed" / "generate.json").read_text())
    assert note["writer"]["model"] == str(model)
    assert note["writer"]["weights"].startswith("sha256:")
    assert note["sampling"]["top_p"] == 0.95
    assert note["domains"]["chat"]["completions"] == SAMPLES * len(CHATS)
    assert note["versions"].keys() >= {"vllm", "ddk-cache"}
