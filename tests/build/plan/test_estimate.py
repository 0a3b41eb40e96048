"""An estimate against the build that follows it."""

from pathlib import Path
from typing import Any

import pytest
from helpers.builds import finish, write_config, write_corpus

from ddk_build.config import BuildConfig
from ddk_build.manifest import describe
from ddk_build.plan.estimate import DomainEstimate, Estimate, as_text, estimate
from ddk_build.teacher.tokenizer import load_tokenizer, vocabulary
from ddk_cache.cache.info import info
from ddk_cache.cache.writer import open_writer
from ddk_cache.format.layout import Target
from ddk_cache.util.configuration import load


@pytest.mark.parametrize(
    "target", [{"kind": "topk", "top_k": 8}, {"kind": "sampled", "samples": 12}, {"kind": "label"}]
)
def test_a_build_writes_what_was_estimated(
    tmp_path: Path, teacher_folder: Path, target: dict[str, Any]
) -> None:
    corpus = write_corpus(tmp_path, documents=14)
    path = write_config(tmp_path / "build.yaml", teacher_folder, corpus, target=target, shard_tokens=2048)
    estimated = estimate(load(path, [], BuildConfig), probe=True).to_json()
    assert not (tmp_path / "cache").exists()
    assert finish(path) == 0, path.with_suffix(".log").read_text()
    written = info(str(tmp_path / "cache"))["domains"]
    for name, guess in estimated["domains"].items():
        train, validation = written[name]["train"], written[name]["validation"]
        assert guess["tokens"] == train["tokens"] + validation["tokens"]
        assert guess["train_rows"] == train["rows"]
        assert guess["validation_rows"] == validation["rows"]
        assert guess["documents"] == written[name]["documents"]
    stored = sum(sum(written[name]["train"]["bytes_by_array"].values()) for name in written)
    tokens = sum(written[name]["train"]["tokens"] for name in written)
    # The probe reads other rows than the build, and has no shards: 6 to 8% too little here.
    assert estimated["bytes_per_token"] == pytest.approx(stored / tokens, rel=0.1)
    for name, guess in estimated["domains"].items():
        whole = sum(file.stat().st_size for file in (tmp_path / "cache" / name).glob("*/*/c/*/*"))
        assert guess["bytes"] == pytest.approx(whole, rel=0.1)  # with commit records and indices
    assert estimated["hours"] > 0
    assert as_text(estimated).endswith(f" tokens/s here: {60 * estimated['hours']:.1f} minutes")
    assert as_text(estimated | {"hours": 1.26}).endswith(" tokens/s here: 1.3 hours")


def test_a_probe_needs_no_domain_of_every_teacher_in_the_cache(tmp_path: Path, teacher_folder: Path) -> None:
    corpus = write_corpus(tmp_path)
    common = {"path": "json", "data_files": str(corpus["code"])}
    other, last = (common | {"teacher": {"dtype": dtype}} for dtype in ("bfloat16", "float16"))

    def configured(**domains: Any) -> BuildConfig:
        path = write_config(tmp_path / "build.yaml", teacher_folder, corpus, domains=domains)
        return load(path, [], BuildConfig)

    tokenizer = load_tokenizer(configured(common=common).teacher)
    manifest = describe(configured(common=common, other=other, last=last), tokenizer)
    with open_writer(str(tmp_path / "cache"), manifest, vocabulary(tokenizer)):
        pass
    for left in ({"common": common, "last": last}, {"common": common, "other": other}):
        assert estimate(configured(**left), probe=True).tokens_per_second


def test_without_a_probe_the_teacher_is_not_started(tmp_path: Path, teacher_folder: Path) -> None:
    corpus = write_corpus(tmp_path)
    limited = {"path": "json", "data_files": str(corpus["code"]), "max_tokens": 1000}
    path = write_config(tmp_path / "build.yaml", teacher_folder, corpus, domains={"code": limited})
    estimated = estimate(load(path, ["teacher.engine=vllm"], BuildConfig), probe=False).to_json()
    # What is held out and has no room in the validation rows is not stored.
    assert 900 < estimated["total"]["tokens"] <= 1000
    assert not estimated["total"]["at_least"]
    assert estimated["hours"] is None
    assert "--probe" in as_text(estimated)


def test_a_stream_without_an_end_is_said_to_be_one(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddk_build.plan.estimate.SAMPLE_TOKENS", 5000)
    corpus = write_corpus(tmp_path)
    source = {"path": "json", "data_files": str(corpus["code"])}
    for streaming, limit, at_least in ((True, None, True), (True, 6000, False), (False, None, False)):
        domain = source | {"streaming": streaming, "max_tokens": limit}
        path = write_config(tmp_path / "build.yaml", teacher_folder, corpus, domains={"code": domain})
        estimated = estimate(load(path, [], BuildConfig), probe=False)
        assert estimated.domains["code"].at_least == at_least
        assert ("at least: the source is a stream" in as_text(estimated.to_json())) == at_least


def test_how_often_draws_may_be_read_is_said_of_the_smallest_domain() -> None:
    domains = {
        "web": DomainEstimate(10, 50_000, 90, 10, 1, at_least=False),
        "laws": DomainEstimate(10, 20_000, 75, 25, 1, at_least=False),
        "stream": DomainEstimate(10, 1_000, 9, 1, 1, at_least=True),  # its end is not known
    }

    def text(target: Target, **some: DomainEstimate) -> str:
        return as_text(Estimate(some or domains, target, 20.0, None).to_json())

    assert "4 passes over a domain, 60,000 tokens of training in laws;" in text(Target(kind="sampled"))
    assert "passes" not in text(Target(kind="sampled"), stream=domains["stream"])
    assert "passes" not in text(Target())
