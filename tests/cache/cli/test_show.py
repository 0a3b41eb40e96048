"""Decoded rows in the terminal and as a page."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.caches import ROWS
from rich.console import Console

from ddk_cache import open_cache
from ddk_cache.cli.commands import show
from ddk_cache.cli.show import Shown, documents, print_row, read_rows
from ddk_cache.errors import ConfigError


def test_a_row_has_its_documents_its_loss_and_the_teachers_best(cache_folder: Path) -> None:
    (shown,) = read_rows(str(cache_folder), "code", 3)
    row = open_cache(cache_folder)["code"].train.read([3])
    assert row.label_logprob is not None
    assert row.ids is not None
    assert row.logprobs is not None
    found = documents(shown)
    tokens = [token for document in found for token in document]
    assert len(found) == row.segments.max()
    assert [token.text for token in tokens] == [f"token{index}" for index in row.tokens[row.segments > 0]]
    for position, token in enumerate(tokens[1:]):
        assert token.has_loss == row.loss_mask[0, position]
        if token.has_loss:
            assert token.probability == pytest.approx(float(np.exp(row.label_logprob[0, position])))
            assert [text for text, _ in token.alternatives] == [f"token{i}" for i in row.ids[0, position]]
            masses = [mass for _, mass in token.alternatives]
            np.testing.assert_allclose(masses, np.exp(row.logprobs[0, position]), rtol=1e-6)
        else:
            assert (token.probability, token.alternatives) == (None, ())


def test_the_command_shows_a_row_of_each_domain(cache_folder: Path) -> None:
    output = CliRunner().invoke(show, [str(cache_folder), "--row", "2"], catch_exceptions=False).output
    assert output.count("train row 2") == 2
    assert "document 2: 4 tokens, 3 with loss, perplexity at the teacher" in output
    assert output.count("⟦") == output.count("⟧") == 4  # of each document all but the first token
    assert "the teacher's best" in output


def test_colours_take_the_place_of_marks(cache_folder: Path) -> None:
    (shown,) = read_rows(str(cache_folder), "code", 0)
    console = Console(force_terminal=True, record=True, width=120)
    print_row(shown, console)
    text = console.export_text(styles=True)
    assert "⟦" not in text
    assert "\x1b[2m" in text  # dim: the first token of a document


def test_a_page_escapes_what_a_stranger_wrote(cache_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "rows.html"
    CliRunner().invoke(show, [str(cache_folder), "--html", str(page)], catch_exceptions=False)
    text = page.read_text(encoding="utf-8")
    assert text.count("<h1>") == 2
    assert 'class="loss" title="0.' in text
    assert "http" not in text
    (shown,) = read_rows(str(cache_folder), "code", 0)
    ids = {f"<script>\x1b{token}": index for token, index in shown.vocabulary.ids.items()}
    hostile = type(shown.vocabulary)(ids, {})
    from ddk_cache.cli.show import as_page

    text = as_page([Shown(shown.title, shown.rows, hostile)])
    assert "<script" not in text
    assert "\x1b" not in text


def test_a_mistake_names_what_there_is(cache_folder: Path) -> None:
    with pytest.raises(ConfigError, match="--domain law: the cache has code, prose"):
        list(read_rows(str(cache_folder), "law", 0))
    with pytest.raises(ConfigError, match=f"--row 99: code has {ROWS['train']} finished rows, from 0"):
        list(read_rows(str(cache_folder), None, 99))


def test_rows_are_decoded_by_any_tokenizer_and_shown_in_a_notebook(cache_folder: Path) -> None:
    class Spaces:
        def decode(self, token_ids: list[int], /) -> str:
            return " ".join(map(str, token_ids))

    rows = open_cache(cache_folder)["code"].train.read([1, 4])
    texts = rows.decode(Spaces())
    assert [len(row) for row in texts] == rows.segments.max(axis=1).tolist()
    assert texts[0][1] == " ".join(map(str, rows.tokens[0][rows.segments[0] == 2]))
    html = rows._repr_html_()
    assert html.count("<tr>") == 3
    assert "teacher, nats a label" in html
