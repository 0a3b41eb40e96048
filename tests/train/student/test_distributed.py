"""Two gloo processes on the CPU against one: the same numbers; and a lost process ends a run."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from helpers.processes import train_on_two
from helpers.training import ROWS, read_lines, stored_tensors
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ddk_cache import open_cache
from ddk_train.config import TrainConfig
from ddk_train.data.batches import make_batch
from ddk_train.student.distributed import shard
from ddk_train.student.files import load_model
from ddk_train.student.student import Student
from ddk_train.student.tokenizer import load_tokenizer
from ddk_train.train import train


def by_torchrun(*arguments: str) -> str:
    """Run the command as a user does; return its stderr."""
    folder = Path(sys.executable).parent
    torchrun = [str(folder / "torchrun"), "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run(
        [*torchrun, str(folder / "ddk-cache"), "train", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def done_on_two(*arguments: str) -> str:
    """Run the command on two processes; return the stderr of the first, which logs."""
    codes, logs = train_on_two(*arguments)
    assert codes == (0, 0), "\n".join(logs)
    return logs[0]


def write_config(config: TrainConfig, path: Path, **changes: Any) -> str:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json") | changes))
    return str(path)


def assert_same_numbers(run: Path, other: Path) -> None:
    for line, expected in zip(read_lines(run, "metrics"), read_lines(other, "metrics"), strict=True):
        assert line["tokens"] == expected["tokens"]
        for key in ("loss", "cross_entropy", "kl", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4)
    for line, expected in zip(read_lines(run, "discrepancy"), read_lines(other, "discrepancy"), strict=True):
        assert line["rows"] == expected["rows"]
        for domain, perplexity in expected["student_ppl"].items():
            assert line["student_ppl"][domain] == pytest.approx(perplexity, rel=1e-4)
            assert line["standard_error"][domain] == pytest.approx(
                expected["standard_error"][domain], rel=1e-3
            )
    # After training a sampled token may differ, by rounding.
    samples, expected_samples = read_lines(run, "samples"), read_lines(other, "samples")
    assert len(samples) == len(expected_samples) == 2 * len(ROWS)
    assert samples[: len(ROWS)] == expected_samples[: len(ROWS)]
    weights, expected_weights = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], atol=1e-4, rtol=1e-3)


def assert_resumes_exactly(path: str, run: Path) -> None:
    """Remove the end of a finished run and resume it: metrics, weights and states must be as before."""
    whole = shutil.copytree(run, run.with_name(f"{run.name}-whole"))
    shutil.rmtree(run / "checkpoint-10")
    (run / "model.safetensors").unlink()
    assert f"resumed from {run / 'checkpoint-5'}" in done_on_two(path, "--resume")
    resumed, before = (
        load_file(folder / "model.safetensors") | stored_tensors(folder, 10) for folder in (run, whole)
    )
    assert resumed.keys() == before.keys()
    assert all(torch.equal(resumed[key], before[key]) for key in before)
    numbers, expected = (
        [
            [line[key] for key in ("step", "loss", "tokens", "grad_norm")]
            for line in read_lines(folder, "metrics")
        ]
        for folder in (run, whole)
    )
    assert numbers == expected


@pytest.fixture
def tied_student(tmp_path: Path, student_folder: Path) -> Path:
    """Make a student whose head is its embedding, with more than one layer."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(
        student_folder, num_hidden_layers=2, tie_word_embeddings=True
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    transformers.AutoTokenizer.from_pretrained(student_folder).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def test_two_processes_give_what_one_gives(make_config: Any, tied_student: Path, tmp_path: Path) -> None:
    # Five validation rows a domain and batches of two: shares are uneven, and one of them is empty.
    one = make_config(student=str(tied_student), output_dir=str(tmp_path / "one"), logging_steps=1)
    train(one)
    half = {"per_device_train_batch_size": 2}
    ddp = write_config(one, tmp_path / "ddp.yaml", output_dir=str(tmp_path / "ddp"), **half)
    log = by_torchrun(ddp)
    assert log.count("step 1/10") == 1  # one process logs
    assert_same_numbers(tmp_path / "ddp", tmp_path / "one")

    fsdp = write_config(one, tmp_path / "fsdp.yaml", output_dir=str(tmp_path / "fsdp"), fsdp=True, **half)
    done_on_two(fsdp)
    assert_same_numbers(tmp_path / "fsdp", tmp_path / "one")

    assert_resumes_exactly(fsdp, tmp_path / "fsdp")
    paths = sorted((tmp_path / "fsdp" / "checkpoint-10").glob("*.safetensors"))
    shards = [load_file(path)["weight/model.model.embed_tokens.weight"] for path in paths]
    assert [len(shard) for shard in shards] == [200, 200]  # of 400 tokens

    # Half of a run by as many processes as began it, the other half by more or fewer.
    fewer = shutil.copytree(tmp_path / "fsdp", tmp_path / "fewer")
    more = shutil.copytree(tmp_path / "one", tmp_path / "more")
    for run in (fewer, more):
        shutil.rmtree(run / "checkpoint-10")
    train(one.model_copy(update={"output_dir": str(fewer)}), resume=True)
    done_on_two(
        write_config(one, tmp_path / "more.yaml", output_dir=str(more), fsdp=True, **half), "--resume"
    )
    for run in (fewer, more):
        assert_same_numbers(run, tmp_path / "one")


def test_one_process_prints_the_plan_of_a_dry_run(make_config: Any, tmp_path: Path) -> None:
    codes, lines = train_on_two(write_config(make_config(), tmp_path / "train.yaml"), "--dry-run")
    assert codes == (0, 0)
    assert ["max_steps: 10" in printed for printed in lines] == [True, False]


def test_documents_as_rows_work_with_fsdp(make_config: Any, student_folder: Path, tmp_path: Path) -> None:
    """A student that cannot pack, in bfloat16; processes would differ in how often they call its layers."""
    torch.manual_seed(0)
    shape = transformers.BloomConfig(vocab_size=400, hidden_size=16, n_layer=2, n_head=2)
    transformers.BloomForCausalLM(shape).bfloat16().save_pretrained(tmp_path / "bloom")
    transformers.AutoTokenizer.from_pretrained(student_folder).save_pretrained(tmp_path / "bloom")
    one = make_config(student=str(tmp_path / "bloom"), output_dir=str(tmp_path / "one"), logging_steps=1)
    train(one)
    two = {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 2, "fsdp": True}
    log = done_on_two(write_config(one, tmp_path / "two.yaml", **two))
    assert "each document a row" in log
    assert_same_numbers(tmp_path / "two", tmp_path / "one")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[DeviceMesh]:
    """Make a group of one process, in which a student can be sharded."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_student_sees_the_targets_as_they_are(make_config: Any, alone: DeviceMesh) -> None:
    """bfloat16 is for weights and activations: a teacher's log-probability of -8 would be 0.016 nat off."""
    config = make_config(bf16=True)
    cache = open_cache(config.cache)
    students = [Student(load_model(config, cache, load_tokenizer(config, cache)), config) for _ in range(2)]
    batch = make_batch({0: cache["code"].train.read(range(8))}, 400)
    for student in students:
        # A student that says the same of every token: KL is a function of the targets alone.
        torch.nn.init.zeros_(student.inner.get_output_embeddings().weight)
    sharded = shard(students[1], alone, bf16=True)
    expected, actual = (student(batch, 0.5) for student in (students[0], sharded))
    assert actual.kl.item() == pytest.approx(expected.kl.item(), rel=1e-6)


def test_two_processes_resume_as_if_never_stopped(make_config: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = write_config(
        make_config(per_device_train_batch_size=2), tmp_path / "ddp.yaml", output_dir=str(run)
    )
    done_on_two(path)
    assert_resumes_exactly(path, run)


def test_sharded_adapters_in_bfloat16_with_checkpointing(
    make_config: Any, student_folder: Path, tmp_path: Path
) -> None:
    one = make_config(
        output_dir=str(tmp_path / "one"),
        bf16=True,
        gradient_checkpointing=True,
        lora={"r": 4, "merge": True},
    )
    train(one)
    two = {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 2, "fsdp": True}
    done_on_two(write_config(one, tmp_path / "two.yaml", **two))
    for line, expected in zip(
        read_lines(tmp_path / "two", "metrics"), read_lines(tmp_path / "one", "metrics"), strict=True
    ):
        for key in ("loss", "cross_entropy", "kl"):
            assert line[key] == pytest.approx(expected[key], rel=1e-3)
    after, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "two", student_folder))
    assert after.keys() == before.keys()
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert (after[layer].float() - before[layer].float()).abs().max() > 1e-3  # the adapters are in it


@pytest.mark.parametrize(
    ("fault", "codes", "message"),
    [
        ("killed", (1, -signal.SIGKILL), ""),
        ("memory", (1, 1), "the GPU's memory is full"),
        ("reader", (1, 1), "code/train, shard 0: the checksum does not match"),
    ],
)
def test_trouble_in_one_process_ends_all(
    make_config: Any, tmp_path: Path, fault: str, codes: tuple[int, int], message: str
) -> None:
    exit_codes, lines = train_on_two(write_config(make_config(), tmp_path / "train.yaml"), fault=fault)
    assert exit_codes == codes
    assert "Error: process 0 of 2 lost contact with the others: " in lines[0]
    assert message in lines[1]


@pytest.mark.parametrize(
    ("fault", "step", "fsdp"),
    [("signal", 3, False), ("measuring", 4, True)],  # within a measurement FSDP2's root is gathered
)
def test_a_signal_to_one_process_stops_all(
    make_config: Any, tmp_path: Path, fault: str, step: int, fsdp: bool
) -> None:
    path = write_config(make_config(fsdp=fsdp), tmp_path / "train.yaml")
    codes, lines = train_on_two(path, fault=fault)
    assert codes == (143, 143)
    saved = tmp_path / "run" / f"checkpoint-{step}"
    message = f"stopped by SIGTERM: {saved} is saved, --resume continues from it"
    assert [message in lines[rank].splitlines() for rank in (0, 1)] == [True, False]
    # The other half of the run is done by one process, with batches as large as both had.
    whole = make_config(per_device_train_batch_size=8, output_dir=str(tmp_path / "whole"))
    train(whole)
    train(make_config(per_device_train_batch_size=8), resume=True)
    assert_same_numbers(tmp_path / "run", tmp_path / "whole")
