"""A build takes a folder of completions: the writer's own tokens, who wrote them, and only good ones."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.documents import write_rows
from helpers.models import make_tokenizer
from helpers.plain_reader import Reader
from helpers.writing import Echo, use
from transformers import AutoTokenizer

from ddk_build.build import build_cache
from ddk_build.config import BuildConfig
from ddk_build.data.written import NOTE, VOCABULARY, Written, with_columns
from ddk_build.generate import program
from ddk_build.generate.config import GenerateConfig
from ddk_build.plan.dry_run import dry_run
from ddk_cache.cache.info import as_text, info
from ddk_cache.cache.reader import Cache
from ddk_cache.cache.rows import Rows
from ddk_cache.cache.verify import verify
from ddk_cache.errors import ConfigError

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def written(tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of completions to 30 prompts, two each."""
    use(monkeypatch, Echo())
    return write_completions(tmp_path, teacher_folder)


def write_completions(tmp_path: Path, model: Path) -> Path:
    prompts = [{"start": f"print {'fox ' * (number % 4)}{number}"} for number in range(30)]
    config = GenerateConfig.model_validate(
        {
            "model": str(model),
            "output": str(tmp_path / "written"),
            "sampling": {"max_tokens": 8, "samples": 2},
            "domains": {
                "echo": {
                    "path": write_rows(tmp_path / "starts.jsonl", prompts),
                    "prompt_column": "start",
                    "prompt_format": "plain",
                }
            },
        }
    )
    return program.generate(config)


def build_config(written: Path, teacher: Path, **keys: Any) -> BuildConfig:
    return BuildConfig.model_validate(
        {
            "teacher": {"model": str(teacher), "engine": "transformers", "dtype": "float32"},
            "cache": str(written.parent / "cache"),
            "seq_length": 64,
            "target": {"top_k": 4},
            "validation_rows": 2,
            "domains": {"own": {"path": str(written / "echo")} | keys},
        }
    )


def documents(cache: Cache) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of each document of both splits, and the positions with loss."""
    found = []
    for split in (cache["own"].train, cache["own"].validation):
        for row in split:
            for segment in range(1, row.segments.max() + 1):
                here = row.segments == segment
                found.append((row.tokens[here].tolist(), np.flatnonzero(row.loss_mask[here]).tolist()))
    return found


def completions(written: Path) -> list[dict[str, Any]]:
    return pq.read_table(written / "echo").to_pylist()


def test_the_writers_tokens_are_the_caches(written: Path, teacher_folder: Path) -> None:
    cache = build_cache(build_config(written, teacher_folder))
    expected = [
        (row["tokens"], [position - 1 for position, wrote in enumerate(row["loss_mask"]) if wrote])
        for row in completions(written)
    ]
    assert sorted(documents(cache)) == sorted(expected)


def test_the_cache_keeps_the_writers_log_probabilities(written: Path, teacher_folder: Path) -> None:
    """Also in a cache that was tokenised before."""
    config = build_config(written, teacher_folder)
    build_cache(config, tokens_only=True)
    cache = build_cache(config)
    expected = {
        tuple(row["tokens"][-len(row["logprobs"]) :]): row["logprobs"] for row in completions(written)
    }
    count = 0
    for split in (cache["own"].train, cache["own"].validation):
        rows = split.read(range(len(split)))
        assert rows.writer_logprob is not None
        assert not rows.writer_logprob[~rows.loss_mask].any()
        for tokens, mask, logprobs in zip(rows.tokens, rows.loss_mask, rows.writer_logprob, strict=True):
            for start in np.flatnonzero(mask & ~np.roll(mask, 1)):
                labels = tuple(tokens[start + 1 : start + 4].tolist())
                np.testing.assert_array_equal(logprobs[start : start + 3], expected[labels])
                count += 1
    assert count == len(completions(written))
    assert not [*verify(config.cache)]
    stored = Reader(Path(config.cache)).array("own", "train", "writer_logprob", 0)  # as docs/format.md says
    np.testing.assert_array_equal(stored / np.float32(-256), cache["own"].train[0].writer_logprob)


@pytest.mark.parametrize("keys", [{}, {"text_column": "text"}])
def test_the_completions_of_a_prompt_are_all_held_out_or_all_trained_on(
    written: Path, teacher_folder: Path, keys: dict[str, str]
) -> None:
    cache = build_cache(build_config(written, teacher_folder, **keys))
    prompts = {tuple(row["tokens"]): row["prompt_id"] for row in completions(written)}
    if keys:
        tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
        prompts = {
            (*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id): row["prompt_id"]
            for row in completions(written)
        }
    by_split = [
        {
            prompts[tuple(row.tokens[row.segments == segment].tolist())]
            for row in split
            for segment in range(1, row.segments.max() + 1)
        }
        for split in (cache["own"].train, cache["own"].validation)
    ]
    assert not by_split[0] & by_split[1]
    assert len(by_split[0] | by_split[1]) == 30
    assert len(by_split[1]) >= 2


def test_rows_keep_them_through_slices_and_joins(written: Path, teacher_folder: Path) -> None:
    split = build_cache(build_config(written, teacher_folder))["own"].train
    rows = split.read(range(len(split)))
    again = Rows.concatenate([rows[:1], Rows.from_arrays(rows[1:].arrays())])
    np.testing.assert_array_equal(again.writer_logprob, rows.writer_logprob)


def test_rollouts_of_other_tools(tmp_path: Path, teacher_folder: Path) -> None:
    """A log-probability is needed for each token that carries loss, and nothing else."""
    chance = np.random.default_rng(0)
    tokens = chance.integers(3, 300, (40, 12)).tolist()
    good = [
        {"ids": ids, "mine": [0] * 6 + [1] * 6, "logp": [-0.5, -3.25, 0.0, -300, -1e-9, -2.0]}
        for ids in tokens
    ]
    bad = [
        good[0] | {"logp": [-1.0] * 12},
        good[0] | {"logp": [0.5] * 6},
        good[0] | {"logp": None},
        good[0] | {"logp": [None] * 6},
    ]
    domain = {
        "path": write_rows(tmp_path / "rollouts.jsonl", good + bad),
        "tokens_column": "ids",
        "loss_mask_column": "mine",
        "logprobs_column": "logp",
    }
    cache = build_cache(build_config(tmp_path, teacher_folder, **domain))
    rows = cache["own"].train[:]
    assert rows.writer_logprob is not None
    least = -65535 / 256
    assert set(rows.writer_logprob[rows.loss_mask].tolist()) == {-0.5, -3.25, 0.0, least, -2.0}
    assert cache["own"].state.skipped == {"not a log-probability for each token with loss": len(bad)}


def test_the_manifest_says_who_wrote(written: Path, teacher_folder: Path) -> None:
    config = build_config(written, teacher_folder)
    note = Written.read(written)
    assert note is not None
    source = build_cache(config).manifest.domain("own").source
    assert (
        f"  written by {teacher_folder} ({note.writer.weights})" in as_text(info(config.cache)).splitlines()
    )
    assert source["writer"] == note.writer.model_dump() | {"sampling": note.sampling, "seed": 0}
    (written / NOTE).write_text(note.model_copy(update={"seed": 7}).model_dump_json())
    with pytest.raises(ConfigError, match=r"domains\.own\.writer\.seed: 0 -> 7"):
        build_cache(config)


def test_its_text_can_be_taken_instead(written: Path, teacher_folder: Path) -> None:
    config = build_config(written, teacher_folder, text_column="text")
    assert with_columns(config).domains["own"].tokens_column is None
    assert "its first document has" in dry_run(config, is_here=True)


def test_a_tokenizer_with_other_ids_is_refused_in_one_line(
    written: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    """Other roles are not: a base model and its instruct model differ in them."""
    model = tmp_path / "instruct"
    shutil.copytree(teacher_folder, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(model)
    assert "its first document has" in dry_run(build_config(written, model), is_here=True)

    make_tokenizer(model, vocab_size=380)
    message = r"^domains\.own\.path: its writer's tokenizer is not the teacher's: '.*' has id \d+ and is "
    with pytest.raises(ConfigError, match=message) as error:
        dry_run(build_config(written, model), is_here=True)
    assert "\n" not in str(error.value)
    (written / VOCABULARY).unlink()
    with pytest.raises(ConfigError, match="its vocabulary cannot be read"):
        dry_run(build_config(written, model), is_here=True)


@pytest.mark.parametrize(
    ("folder", "completions", "message"),
    [
        ("", 60, r"holds a folder for each domain; give one, such as .*written/echo"),
        ("echo", None, r"is not finished; run ddk-cache generate again"),
        ("echo", 0, r"holds no completions"),
    ],
)
def test_a_folder_that_cannot_be_taken(
    written: Path, teacher_folder: Path, folder: str, completions: int | None, message: str
) -> None:
    note = Written.read(written)
    assert note is not None
    domains = {"echo": note.domains["echo"].model_copy(update={"completions": completions})}
    (written / NOTE).write_text(note.model_copy(update={"domains": domains}).model_dump_json())
    config = build_config(written, teacher_folder, path=str(written / folder))
    with pytest.raises(ConfigError, match=rf"domains\.own\.path: .*{message}"):
        build_cache(config)


def test_only_good_completions_are_taken(written: Path, teacher_folder: Path) -> None:
    [file] = (written / "echo").glob("*.parquet")
    table = pq.read_table(file)
    scores = [None, *np.linspace(0, 1, len(table) - 1).tolist()]
    pq.write_table(table.append_column("score", pa.array(scores)), file)
    config = build_config(written, teacher_folder, score_column="score", min_score=0.5)
    cache = build_cache(config)
    good = [
        row["tokens"]
        for row, score in zip(completions(written), scores, strict=True)
        if score and score >= 0.5
    ]
    assert sorted(tokens for tokens, _ in documents(cache)) == sorted(good)
    assert cache["own"].state.skipped == {"a score below min_score": len(scores) - len(good)}


def test_a_score_needs_its_bound(written: Path, teacher_folder: Path, tmp_path: Path) -> None:
    config = build_config(written, teacher_folder).model_dump(mode="json", exclude_defaults=True)
    config["domains"]["own"]["min_score"] = 1
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"domains\.own: score_column and min_score go together"):
        BuildConfig.from_yaml(tmp_path / "build.yaml")


@pytest.mark.parametrize(("teacher", "is_named"), [("models/elsewhere", True), ("x/{name}", False)])
def test_a_student_of_another_teacher_is_named(
    tmp_path: Path,
    student_folder: Path,
    teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    teacher: str,
    is_named: bool,
) -> None:
    """One line, and the build goes on; nothing where the student's run knows this teacher."""
    use(monkeypatch, Echo())
    student = tmp_path / "student"
    shutil.copytree(student_folder, student)
    teacher = teacher.format(name=teacher_folder.name)
    (student / "run.json").write_text(f'{{"teachers": ["{teacher}"], "began": "2026-01-01"}}')
    config = build_config(write_completions(tmp_path, student), teacher_folder)
    line = f"own: {student}, which wrote it, was distilled from {teacher}, not from {teacher_folder}: "
    assert (line in dry_run(config, is_here=True)) == is_named
    with caplog.at_level("INFO", "ddk_build"):
        build_cache(config, tokens_only=True)
    assert sum(line in message for message in caplog.messages) == is_named
