"""Several caches opened as one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.caches import TEACHER, VOCABULARY, VOCABULARY_MAP, make_manifest, write_domain

from ddk_cache import Cache, ConfigError, open_cache
from ddk_cache.cache.joined import join
from ddk_cache.cache.writer import open_writer
from ddk_cache.format.vocabulary import Vocabulary

OTHER_TEACHER = TEACHER | {"model": "other"}


def make(folder: Path, *names: str, vocabulary: Vocabulary = VOCABULARY_MAP, **changes: Any) -> Cache:
    manifest = make_manifest(*names, tokenizer_hash=vocabulary.fingerprint(), **changes)
    with open_writer(str(folder), manifest, vocabulary) as writer:
        for seed, name in enumerate(names):
            write_domain(writer, name, seed)
    return open_cache(folder)


def test_it_has_the_domains_of_all_with_their_rows_and_teachers(tmp_path: Path) -> None:
    first = make(tmp_path / "first", "code", "prose")
    second = make(tmp_path / "second", "law", target={"top_k": 8}, teachers=[OTHER_TEACHER])
    joined = join([first, second])
    assert joined.domains == ("code", "prose", "law")
    assert [joined.manifest.teacher_of(name).model for name in joined] == ["teacher", "teacher", "other"]
    assert joined.target.top_k == 8
    assert len(joined.storages) == 2
    for cache in (first, second):
        for name in cache:
            expected, rows = cache[name].train.read([0, 3]), joined[name].train.read([0, 3])
            assert expected.ids is not None
            assert rows.ids is not None
            np.testing.assert_array_equal(rows.ids, expected.ids)


@pytest.mark.parametrize("order", [1, -1])
def test_labels_alone_go_with_every_target(tmp_path: Path, cache_folder: Path, order: int) -> None:
    own = make(tmp_path / "own", "own", target={"kind": "label", "temperature": 2.0})
    joined = join([open_cache(cache_folder), own][::order])
    assert joined.target.kind == "topk"
    assert not joined.manifest.has_targets("validation")
    assert [joined[name].train.has_targets for name in ("code", "own")] == [True, False]
    draws = make(tmp_path / "draws", "law", target={"kind": "sampled", "samples": 5})
    with pytest.raises(ConfigError, match=r"target\.kind sampled and topk"):
        join([own, open_cache(cache_folder), draws])


def test_a_single_cache_stays_as_it_is(cache_folder: Path) -> None:
    cache = open_cache(cache_folder)
    assert join([cache]) is cache


@pytest.mark.parametrize("order", [1, -1])
def test_the_larger_tokenizer_stands_for_both(tmp_path: Path, cache_folder: Path, order: int) -> None:
    """A student with the smaller one would lack ids of the other cache."""
    base = Vocabulary({f"token{index}": index for index in range(200)}, VOCABULARY_MAP.special_tokens)
    small = make(tmp_path / "small", "law", vocabulary=base, teachers=[OTHER_TEACHER])
    caches = [small, open_cache(cache_folder)][::order]
    joined = join(caches)
    assert joined.vocabulary == VOCABULARY_MAP
    assert joined.manifest.teachers[0].model == "teacher"
    assert joined.manifest.teacher_of("law").model == "other"
    assert joined.domains == tuple(name for cache in caches for name in cache)


OTHER_IDS = Vocabulary({f"token{index}": VOCABULARY - 1 - index for index in range(VOCABULARY)}, {})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("code", {}, "both have a domain 'code'; a domain has one cache"),
        ("law", {"vocabulary": OTHER_IDS}, "another tokenizer: 'token299' has id 0 and id 299"),
        ("law", {"target": {"kind": "sampled", "samples": 5}}, "target.kind sampled and topk"),
        ("law", {"target": {"top_k": 5, "temperature": 2.0}}, "target.temperature 2.0 and 1.0"),
    ],
)
def test_caches_that_do_not_belong_together_are_refused(
    tmp_path: Path, cache_folder: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    second = make(tmp_path / "second", name, **changes)
    with pytest.raises(ConfigError, match=message):
        join([open_cache(cache_folder), second])
