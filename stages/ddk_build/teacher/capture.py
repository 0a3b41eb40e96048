"""Runs inside vLLM's workers: makes sparse targets where the logits are.

vLLM's own prompt_logprobs keeps a full log-softmax, ranks the label over the vocabulary and turns every
entry into Python objects. Here the hidden states of a step go through the head in blocks, each block of
logits becomes sparse targets at once (:mod:`ddk_build.teacher.targets`), and a few large arrays leave
the worker when all positions are answered.

A request names its call and its document in ``SamplingParams.extra_args``; the worker has the documents from
:meth:`WorkerExtension.ddk_begin`, and a step may run documents of several calls. Requests that name no
document, such as those of the public path, take vLLM's own path.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddk_build.teacher.targets import SparseTarget, allocate, block_rows, sparse_target
from ddk_cache.format.layout import Target

# Key in SamplingParams.extra_args: the number of the call, and the document's index in it.
DOCUMENT = "ddk_document"
# A newer vLLM is tried: its methods are compared with what the hooks need, and the engine checks the answers.
NEWEST_TESTED = (0, 32)
# Rows that go through the head at once, which reads its weights once. On a CPU four blocks of targets
# are 8 M logits: up to 32 MiB malloc hands the same pages out again, and new pages cost more than a tiny head
# itself. On a GPU as many as in vLLM's own prompt_logprobs.
CPU_HEAD_BLOCKS, GPU_HEAD_ROWS = 4, 1024


class Chunk(NamedTuple):
    """The part of a document that one engine step runs."""

    call: int
    document: int
    start: int  # the first token's position in the document
    row: int  # the first token's row in the step's hidden states
    tokens: int


class Call(NamedTuple):
    """What is asked at once, as bytes, which pass every executor's serialisation."""

    tokens: bytes  # int32, of all documents
    lengths: bytes  # int64, of each document
    offsets: bytes | None  # float64, the sampling offset of each position
    target: dict[str, Any] | None  # None for the labels alone


class Transfer:
    """Answers on their way from the device; the engine works on beside the copy."""

    def __init__(self, memory: Tensor) -> None:
        self._host = memory
        self._done: torch.cuda.Event | None = None
        if memory.device.type == "cuda":
            self._host = torch.empty_like(memory, device="cpu", pin_memory=True)
            self._host.copy_(memory, non_blocking=True)
            self._done = torch.cuda.current_stream().record_event()

    def wait(self) -> NDArray[np.int32]:
        """Return the memory of :func:`targets.allocate`."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.numpy()


@dataclass(frozen=True)
class Head:
    """Computes a rank's logits from hidden states."""

    compute_logits: Callable[[Tensor], Tensor | None]
    device: torch.device
    rows: int
    """That go through it at once."""
    is_first: bool = True
    """All ranks that share a layer compute the logits; the first keeps the answers."""


class Collector:
    """Collects the answers to one call's documents, whose positions are counted through the call.

    The answers stay on the device until :meth:`take`: (8 E + 8) bytes a position. A step does not wait for
    the device: it uploads its indices from pinned memory, and writes targets into the memory of a whole call.
    """

    def __init__(self, head: Head, call: Call) -> None:
        self.head = head
        lengths = np.frombuffer(call.lengths, np.int64)
        ends = lengths.cumsum()
        self.positions = lengths - 1  # the last token has no label
        self.first = ends - lengths - np.arange(len(lengths))  # each document before has a position less
        labels = np.delete(np.frombuffer(call.tokens, np.int32), ends - lengths).astype(np.int64)
        self.labels = self._upload(labels)
        self.offsets: Tensor | None = None
        if call.offsets is not None:
            self.offsets = self._upload(np.frombuffer(call.offsets).copy())
        self.target = None if call.target is None else Target(**call.target)
        self.answered = np.zeros(len(labels), np.bool_)
        self.answers: tuple[Tensor, SparseTarget] | None = None
        self.failure: str | None = None

    def add(self, hidden: Tensor, chunks: list[Chunk]) -> None:
        """Answer a step's chunks of this call from the step's hidden states [tokens, H].

        A position that a preempted request runs twice keeps its last answer. :meth:`take` raises an error of
        this step, so that the engine survives it.
        """
        try:
            self._add(hidden, chunks)
        except Exception as error:  # any type: a vLLM that differs from the tested versions
            self.fail(error)

    @torch.inference_mode()
    def _add(self, hidden: Tensor, chunks: list[Chunk]) -> None:
        _, document, start, row, count = np.array(chunks, np.int64).T
        count = np.minimum(count, self.positions[document] - start).clip(0)
        # 0, 1, .. within each chunk, for one chunk after another
        within = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        positions = np.repeat(self.first[document] + start, count) + within
        indices = self._upload(np.stack([np.repeat(row, count) + within, positions]))
        for begin in range(0, len(positions), self.head.rows):
            block = slice(begin, begin + self.head.rows)
            rows, index = indices[:, block]
            logits = self.head.compute_logits(hidden.index_select(0, rows))
            if logits is None or not self.head.is_first:  # other ranks only help to compute them
                continue
            try:
                self._answer(logits, index)
                self.answered[positions[block]] = True
            except Exception as error:  # the other ranks compute the next block, which they cannot do alone
                self.fail(error)

    def _answer(self, logits: Tensor, index: Tensor) -> None:
        offsets = None if self.offsets is None else self.offsets.index_select(0, index)
        answers = sparse_target(logits, self.labels.index_select(0, index), self.target, offsets)
        if self.answers is None:
            width = self.target.width if self.target else 0
            self.answers = allocate(len(self.answered), width, self.head.device)
        for kept, part in zip(self.answers[1], answers, strict=True):
            kept.index_copy_(0, index, part)

    def _upload(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.head.device.type != "cuda":
            return tensor.to(self.head.device)
        return tensor.pin_memory().to(self.head.device, non_blocking=True)

    def fail(self, error: Exception) -> None:
        """Keep the text alone: the error's frames hold the step's tensors."""
        self.failure = f"{type(error).__name__}: {error}"

    def take(self) -> Transfer | None:
        """Return the answers, on their way to the host; None where another worker has them.

        Raises RuntimeError if the engine did not run all positions, or a step failed.
        """
        if self.failure is not None:
            raise RuntimeError(self.failure)
        if self.answers is None:
            return None
        if not self.answered.all():
            missing, total = np.count_nonzero(~self.answered), len(self.answered)
            raise RuntimeError(f"the engine left {missing} of {total} positions unanswered")
        (memory, _), self.answers = self.answers, None
        return Transfer(memory)


class Collectors(dict[int, Collector]):
    """A worker's collectors, by the number of the call."""

    def add(self, hidden: Tensor, chunks: Iterable[Chunk]) -> None:
        """Answer a step's chunks; those of calls that were dropped are left out."""
        try:
            step = list(chunks)
        except Exception as error:  # any type: a vLLM that differs from the tested versions
            for collector in self.values():
                collector.fail(error)
            return
        for call in dict.fromkeys(chunk.call for chunk in step):
            if call in self:
                self[call].add(hidden, [chunk for chunk in step if chunk.call == call])


class WorkerExtension:
    """Mixed into vLLM's Worker (``worker_extension_cls``); the methods are for ``collective_rpc``."""

    model_runner: Any
    rank: int

    def ddk_install(self) -> None:
        """Replace the runner's methods by hooks.

        Raises RuntimeError if this vLLM lacks a method that the hook replaces, or the method takes other
        arguments; or the model leaves out prompt positions.
        """
        runner = self.model_runner
        self.ddk_collectors = Collectors()
        if getattr(runner.model, "decoder_replay_layers", None) is not None:
            # DeepSeek-V4.1 from vLLM 0.32 on: they are zeros unless a request sets prompt_logprobs.
            raise RuntimeError("the model's last layers skip the prompt positions that vLLM does not need")
        device = runner.device
        blocks = CPU_HEAD_BLOCKS * block_rows(runner.model_config.get_vocab_size(), device)
        self.ddk_head = Head(
            runner.model.compute_logits,
            device,
            blocks if device.type == "cpu" else GPU_HEAD_ROWS,
            is_first=self.rank % runner.parallel_config.tensor_parallel_size == 0,
        )
        if not hasattr(runner, "prompt_logprobs_worker"):
            hook_v1_runner(runner, self.ddk_collectors)
        elif runner.prompt_logprobs_worker is not None:  # None on all but the last pipeline stage
            hook_v2_worker(runner.prompt_logprobs_worker, self.ddk_collectors)

    def ddk_begin(self, number: int, *call: Any) -> None:
        """Begin a :class:`Call`, whose fields come one by one."""
        self.ddk_collectors[number] = Collector(self.ddk_head, Call(*call))

    def ddk_take(self, number: int, is_here: bool) -> Transfer | bytes | None:
        """End a call; return :meth:`Collector.take`, as bytes unless this is the process that asks."""
        transfer = self.ddk_collectors.pop(number).take()
        return transfer if transfer is None or is_here else transfer.wait().tobytes()

    def ddk_drop(self) -> None:
        """Drop all calls."""
        self.ddk_collectors.clear()


def hook_v1_runner(runner: Any, collectors: Collectors) -> None:
    """Attach to GPUModelRunner of v1/worker/gpu_model_runner.py, which the CPU's runner extends."""
    require(runner, "_get_prompt_logprobs_dict", "hidden_states", "num_scheduled_tokens")
    original = runner._get_prompt_logprobs_dict

    def chunks(num_scheduled_tokens: dict[str, int]) -> Iterator[Chunk]:
        for request_id, count in num_scheduled_tokens.items():
            request = runner.requests[request_id]
            document = document_of(request.sampling_params)
            if document is not None:
                row = runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]]
                yield Chunk(*document, request.num_computed_tokens, int(row), count)

    def prompt_logprobs(
        hidden_states: Tensor, num_scheduled_tokens: dict[str, int], *rest: Any, **options: Any
    ) -> Any:
        collectors.add(hidden_states, chunks(num_scheduled_tokens))
        return original(hidden_states, num_scheduled_tokens, *rest, **options)

    runner._get_prompt_logprobs_dict = prompt_logprobs


def hook_v2_worker(worker: Any, collectors: Collectors) -> None:
    """Attach to PromptLogprobsWorker of v1/worker/gpu/sample/prompt_logprob.py, of the newer GPU runner."""
    require(worker, "add_request", "req_id", "req_idx", "sampling_params")
    require(worker, "remove_request", "req_id")
    require(worker, "compute_prompt_logprobs", "logits_fn", "hidden_states", "input_batch")
    add_request, remove_request = worker.add_request, worker.remove_request
    original = worker.compute_prompt_logprobs
    documents: dict[str, tuple[int, int]] = {}

    def add(req_id: str, req_idx: int, sampling_params: Any) -> None:
        document = document_of(sampling_params)
        if document is not None:
            documents[req_id] = document
        add_request(req_id, req_idx, sampling_params)

    def remove(req_id: str) -> None:
        documents.pop(req_id, None)
        remove_request(req_id)

    def chunks(batch: Any) -> Iterator[Chunk]:
        for request_id, start, row, count in zip(
            batch.req_ids,
            batch.num_computed_prefill_tokens_np,
            batch.query_start_loc_np,
            batch.num_scheduled_tokens,
            strict=False,  # query_start_loc has the end as well, and padding may follow
        ):
            if request_id in documents:
                yield Chunk(*documents[request_id], int(start), int(row), int(count))

    def compute(logits_fn: Any, hidden_states: Tensor, input_batch: Any, *rest: Any, **options: Any) -> Any:
        collectors.add(hidden_states, chunks(input_batch))
        return original(logits_fn, hidden_states, input_batch, *rest, **options)

    worker.add_request, worker.remove_request = add, remove
    worker.compute_prompt_logprobs = compute


def require(owner: Any, method: str, *parameters: str) -> None:
    """Raise RuntimeError unless ``owner`` has the method and its first parameters have these names."""
    candidate = getattr(owner, method, None)
    if candidate is None or tuple(signature(candidate).parameters)[: len(parameters)] != parameters:
        name = f"{type(owner).__name__}.{method}({', '.join(parameters)})"
        raise RuntimeError(f"it has no {name}")


def document_of(sampling_params: Any) -> tuple[int, int] | None:
    """Return the call and the document that a request names; None for a request of another kind."""
    extra = None if sampling_params is None else sampling_params.extra_args
    if extra is None or DOCUMENT not in extra:
        return None
    call, document = extra[DOCUMENT]
    return call, document


def out_of_memory(error: Exception) -> bool:
    """Recognise CUDA's error, the CPU allocator's, and either as a worker process reports it."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
