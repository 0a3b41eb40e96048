"""The content of a tokenizer, and its fingerprint."""

import pytest

from ddk_cache.errors import CacheError
from ddk_cache.format.vocabulary import Vocabulary

IDS = {"<eos>": 0, "the": 1, "a": 2, "café": 4, "\ud800": 5}
SPECIAL = {"eos_token": "<eos>", "pad_token": "<eos>"}


def test_the_fingerprint_is_of_the_content() -> None:
    one = Vocabulary(IDS, SPECIAL)
    same = Vocabulary(dict(reversed(IDS.items())), SPECIAL)
    assert one.fingerprint() == same.fingerprint()
    assert len(one.fingerprint()) == 64
    others = [
        Vocabulary(IDS | {"the": 2, "a": 1}, SPECIAL),
        Vocabulary(IDS | {"an": 3}, SPECIAL),
        Vocabulary(IDS, SPECIAL | {"eos_token": "a"}),
        Vocabulary(IDS, SPECIAL | {"bos_token": "a"}),
    ]
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_the_padding_token_does_not_count() -> None:
    other = Vocabulary(IDS, {"eos_token": "<eos>", "pad_token": "a"})
    assert other.fingerprint() == Vocabulary(IDS, SPECIAL).fingerprint()
    assert Vocabulary(IDS, SPECIAL).differences(other) == []


def test_packing_keeps_the_fingerprint() -> None:
    one = Vocabulary(IDS, SPECIAL)
    back = Vocabulary.decompress(one.compress())
    assert back.ids == IDS
    assert back.fingerprint() == one.fingerprint()
    assert one.differences(back) == []


@pytest.mark.parametrize("packed", [b"", b"junk", Vocabulary(IDS, SPECIAL).compress()[:-9]])
def test_a_damaged_vocabulary_is_refused(packed: bytes) -> None:
    with pytest.raises(CacheError, match="cannot be read"):
        Vocabulary.decompress(packed)


def test_differences_are_named_lowest_id_first() -> None:
    one = Vocabulary(IDS, SPECIAL)
    other = Vocabulary({"<eos>": 0, "the": 2, "a": 1, "café": 4}, {"eos_token": "the"})
    assert one.differences(other) == [
        "eos_token is '<eos>' and 'the'",
        "'the' has id 1 and id 2",
        "'a' has id 2 and id 1",
    ]
    assert one.differences(other, limit=9)[3:] == ["'\\ud800' has id 5 and is missing in the other"]


def test_only_ids_that_mean_something_else_are_conflicts() -> None:
    base = Vocabulary(IDS, SPECIAL)
    instruct = Vocabulary(IDS | {"<|im_end|>": 6}, {"eos_token": "<|im_end|>"})
    assert base.conflicts(instruct) == []
    assert base.differences(instruct) == [
        "eos_token is '<eos>' and '<|im_end|>'",
        "'<|im_end|>' is missing and has id 6 in the other",
    ]
    assert instruct.conflicts(base) == ["'<|im_end|>' has id 6 and is missing in the other"]
    assert base.conflicts(Vocabulary(IDS | {"the": 3}, SPECIAL)) == ["'the' has id 1 and id 3"]
