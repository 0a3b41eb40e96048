"""Runs inside vLLM's workers: makes the sparse target where the logits are.

vLLM's own prompt_logprobs keeps a full log-softmax, ranks the label over the vocabulary and turns every
entry into Python objects. Here the hidden states of a step go through the head in blocks, each block of
logits becomes a sparse target at once (:mod:`ddk_build.targets`), and a few big arrays leave the worker
when everything has been answered.

A request says which document it is by ``SamplingParams.extra_args``; the worker has the documents from
:meth:`WorkerExtension.ddk_begin`. Nothing depends on vLLM's request ids, and requests without the mark,
such as those of the public path, go the original way.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddk_build.targets import SparseTarget, block_rows, sparse_target
from ddk_cache.layout import Target

# Key in SamplingParams.extra_args: the document's number in its call.
DOCUMENT = "ddk_document"
# vLLM versions whose runners are known: from the first, before the second.
SUPPORTED = ((0, 25), (0, 33))
# Blocks of targets whose rows go through the head at once, which reads its weights once for them. On a CPU
# four are 8 M logits: up to 32 MiB malloc hands the same pages out again, and new ones cost more than a tiny
# head itself.
CPU_HEAD_BLOCKS, GPU_HEAD_BLOCKS = 4, 1

# (document, first position, first row of the step's hidden states, positions) of a scheduled piece
Piece = tuple[int, int, int, int]
Packed = tuple[bytes, bytes, bytes, bytes]


class Collector:
    """Collects the answers to one call's documents. Positions are numbered through the call.

    The answers stay on the device until :meth:`take`: (8 E + 8) bytes a position.
    """

    def __init__(
        self,
        compute_logits: Callable[[Tensor], Tensor | None],
        vocab_size: int,
        device: torch.device,
        *,
        is_first: bool = True,
    ) -> None:
        """``is_first``: of the ranks that share a layer, which all get the logits, one keeps the answers."""
        self.compute_logits, self.is_first = compute_logits, is_first
        self.device = device
        blocks = CPU_HEAD_BLOCKS if device.type == "cpu" else GPU_HEAD_BLOCKS
        self.head_rows = blocks * block_rows(vocab_size, device)

    def begin(self, tokens: bytes, lengths: bytes, offsets: bytes | None, target: Target | None) -> None:
        """Forget what there was; tokens int32 of all documents, their lengths int64, offsets float64."""
        sizes = np.frombuffer(lengths, np.int64)
        ends = sizes.cumsum()
        self.first = ends - sizes - np.arange(len(sizes))  # each document before has a position less
        self.positions = sizes - 1  # the last token has no label
        labels = np.delete(np.frombuffer(tokens, np.int32), ends - sizes).astype(np.int64)
        self.labels = torch.from_numpy(labels).to(self.device)
        self.offsets = None if offsets is None else _floats(offsets).to(self.device)
        self.target = target
        self.answers: list[tuple[np.ndarray, SparseTarget]] = []

    @torch.inference_mode()
    def add(self, hidden: Tensor, pieces: list[Piece]) -> None:
        """Answer the scheduled pieces of documents from the step's hidden states [tokens, H]."""
        if not pieces:
            return
        document, start, row, count = np.array(pieces, np.int64).T
        count = np.minimum(count, self.positions[document] - start).clip(0)
        # 0, 1, .. within each piece, for all pieces one after another
        within = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        rows = torch.from_numpy(np.repeat(row, count) + within).to(self.device)
        places = np.repeat(self.first[document] + start, count) + within
        for begin in range(0, len(places), self.head_rows):
            logits = self.compute_logits(hidden[rows[begin : begin + self.head_rows]])
            if logits is None or not self.is_first:  # the others only help to compute them
                continue
            place = places[begin : begin + self.head_rows]
            at = torch.from_numpy(place).to(self.device)
            offsets = None if self.offsets is None else self.offsets[at]
            self.answers.append((place, sparse_target(logits, self.labels[at], self.target, offsets)))

    def take(self) -> Packed | None:
        """ids, logprobs, tail_logprob, label_logprob as bytes, or None where another worker has them.

        A position that a preempted request ran through twice has its last answer. Bytes, because they
        pass every executor's serialisation.

        Raises
        ------
        RuntimeError
            The engine did not run all positions.
        """
        if not self.answers:
            return None
        places = np.concatenate([place for place, _ in self.answers])
        total, answered = int(self.positions.sum()), len(np.unique(places))
        if answered < total:
            raise RuntimeError(f"the engine left {total - answered} of {total} positions unanswered")
        packed = []
        for parts in zip(*(answer for _, answer in self.answers), strict=True):
            found = torch.cat(parts).cpu().numpy()
            whole = np.empty((total, *found.shape[1:]), found.dtype)
            whole[places] = found
            packed.append(whole.tobytes())
        self.answers = []
        return packed[0], packed[1], packed[2], packed[3]


class WorkerExtension:
    """Mixed into vLLM's Worker (``worker_extension_cls``); the methods are for ``collective_rpc``."""

    model_runner: Any
    rank: int

    def ddk_install(self) -> None:
        """Put a collector in front of the runner's prompt logprobs."""
        runner = self.model_runner
        self.ddk_collector = Collector(
            runner.model.compute_logits,
            runner.model_config.get_vocab_size(),
            runner.device,
            is_first=self.rank % runner.parallel_config.tensor_parallel_size == 0,
        )
        if not hasattr(runner, "prompt_logprobs_worker"):
            hook_v1_runner(runner, self.ddk_collector)
        elif runner.prompt_logprobs_worker is not None:  # None on all but the last pipeline stage
            hook_v2_worker(runner.prompt_logprobs_worker, self.ddk_collector)

    def ddk_begin(
        self, tokens: bytes, lengths: bytes, offsets: bytes | None, target: dict[str, Any] | None
    ) -> None:
        """See :meth:`Collector.begin`; ``target`` as a dictionary, None for the labels alone."""
        self.ddk_collector.begin(tokens, lengths, offsets, None if target is None else Target(**target))

    def ddk_take(self) -> Packed | None:
        """See :meth:`Collector.take`."""
        return self.ddk_collector.take()


def hook_v1_runner(runner: Any, collector: Collector) -> None:
    """GPUModelRunner of v1/worker/gpu_model_runner.py, which the CPU's runner extends."""
    original = runner._get_prompt_logprobs_dict

    def prompt_logprobs(hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        pieces = []
        for request_id, count in num_scheduled_tokens.items():
            request = runner.requests[request_id]
            document = document_of(request.sampling_params)
            if document is not None:
                row = runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]]
                pieces.append((document, request.num_computed_tokens, int(row), count))
        collector.add(hidden_states, pieces)
        return original(hidden_states, num_scheduled_tokens)

    runner._get_prompt_logprobs_dict = prompt_logprobs


def hook_v2_worker(worker: Any, collector: Collector) -> None:
    """PromptLogprobsWorker of v1/worker/gpu/sample/prompt_logprob.py, the newer GPU runner's."""
    add_request, remove_request = worker.add_request, worker.remove_request
    original = worker.compute_prompt_logprobs
    documents: dict[str, int] = {}

    def add(req_id: str, req_idx: int, sampling_params: Any) -> None:
        document = document_of(sampling_params)
        if document is not None:
            documents[req_id] = document
        add_request(req_id, req_idx, sampling_params)

    def remove(req_id: str) -> None:
        documents.pop(req_id, None)
        remove_request(req_id)

    def compute(logits_fn: Any, hidden_states: Tensor, input_batch: Any, *rest: Any) -> Any:
        pieces = [
            (documents[request_id], int(start), int(row), int(count))
            for request_id, start, row, count in zip(
                input_batch.req_ids,
                input_batch.num_computed_prefill_tokens_np,
                input_batch.query_start_loc_np,
                input_batch.num_scheduled_tokens,
                strict=False,  # query_start_loc has the end as well, and paddings may follow
            )
            if request_id in documents
        ]
        collector.add(hidden_states, pieces)
        return original(logits_fn, hidden_states, input_batch, *rest)

    worker.add_request, worker.remove_request = add, remove
    worker.compute_prompt_logprobs = compute


def document_of(sampling_params: Any) -> int | None:
    """The document's number that a request carries; None for one that is not ours."""
    extra = None if sampling_params is None else sampling_params.extra_args
    return None if extra is None else extra.get(DOCUMENT)


def _floats(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.float64).copy())
