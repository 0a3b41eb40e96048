"""The card beside the manifest describes the cache and does not disturb it."""

from pathlib import Path

import pytest
import yaml
from helpers.caches import VOCABULARY_MAP, make_manifest, write_domain

from ddk_cache import open_cache
from ddk_cache.cache import info as inspection
from ddk_cache.cache import verify as verification
from ddk_cache.cache.card import KEY, OURS, card, write_card
from ddk_cache.cache.writer import open_writer
from ddk_cache.storage.lock import locked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with open_writer(str(tmp_path), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        for seed, name in enumerate(("code", "prose")):
            write_domain(writer, name, seed)
        write_card(writer.holder)
    return tmp_path


def test_the_card_describes_the_cache(folder: Path) -> None:
    text = (folder / KEY).read_text(encoding="utf-8")
    facts = inspection.info(str(folder))
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "other"
    assert "ddk-cache" in front["tags"]
    assert "`teacher`" in text
    assert "target: top 5, temperature 1" in text
    for name, domain in facts["domains"].items():
        cells = next(line for line in text.splitlines() if line.startswith(f"| {name} ")).split(" | ")
        assert cells[2:4] == [f"{domain[split]['tokens']:,}" for split in ("train", "validation")]
        assert float(cells[5].rstrip(" |")) == pytest.approx(
            domain["teacher_perplexity"], abs=0.005
        )  # two decimals
    assert max(map(len, text.splitlines())) < 140


def test_its_code_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (folder / KEY).read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["rows"].tokens.shape == (2, 16)  # type: ignore[attr-defined]


def test_the_other_commands_ignore_it(folder: Path) -> None:
    assert [*verification.verify(str(folder))] == []
    assert inspection.info(str(folder))["complete"]
    assert open_cache(str(folder)).domains == ("code", "prose")


def test_the_same_cache_has_the_same_card(folder: Path) -> None:
    before = (folder / KEY).read_bytes()
    with locked(str(folder)) as storage:
        write_card(storage)
    assert (folder / KEY).read_bytes() == before


def test_a_users_own_card_stays(folder: Path) -> None:
    mine = (folder / KEY).read_text().replace(OURS, "").replace("other", "apache-2.0")
    (folder / KEY).write_text(mine)
    with locked(str(folder)) as storage:
        write_card(storage)
    assert (folder / KEY).read_text() == mine


def test_names_cannot_contain_markup(folder: Path) -> None:
    facts = inspection.info(str(folder))
    facts["teacher"]["model"] = "a`b<script>|[x](y)\x1b[2J"
    text = card(facts)
    assert "`abscriptx(y)2J`" in text
    assert "<script" not in text


def test_a_domain_that_is_not_finished_has_a_card(folder: Path) -> None:
    facts = inspection.info(str(folder))
    facts["domains"]["code"]["teacher_perplexity"] = None
    assert next(line for line in card(facts).splitlines() if line.startswith("| code ")).endswith("|  |")
