"""The worker's side: chunks of documents in, answers out, in any order; and the hooks of both runners."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddk_build.teacher import capture
from ddk_build.teacher.capture import (
    DOCUMENT,
    Call,
    Chunk,
    Collector,
    Collectors,
    Head,
    Transfer,
    WorkerExtension,
    document_of,
    hook_v1_runner,
    hook_v2_worker,
    out_of_memory,
)
from ddk_build.teacher.engines import Answers
from ddk_build.teacher.targets import SparseTarget, sparse_target
from ddk_cache.format.layout import Target

VOCAB, HIDDEN = 50, 8
TARGET = Target(top_k=5)
HEAD = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))


def documents(lengths: Sequence[int]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, VOCAB, length, np.int32) for length in lengths]


def hidden_of(document: int, start: int, count: int) -> Tensor:
    """Hidden states that tell the document and the position apart."""
    positions = torch.arange(start, start + count)[:, None]
    return torch.sin(positions * torch.arange(1, HIDDEN + 1) + document)


class Logits:
    """A head that counts the rows of each block."""

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        self.blocks.append(len(hidden))
        return hidden @ HEAD.T


def head(
    compute_logits: Callable[[Tensor], Tensor | None] = lambda hidden: hidden @ HEAD.T, rows: int = 1000
) -> Head:
    return Head(compute_logits, torch.device("cpu"), rows)


def begun(
    docs: list[np.ndarray],
    target: Target | None = TARGET,
    offsets: bytes | None = None,
    by: Head | None = None,
) -> Collector:
    return Collector(by or head(), call(docs, target, offsets))


def call(docs: list[np.ndarray], target: Target | None = TARGET, offsets: bytes | None = None) -> Call:
    lengths = np.array([len(document) for document in docs], np.int64)
    plain = None if target is None else target.model_dump()
    return Call(np.concatenate(docs).tobytes(), lengths.tobytes(), offsets, plain)


def step(collector: Collector, chunks: list[tuple[int, int, int]]) -> None:
    """One engine step of (document, start, count) of call 0, with other requests' rows before and between."""
    hidden, rows, row = [], [], 3
    hidden.append(torch.full((3, HIDDEN), torch.nan))
    for document, start, count in chunks:
        rows.append(Chunk(0, document, start, row, count))
        hidden += [hidden_of(document, start, count), torch.full((2, HIDDEN), torch.nan)]
        row += count + 2
    collector.add(torch.cat(hidden), rows)


def assert_answers(transfer: Transfer | None, docs: list[np.ndarray]) -> None:
    """Position t of a document answers its token t + 1."""
    hidden = torch.cat([hidden_of(index, 0, len(document) - 1) for index, document in enumerate(docs)])
    labels = torch.from_numpy(np.concatenate([document[1:] for document in docs]).astype(np.int64))
    expected = sparse_target(hidden @ HEAD.T, labels, TARGET)
    answers = taken(transfer, TARGET.width)
    assert np.array_equal(answers.ids, expected.ids)
    for name in ("logprobs", "tail_logprob", "label_logprob"):
        np.testing.assert_allclose(getattr(answers, name), getattr(expected, name), atol=1e-5)


def taken(transfer: Transfer | None, width: int) -> Answers:
    assert transfer is not None
    return Answers.from_memory(transfer.wait(), width)


def test_whole_documents() -> None:
    docs = documents([2, 9, 5])
    collector = begun(docs)
    step(collector, [(0, 0, 2), (1, 0, 9), (2, 0, 5)])
    assert_answers(collector.take(), docs)


def test_chunks_in_any_order_and_a_last_chunk_without_a_label() -> None:
    docs = documents([2, 9, 5])
    collector = begun(docs)
    step(collector, [(2, 0, 3), (1, 0, 8)])
    step(collector, [(1, 8, 1), (0, 0, 1)])
    step(collector, [(0, 1, 1), (2, 3, 2)])
    assert_answers(collector.take(), docs)


def test_a_preempted_request_starts_over() -> None:
    docs = documents([9, 5])
    collector = begun(docs)
    step(collector, [(0, 0, 4), (1, 0, 2)])
    step(collector, [(0, 4, 2)])
    step(collector, [(1, 2, 3), (0, 0, 9)])
    assert_answers(collector.take(), docs)


def test_many_documents_go_through_the_head_in_blocks() -> None:
    docs = documents([3, 20, 2, 11])
    logits = Logits()
    collector = begun(docs, by=head(logits, rows=7))
    step(collector, [(index, 0, len(document)) for index, document in enumerate(docs)])
    assert_answers(collector.take(), docs)
    assert logits.blocks == [7, 7, 7, 7, 4]


def test_offsets_go_to_their_positions() -> None:
    docs = documents([4, 6])
    offsets = np.random.default_rng(1).random(8)
    target = Target(kind="sampled", samples=6)
    collector = begun(docs, target, offsets.tobytes())
    step(collector, [(1, 0, 6), (0, 0, 4)])
    answers = taken(collector.take(), 6)
    hidden = torch.cat([hidden_of(0, 0, 3), hidden_of(1, 0, 5)])
    expected = sparse_target(hidden @ HEAD.T, torch.zeros(8).long(), target, torch.from_numpy(offsets))
    assert np.array_equal(answers.ids, expected.ids)


@pytest.mark.parametrize(
    "target", [TARGET, Target(top_k=5, top_p=0.5), Target(kind="sampled"), None], ids=str
)
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_a_step_does_not_wait_for_the_device(
    monkeypatch: pytest.MonkeyPatch, target: Target | None, path: str
) -> None:
    """No value of the device decides what the host does next; a step uploads its indices once."""
    if path == "triton":  # all but its kernel
        triton_targets = pytest.importorskip("ddk_build.teacher.triton_targets")
        monkeypatch.setattr(triton_targets, "block_statistics", block_statistics)
        monkeypatch.setattr(capture, "sparse_target", triton_targets.sparse_target)
    docs = documents([20, 30])
    offsets = np.random.default_rng(1).random(48)
    collector = begun(docs, target, offsets.tobytes(), head(rows=7))
    uploads: list[tuple[int, ...]] = []

    def upload(array: np.ndarray) -> Tensor:
        uploads.append(array.shape)
        return torch.from_numpy(array)

    def waits(tensor: Tensor, *_: Any, **__: Any) -> None:
        raise AssertionError("the host waits for the device")

    monkeypatch.setattr(collector, "_upload", upload)
    for name in ("item", "tolist", "cpu", "numpy", "to", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, waits)
    with NoWaiting():
        step(collector, [(0, 0, 20), (1, 0, 30)])
    monkeypatch.undo()
    assert uploads == [(2, 48)]
    assert np.isfinite(taken(collector.take(), target.width if target else 0).label_logprob).all()


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result's shape or value the host needs."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        assert not any(name.startswith((waiting, f"_{waiting}")) for waiting in self.WAITING), func
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a boolean index"
        return func(*args, **(kwargs or {}))


def block_statistics(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the kernel's statistics in torch."""
    missing = -logits.shape[1] % 64
    blocks = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf).view(len(logits), -1, 64)
    maxima = blocks.amax(-1)
    below = blocks - maxima[..., None]
    return maxima, (below / temperature).exp().sum(-1), below.exp().sum(-1)


def test_a_step_runs_documents_of_several_calls() -> None:
    """Those of a call that was dropped are left out."""
    first, second = documents([4]), documents([4, 6])[1:]
    collectors = Collectors({7: begun(first), 9: begun(second)})
    hidden = torch.cat([hidden_of(0, 0, 4), hidden_of(5, 0, 3), hidden_of(0, 0, 2)])
    collectors.add(hidden, [Chunk(7, 0, 0, 0, 4), Chunk(8, 0, 0, 4, 3), Chunk(9, 0, 0, 7, 2)])
    collectors.add(hidden_of(0, 2, 4), [Chunk(9, 0, 2, 0, 4)])
    for call, docs in ((7, first), (9, second)):
        assert_answers(collectors[call].take(), docs)


def test_a_rank_without_logits_has_no_answers() -> None:
    collector = begun(documents([4]), by=head(lambda hidden: None))
    step(collector, [(0, 0, 4)])
    assert collector.take() is None


def test_positions_that_were_never_run_are_an_error() -> None:
    """Such as those a prefix cache would have skipped."""
    collector = begun(documents([9]))
    step(collector, [(0, 4, 5)])
    with pytest.raises(RuntimeError, match="left 4 of 8 positions unanswered"):
        collector.take()


def test_other_requests_are_not_ours() -> None:
    assert document_of(None) is None
    assert document_of(SimpleNamespace(extra_args=None)) is None
    assert document_of(SimpleNamespace(extra_args={"other": 1})) is None
    assert document_of(SimpleNamespace(extra_args={DOCUMENT: [3, 0]})) == (3, 0)


class NewerWorker:
    """PromptLogprobsWorker's three methods, which record what reached them."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None:
        self.reached.append(f"add {req_id} {req_idx}")

    def remove_request(self, req_id: str) -> None:
        self.reached.append(f"remove {req_id}")

    def compute_prompt_logprobs(
        self, logits_fn: Any, hidden_states: Tensor, input_batch: Any, *rest: Any
    ) -> dict[str, int]:
        return {"other": 3 + len(rest)}


def run_newer(worker: Any, docs: list[np.ndarray], original_result: Any) -> None:
    """Run requests 'a' and 'c' (documents 0 and 1) and a foreign 'b'; 'c' is preempted and comes back.

    Used on the stand-in and, in a new process, on vLLM's class.
    """
    ours = lambda index: SimpleNamespace(prompt_logprobs=None, extra_args={DOCUMENT: [0, index]})  # noqa: E731
    other = SimpleNamespace(prompt_logprobs=None, prompt_logprob_token_ids=None, extra_args=None)
    for params in (a := ours(0), c := ours(1)):
        params.prompt_logprob_token_ids = None
    worker.add_request("a", 5, a)
    worker.add_request("b", 2, other)
    worker.add_request("c", 0, c)
    indices = {"a": 5, "b": 2, "c": 0}
    document = {"a": 0, "b": 9, "c": 1}

    def run(scheduled: list[tuple[str, int, int]]) -> None:
        counts = np.array([count for *_, count in scheduled], np.int32)
        hidden = [hidden_of(document[name], start, count) for name, start, count in scheduled]
        batch = SimpleNamespace(
            req_ids=[name for name, *_ in scheduled],
            idx_mapping_np=np.array([indices[name] for name, *_ in scheduled]),
            num_computed_prefill_tokens_np=np.array([start for _, start, _ in scheduled], np.int32),
            num_scheduled_tokens=counts,
            query_start_loc_np=np.concatenate([[0], counts.cumsum()]).astype(np.int32),
            num_tokens=int(counts.sum()),
        )
        padding = torch.full((4, HIDDEN), torch.nan)
        lengths = np.zeros(8, np.int32)
        result = worker.compute_prompt_logprobs(
            None, torch.cat([*hidden, padding]), batch, torch.empty(0), torch.empty(0), lengths
        )
        assert result == original_result

    run([("c", 0, 4), ("b", 0, 3), ("a", 0, 2)])
    worker.remove_request("c")
    run([("a", 2, len(docs[0]) - 2), ("b", 3, 1)])
    worker.add_request("c", 0, c)
    run([("b", 4, 2), ("c", 0, len(docs[1]))])


def test_the_newer_runner() -> None:
    docs = documents([7, 9])
    collector = begun(docs)
    worker = NewerWorker()
    hook_v2_worker(worker, Collectors({0: collector}))
    run_newer(worker, docs, {"other": 6})
    assert_answers(collector.take(), docs)
    assert worker.reached == ["add a 5", "add b 2", "add c 0", "remove c", "add c 0"]


def test_a_runner_without_the_methods_is_refused() -> None:
    """As in a vLLM newer than the tested ones, which is tried."""
    with pytest.raises(RuntimeError, match=r"no SimpleNamespace\._get_prompt_logprobs_dict\(hidden_states,"):
        hook_v1_runner(SimpleNamespace(), Collectors())
    worker = NewerWorker()
    worker.remove_request = lambda request: None  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match=r"it has no NewerWorker\.remove_request\(req_id\)"):
        hook_v2_worker(worker, Collectors())


def test_an_error_in_a_step_is_raised_when_the_answers_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine runs on, and a new call starts afresh; out of memory too."""
    docs = documents([7])
    collectors = Collectors({0: begun(docs)})
    runner = SimpleNamespace(_get_prompt_logprobs_dict=lambda hidden_states, num_scheduled_tokens: "vLLM's")
    hook_v1_runner(runner, collectors)
    assert runner._get_prompt_logprobs_dict(torch.empty(3, HIDDEN), num_scheduled_tokens={"a": 3}) == "vLLM's"
    with pytest.raises(RuntimeError, match=r"AttributeError: .* no attribute 'requests'"):
        collectors[0].take()
    collector = begun(docs)
    step(collector, [(0, 0, 7)])
    assert_answers(collector.take(), docs)
    collector = begun(docs)
    monkeypatch.setattr(capture, "sparse_target", exhausted)
    step(collector, [(0, 0, 7)])
    with pytest.raises(RuntimeError, match="OutOfMemoryError: CUDA out of memory") as caught:
        collector.take()
    assert out_of_memory(caught.value)


def exhausted(*_: Any) -> SparseTarget:
    raise torch.OutOfMemoryError("CUDA out of memory")


def real_newer_worker() -> None:
    """Run the same on the installed vLLM's class, whose own path has nothing to do."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    docs = documents([7, 9])
    collector = begun(docs)
    worker = PromptLogprobsWorker(8, torch.device("cpu"))
    hook_v2_worker(worker, Collectors({0: collector}))
    run_newer(worker, docs, {})
    assert_answers(collector.take(), docs)


def test_the_newer_runner_of_vllm_itself() -> None:
    command = [sys.executable, "-c", "import test_capture; test_capture.real_newer_worker()"]
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_of_the_ranks_that_have_the_logits_one_keeps_the_answers() -> None:
    """All ranks must take part in every block, since vLLM gathers the logits on all of them."""
    docs, logits = documents([5, 9]), Logits()
    collector = begun(docs)
    other = begun(docs, by=replace(head(logits), is_first=False))
    for rank in (collector, other):
        step(rank, [(0, 0, 5), (1, 0, 9)])
    assert sum(logits.blocks) == 12
    assert other.take() is None
    assert_answers(collector.take(), docs)


def test_a_rank_without_memory_still_computes_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would wait for it without end."""
    docs, logits = documents([5, 9]), Logits()
    collector = begun(docs, by=head(logits, rows=5))
    monkeypatch.setattr(capture, "sparse_target", exhausted)
    step(collector, [(0, 0, 5), (1, 0, 9)])
    assert logits.blocks == [5, 5, 2]
    with pytest.raises(RuntimeError, match="out of memory"):
        collector.take()


def test_a_model_that_skips_prompt_positions_is_refused() -> None:
    """DeepSeek-V4.1: its replay layers leave zeros at positions that no request needs."""
    extension = WorkerExtension()
    extension.model_runner = SimpleNamespace(model=SimpleNamespace(decoder_replay_layers=object()))
    with pytest.raises(RuntimeError, match="skip the prompt positions"):
        extension.ddk_install()
