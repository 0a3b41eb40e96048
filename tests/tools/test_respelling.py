"""Students of another tokenizer: the same text in other tokens, and ALM's chunks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ddk_cache import Rows
from ddk_train.student.spelling import LETTERS
from tools.studies.respelling import Respeller, alm, join


def make_tokenizer(folder: Path, *words: str) -> PreTrainedTokenizerFast:
    """Save a byte-level tokenizer with all bytes and these words."""
    alphabet = LETTERS
    vocabulary = {"<end>": 0} | {letter: 1 + value for value, letter in alphabet.items()}
    merges = []
    for word in words:
        spelled = "".join(alphabet[value] for value in word.encode())
        for end in range(2, len(spelled) + 1):
            vocabulary.setdefault(spelled[:end], len(vocabulary))
            merges.append((spelled[: end - 1], spelled[end - 1]))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_row_in_other_tokens_is_the_same_text_and_chunks_end_where_both_do(tmp_path: Path) -> None:
    teacher = make_tokenizer(tmp_path / "teacher", "the", " ca")
    other = make_tokenizer(tmp_path / "other", " th", "e c", "as")
    whole = [*teacher.encode("x the cas"), 0]  # x| |the| ca|s|<end>
    cut = teacher.encode("ésx")[1:]  # begins within a character
    count = len(whole) + len(cut)
    rows = Rows(
        np.array([[*whole, *cut, 0]], np.int32),
        np.array([[1] * len(whole) + [2] * len(cut) + [0]], np.uint16),
        np.array([[*[True] * (len(whole) - 1), False, *[True] * (len(cut) - 1), False, False]]),
        -np.arange(1, count + 2, dtype=np.float32)[None],
    )
    parts = Respeller(tmp_path / "teacher", tmp_path / "other").respell(rows)

    first, second = parts
    assert [other.decode([token]) for token in first.tokens] == ["x", " th", "e c", "as", "<end>"]
    assert first.mask.tolist() == [True, True, True, True, False]
    assert first.chunk.tolist() == [0, 0, 0, 1]  # " the cas", and the end
    assert first.teacher.tolist() == [-1 - 2 - 3 - 4, -5]
    assert (first.in_chunks.tolist(), first.size) == ([0, 1, 2, 3, 4], 8)
    assert [other.decode([token]) for token in second.tokens] == ["s", "x"]
    assert (second.chunk.tolist(), second.teacher.tolist()) == ([0], [-8])
    assert (second.in_chunks.tolist(), second.size) == ([7], 1)

    batch, chunk, logprobs = join([parts, [second]], 300)
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 0, 1, 2, 3, 4]]
    assert batch.labels.tolist() == [*first.tokens[1:], second.tokens[1], second.tokens[1]]
    assert chunk.tolist() == [0, 0, 0, 1, 2, 3]
    assert logprobs.tolist() == [-10, -5, -8, -8]


def test_alm_is_lowest_where_each_chunk_is_as_likely_as_the_teachers() -> None:
    teacher, chunk = torch.tensor([-10.0, -0.5]), torch.tensor([-1, 0, 0, 1])
    logprob = torch.tensor([-3.0, -7.0, -3.0, -0.5], requires_grad=True)
    alm(logprob, chunk, teacher).backward()
    assert logprob.grad is not None
    torch.testing.assert_close(logprob.grad, torch.zeros(4), atol=1e-5, rtol=0)
    p, q = np.exp(np.array([-0.1, -0.005])), np.exp(np.array([-0.04, -0.005]))
    expected = -(p * np.log(q) + (1 - p) * np.log(1 - q)).sum() * 100 / 4
    found = alm(torch.tensor([-3.0, -1.0, -3.0, -0.5]), chunk, teacher)
    assert found.item() == pytest.approx(expected, rel=1e-5)
