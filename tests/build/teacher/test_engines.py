"""Both engines on one teacher: against each other, against vLLM's public path, and when things go wrong."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from helpers import engine_run
from helpers.builds import write_config, write_corpus
from helpers.models import make_model

from ddk_build.config import TeacherConfig
from ddk_build.teacher import vllm_arguments, vllm_check
from ddk_build.teacher import vllm_engine as teacher_vllm
from ddk_build.teacher.engines import Answers, Teacher, check_teacher, load_teacher
from ddk_build.teacher.transformers_engine import TransformersTeacher
from ddk_cache.cli.main import main
from ddk_cache.errors import ConfigError
from ddk_cache.format.layout import Target

Results = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, the least that vLLM's CPU attention takes."""
    folder: Path = make_model(tmp_path_factory.mktemp("engines"), seed=1, hidden=128)
    return folder


def run_engines(model: Path, folder: Path, **engines: dict[str, Any]) -> dict[str, Results]:
    """Return the answers of an engine of each dtype, with these arguments."""
    done = subprocess.run(
        [sys.executable, engine_run.__file__, str(model), str(folder), json.dumps(engines)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {dtype: dict(np.load(folder / f"{dtype}.npz")) for dtype in engines}


@pytest.fixture(scope="session")
def vllm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """Return the answers of two engines, run in turn in one process: its start takes longer than both.

    In float32 steps of 64 tokens: every long document is prefilled in chunks, and so are some short ones.
    In bfloat16 the head in float32, and once in bfloat16.
    """
    return run_engines(
        model,
        tmp_path_factory.mktemp("answers"),
        float32={"max_num_batched_tokens": 64},
        bfloat16={"head_dtype": "float32"},
    )


@pytest.fixture(scope="session")
def vllm_float32(vllm: dict[str, Results]) -> Results:
    return vllm["float32"]


@pytest.fixture(scope="session")
def vllm_bfloat16(vllm: dict[str, Results]) -> Results:
    return vllm["bfloat16"]


def reference(model: Path, target: Target, dtype: str = "float32") -> Teacher:
    config = TeacherConfig(model=str(model), engine="transformers", dtype=dtype)
    return load_teacher(config, target, engine_run.MAX_LENGTH)


def by_id(ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """[N, 401]: each token's log-probability; -inf where it is absent."""
    results = np.full((len(ids), 401), -np.inf)
    np.put_along_axis(results, ids.astype(np.int64), logprobs, axis=1)  # -1, absent, is the last column
    return results


def assert_close(results: Results, name: str, expected: Answers, tolerance: float) -> None:
    """Assert equal entries; two that are closer than the engines may be swapped."""
    np.testing.assert_allclose(
        by_id(results[f"{name}.ids"], results[f"{name}.logprobs"]),
        by_id(expected.ids, expected.logprobs),
        atol=tolerance,
        rtol=0,
    )
    for field in ("logprobs", "tail_logprob", "label_logprob"):
        np.testing.assert_allclose(
            results[f"{name}.{field}"], getattr(expected, field), atol=tolerance, rtol=0
        )


def test_the_reference_is_aligned_with_the_next_token(model: Path) -> None:
    """Against transformers by hand; a shift by one changes every answer."""
    from transformers import AutoModelForCausalLM

    document = engine_run.documents()[1]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logprobs = plain(torch.tensor(document[None].astype(np.int64))).logits[0].log_softmax(-1).numpy()
    answers = reference(model, Target(top_k=16)).score([document])
    expected = logprobs[np.arange(127), document[1:]]
    np.testing.assert_allclose(answers.label_logprob, expected, atol=1e-5)
    assert np.array_equal(answers.ids[:, 0], logprobs[:-1].argmax(-1))
    assert np.abs(answers.label_logprob[1:] - expected[:-1]).mean() > 1


@pytest.mark.parametrize("name", ["topk", "nucleus", "warm"])
def test_vllm_answers_as_transformers(vllm_float32: Results, model: Path, name: str) -> None:
    assert vllm_float32["fast"]
    expected = reference(model, engine_run.TARGETS[name]).score(engine_run.documents())
    assert_close(vllm_float32, name, expected, 2e-4)


def test_vllm_draws_as_transformers(vllm_float32: Results, model: Path) -> None:
    """A point within the engines' difference of a token's edge may fall on the other side."""
    target = engine_run.TARGETS["sampled"]
    expected = reference(model, target).score(engine_run.documents(), engine_run.offsets())
    same = (vllm_float32["sampled.ids"] == expected.ids).all(-1)
    assert same.mean() > 0.95
    np.testing.assert_array_equal(vllm_float32["sampled.logprobs"][same], expected.logprobs[same])
    assert (vllm_float32["sampled.tail_logprob"] == -np.inf).all()
    np.testing.assert_allclose(vllm_float32["sampled.label_logprob"], expected.label_logprob, atol=2e-4)


def test_an_answer_does_not_depend_on_the_other_documents(vllm_float32: Results) -> None:
    """Together they share steps and are cut into other chunks than alone."""
    alone = Answers(*(vllm_float32[f"alone.{f}"] for f in Answers.__dataclass_fields__))
    assert_close(vllm_float32, "topk", alone, 2e-5)


def test_labels_alone(vllm_float32: Results) -> None:
    assert vllm_float32["labels.ids"].shape == vllm_float32["labels.logprobs"].shape == (499, 0)
    assert (vllm_float32["labels.tail_logprob"] == -np.inf).all()
    np.testing.assert_allclose(
        vllm_float32["labels.label_logprob"], vllm_float32["topk.label_logprob"], atol=1e-5
    )


def assert_dies_in_one_line(results: Results) -> None:
    """Out of memory is no reason to retry where other processes wait; nor is a process that was killed."""
    assert str(results["no_memory"]) == (
        "ConfigError: teacher: out of memory in vLLM's processes: lower "
        "teacher.engine_args.max_num_batched_tokens or teacher.engine_args.gpu_memory_utilization"
    )
    assert str(results["killed"]).startswith("EngineDiedError: teacher: vLLM's processes failed: ")
    assert "\n" not in str(results["killed"])


def test_an_engine_core_in_its_own_process(
    vllm_float32: Results, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    results = run_engines(model, tmp_path, float32={})["float32"]
    assert results["fast"]
    alone = Answers(*(vllm_float32[f"topk.{field}"] for field in Answers.__dataclass_fields__))
    assert_close(results, "topk", alone, 2e-5)
    assert_dies_in_one_line(results)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each worker needs a core")
def test_two_workers_answer_as_one(
    vllm_float32: Results, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor parallelism: each worker computes half of every layer and of the head; the first answers."""
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    results = run_engines(model, tmp_path, float32={"tensor_parallel_size": 2})["float32"]
    assert results["fast"]
    assert results["answering"].tolist() == [True, False]
    alone = Answers(*(vllm_float32[f"topk.{field}"] for field in Answers.__dataclass_fields__))
    assert_close(results, "topk", alone, 1e-4)  # sums in another order: 2.4e-5 was seen
    assert_dies_in_one_line(results)


def test_steps_pass_from_one_call_to_the_next(vllm_float32: Results) -> None:
    """All but the last are full, and the answers are those of one call."""
    *full, last = vllm_float32["ahead_tokens"]
    assert {*full} == {64}
    assert 0 < last <= 64
    for field in ("logprobs", "tail_logprob", "label_logprob"):
        np.testing.assert_allclose(vllm_float32[f"ahead.{field}"], vllm_float32[f"topk.{field}"], atol=1e-5)


def test_the_probe_fills_a_step_and_is_cut_by_it(vllm_float32: Results) -> None:
    assert vllm_float32["probe_fast"]
    assert vllm_float32["probe_tokens"].max() == 64
    assert vllm_float32["probe_parts"] == 2


def answers(labels: np.ndarray) -> Answers:
    """Answers [N] whose only entry is the label."""
    absent = np.full(len(labels), -np.inf, np.float32)
    return Answers(np.zeros((len(labels), 1), np.int32), labels[:, None], absent, labels)


@pytest.mark.parametrize("wrong", [0.0, 1.8])
def test_a_hook_that_is_wrong_in_a_few_rows_is_found_out(wrong: float) -> None:
    """By 1.8 nats in one of 30 rows: 0.06 on average, less than bfloat16's noise."""
    public = answers(np.full(95, -3, np.float32))
    fast = answers(public.label_logprob - np.float32(wrong) * (np.arange(95) % 30 == 0))
    engine = MagicMock(version="0.32.0", vocab_size=400, step_tokens=64, step_documents=8)
    engine.public_answers.return_value, engine.answer.return_value = public, fast
    problem = vllm_check.problem(engine, Target(), 0.1, 128)
    differ = "the fast path and vLLM 0.32.0's prompt_logprobs differ by 0.076 nats on average, 1.8 at most"
    assert problem == (differ if wrong else None)


def test_draws_are_compared_with_the_probabilities() -> None:
    """0.62 is drawn 14 or 15 times of 24, not 7 times."""
    ids, absent = np.array([[3, 5]], np.int32), np.full(1, -np.inf, np.float32)
    public = Answers(ids, np.log([[0.62, 0.38]]).astype(np.float32), absent, absent)

    def drawn(counts: list[int]) -> Answers:
        return Answers(ids[:, ::-1], np.log(np.array([counts], np.float32) / 24), absent, absent)

    assert vllm_check.draw_difference(drawn([9, 15]), public) < 1 / 24
    assert vllm_check.draw_difference(drawn([17, 7]), public) > 0.3


@pytest.mark.parametrize("name", ["topk", "nucleus"])
def test_the_fast_path_equals_the_public_one(vllm_float32: Results, name: str) -> None:
    public = "public" if name == "topk" else "public_nucleus"
    assert np.array_equal(vllm_float32[f"{public}.ids"], vllm_float32[f"{name}.ids"])
    for field in ("logprobs", "label_logprob"):
        np.testing.assert_allclose(
            vllm_float32[f"{public}.{field}"], vllm_float32[f"{name}.{field}"], atol=1e-5
        )
    np.testing.assert_allclose(
        vllm_float32[f"{public}.tail_logprob"], vllm_float32[f"{name}.tail_logprob"], atol=1e-3
    )


def test_a_teacher_answers_after_an_error(vllm_float32: Results) -> None:
    np.testing.assert_allclose(
        vllm_float32["after_failure.label_logprob"], vllm_float32["topk.label_logprob"], atol=1e-5
    )


def test_a_hook_that_fails_falls_back_with_one_line(vllm_float32: Results) -> None:
    """Where it cannot be installed, and where it raises."""
    version = str(vllm_float32["version"])
    warnings = [line for line in vllm_float32["log"] if "slower" in line]
    assert warnings == [
        f"the fast path fails with vLLM {version} ({error}no attribute 'query_start_loc'): "
        "capturing through the slower public prompt_logprobs"
        for error in ("", "AttributeError: ")
    ]
    for name, key in (("sampled", "target.kind: sampled"), ("warm", "target.temperature: 2.0")):
        refusal = str(vllm_float32[f"refused_{name}"])
        assert refusal.startswith(f"{key} cannot be made from vLLM's public prompt_logprobs")
        assert f"the fast path fails with vLLM {version} (vLLM did not call the hook)" in refusal
    np.testing.assert_allclose(
        vllm_float32["public_labels.label_logprob"], vllm_float32["topk.label_logprob"], atol=1e-5
    )


def test_out_of_memory_sends_less_then_names_the_settings(vllm_float32: Results, model: Path) -> None:
    short = [document[:30] for document in engine_run.documents()]
    expected = reference(model, engine_run.TARGETS["topk"]).score(short)
    assert_close(vllm_float32, "little_memory", expected, 2e-4)
    assert_close(vllm_float32, "enough_memory", expected, 2e-4)
    assert "out of memory: retrying with 32 tokens a call" in vllm_float32["log"]
    advice = str(vllm_float32["no_memory"])
    assert "teacher.engine_args.max_num_batched_tokens" in advice
    assert "teacher.engine_args.gpu_memory_utilization" in advice


def test_bfloat16_is_within_its_noise(vllm_bfloat16: Results, model: Path) -> None:
    assert vllm_bfloat16["fast"]
    exact = reference(model, engine_run.TARGETS["topk"]).score(engine_run.documents())
    same_type = reference(model, engine_run.TARGETS["topk"], "bfloat16").score(engine_run.documents())
    noise = np.abs(same_type.label_logprob - exact.label_logprob).mean()
    difference = np.abs(vllm_bfloat16["topk.label_logprob"] - exact.label_logprob).mean()
    assert difference < 2 * noise


def test_a_float32_head_is_the_product_in_float32(vllm_bfloat16: Results, model: Path) -> None:
    """In vLLM of the same hidden states; in transformers of its own, whose embeddings keep their type."""
    assert vllm_bfloat16["head_dtype"] == "torch.float32"
    assert vllm_bfloat16["head_error"] < 1e-5
    teacher = load_teacher(
        TeacherConfig(model=str(model), engine="transformers", head_dtype="float32"), Target(top_k=16), 128
    )
    assert isinstance(teacher, TransformersTeacher)
    document = engine_run.documents()[1]
    with torch.no_grad():
        hidden = teacher.model.model(torch.from_numpy(document[None].astype(np.int64))).last_hidden_state[0]
        exact = (hidden.float() @ teacher.model.lm_head.weight.float().T).log_softmax(-1).numpy()
    assert hidden.dtype == teacher.model.lm_head.weight.dtype == torch.bfloat16
    labels = exact[np.arange(len(document) - 1), document[1:]]
    np.testing.assert_allclose(teacher.score([document]).label_logprob, labels, atol=1e-5)


def test_a_float32_head_is_finer(vllm_bfloat16: Results) -> None:
    """Logits in bfloat16 have 8 significant bits: some of the best 16 are equal."""
    ties = {
        name: (np.diff(vllm_bfloat16[f"{name}.logprobs"]) == 0).mean() for name in ("topk", "bfloat16_head")
    }
    assert ties["topk"] < 0.001 < 0.01 < ties["bfloat16_head"]


def test_entries_and_tail_sum_to_one(vllm_bfloat16: Results) -> None:
    for name in engine_run.TARGETS:
        entries = np.exp(vllm_bfloat16[f"{name}.logprobs"].astype(np.float64)).sum(-1)
        total = entries + np.exp(vllm_bfloat16[f"{name}.tail_logprob"].astype(np.float64))
        np.testing.assert_allclose(total, 1, atol=1e-5)


def test_a_missing_engine_names_the_extra(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"vllm is not installed; pip install 'ddk-cache\[build\]'"):
        load_teacher(TeacherConfig(model=str(model)), Target(), 16)


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^teacher\.model: [^\n]*nothing") as caught:
        check_teacher(TeacherConfig(model=str(tmp_path / "nothing")), 16)
    assert "\n" not in str(caught.value)


def test_rows_longer_than_the_model_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="seq_length: 513 is more than the 512 positions of"):
        check_teacher(TeacherConfig(model=str(model)), 513)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("enable_prefix_caching=true", "must be false; cached positions have no logits"),
        ("kv_sharing_fast_prefill=true", "must be false; it skips layers at prompt positions"),
        ("logprobs_mode=processed_logprobs", "must be raw_logprobs; the other modes are not"),
        ("logprobs_mode=raw_logits", "must be raw_logprobs; the other modes are not"),
    ],
)
def test_arguments_that_change_the_logprobs_are_refused(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argument: str,
    message: str,
) -> None:
    path = write_config(tmp_path / "build.yaml", model, write_corpus(tmp_path))
    changes = ["--set", "teacher.engine=vllm", "--set", f"teacher.engine_args.{argument}"]
    monkeypatch.setattr(sys, "argv", ["ddk-cache", "build", str(path), *changes])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: {path}: teacher.engine_args.{argument.partition('=')[0]}: {message}")


def test_engine_args_override_the_defaults() -> None:
    config = TeacherConfig(
        model="teacher",
        engine_args={"max_num_batched_tokens": 512, "tensor_parallel_size": 2},
    )
    arguments = vllm_arguments.engine_arguments(config, Target(top_k=100), 2048)
    assert arguments["max_num_batched_tokens"] == 512
    assert arguments["tensor_parallel_size"] == 2
    assert arguments["max_logprobs"] == 100
    assert arguments["max_model_len"] == 2048  # long RoPE must not switch


def test_overrides_may_be_null() -> None:
    config = TeacherConfig(model="teacher", head_dtype="float32", engine_args={"hf_overrides": None})
    arguments = vllm_arguments.engine_arguments(config, Target(), 2048)
    assert arguments["hf_overrides"] == {"head_dtype": "float32"}


def test_cuda_is_asked_for_after_the_environment_is_set(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without NVML torch.cuda.is_available starts CUDA, and workers that are forked then cannot."""
    asked: list[tuple[str | None, str | None]] = []

    def is_available() -> bool:
        names = ("PYTORCH_NVML_BASED_CUDA_CHECK", "VLLM_WORKER_MULTIPROC_METHOD")
        asked.append((os.environ.get(names[0]), os.environ.get(names[1])))
        return False

    for name in ("PYTORCH_NVML_BASED_CUDA_CHECK", "VLLM_WORKER_MULTIPROC_METHOD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", is_available)
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = TeacherConfig(model=str(model))
    starts: list[Callable[[], object]] = [
        lambda: vllm_arguments.check_arguments(config, 16),
        lambda: teacher_vllm.load(config, Target(), 16),
    ]
    for start in starts:
        for name in ("PYTORCH_NVML_BASED_CUDA_CHECK", "VLLM_WORKER_MULTIPROC_METHOD"):
            os.environ.pop(name, None)
        with pytest.raises(ImportError):
            start()
    assert len(asked) >= 4
    assert set(asked) == {("1", "spawn")}


def test_a_vllm_for_gpus_on_a_machine_without_one_is_one_line(model: Path) -> None:
    """Its version decides: only the CPU build's has "cpu" in it."""
    code = (
        "import sys, vllm.platforms as platforms\n"
        "platforms.vllm_version_matches_substr = lambda part: False\n"
        "platforms._current_platform = None\n"
        "from ddk_build.config import TeacherConfig\n"
        "from ddk_build.teacher.engines import check_teacher\n"
        "check_teacher(TeacherConfig(model=sys.argv[1]), 16)"
    )
    command = [sys.executable, "-c", code, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert "ConfigError: teacher.engine: vLLM" in last
    assert "is built for GPUs and finds none on this machine: check nvidia-smi" in last


@pytest.mark.parametrize("level", [None, "WARNING"])
def test_warnings_of_vllm_about_the_model_are_logged_once(
    level: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not those about the machine, and none if VLLM_LOGGING_LEVEL lets vLLM print them itself."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", level or "ERROR")
    for name in vllm_arguments.ABOUT_THE_MODEL:  # another test may have added it
        logging.getLogger(name).removeHandler(vllm_arguments.FORWARD)
    monkeypatch.setattr(vllm_arguments, "FORWARD", vllm_arguments._Forward())
    vllm_arguments.prepare_environment()
    long_rope = logging.getLogger("vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope")
    for length in (4097, 4098):  # from the same line of its code
        long_rope.warning("Using LongRoPE scaling\n  factors (%d tokens)", length)
    logging.getLogger("vllm.v1.worker.cpu_worker").warning("libtcmalloc is not results")
    for name in vllm_arguments.ABOUT_THE_MODEL:
        logging.getLogger(name).removeHandler(vllm_arguments.FORWARD)
    ours = [
        record.getMessage() for record in caplog.records if record.name == "ddk_build.teacher.vllm_arguments"
    ]
    assert ours == ([] if level else ["vLLM: Using LongRoPE scaling factors (4097 tokens)"])


def test_a_wrong_engine_argument_is_one_line(model: Path) -> None:
    config = TeacherConfig(model=str(model), engine="transformers", engine_args={"attn_implementation": "no"})
    with pytest.raises(ConfigError, match=r"^teacher: transformers cannot load it: ") as caught:
        load_teacher(config, Target(), 16)
    assert "\n" not in str(caught.value)


def test_an_error_of_vllms_first_step_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of Mamba's kernel, which the CPU build lacks: the engine has started by then."""
    vllm = MagicMock(__version__="0.32.0")
    config = vllm.LLM.return_value.llm_engine.vllm_config
    config.model_config.hf_text_config.vocab_size = 400
    config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs = 64, 8
    vllm.LLM.return_value.generate.side_effect = AttributeError("no attribute\n'selective_scan_fwd'")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    with pytest.raises(ConfigError) as caught:
        teacher_vllm.load(TeacherConfig(model=str(model)), Target(), 16)
    assert str(caught.value) == (
        "teacher: vLLM cannot run llama: no attribute 'selective_scan_fwd'; use teacher.engine: "
        "transformers, or see vLLM's log with VLLM_LOGGING_LEVEL=INFO"
    )


def test_logits_that_are_not_numbers_are_refused() -> None:
    ids, logprobs, tail = np.empty((2, 0), np.int32), np.empty((2, 0), np.float32), np.zeros(2, np.float32)
    with pytest.raises(ConfigError, match=r"teacher\.dtype: the teacher's logits are not numbers"):
        Answers(ids, logprobs, tail, np.array([-1.0, np.nan], np.float32))


@pytest.mark.parametrize(("binding", "most"), [("auto", 1), ("0-1", 1), ("0-1|2-3", 2)])
def test_more_processes_than_memory_nodes_are_refused(
    monkeypatch: pytest.MonkeyPatch, binding: str, most: int
) -> None:
    monkeypatch.setattr(vllm_arguments, "glob", lambda pattern: ["node0"])
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    vllm_arguments._check_nodes("teacher.", most)
    line = rf"^teacher\.engine_args: .* ask for {most + 1} GPUs, and this machine has none; .* allow {most}:"
    with pytest.raises(ConfigError, match=line):
        vllm_arguments._check_nodes("teacher.", most + 1)
