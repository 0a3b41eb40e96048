"""DistillKit's rows become a cache: what was exported comes back, and what is wrong is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from helpers.models import make_model
from helpers.training import make_cache

from ddk_build.cli import import_rows
from ddk_build.config import TeacherConfig
from ddk_build.imported import import_distillkit
from ddk_cache import ConfigError, Rows, open_cache
from ddk_cache.cache.verify import verify
from ddk_cache.export.writer import Export


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher"), seed=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """Return a folder with a cache and its rows as DistillKit has them."""
    folder = tmp_path_factory.mktemp("exported")
    export = Export(open_cache(make_cache(folder / "cache", teacher)), folder / "rows", "distillkit")
    list(export.write())
    return folder


def entries(rows: Rows) -> dict[tuple[int, ...], dict[int, float]]:
    """Return the entries after each context, from the beginning of its document."""
    assert rows.ids is not None
    assert rows.logprobs is not None
    result = {}
    for row, position in zip(*np.nonzero(rows.loss_mask), strict=True):
        segment = rows.segments[row] == rows.segments[row, position]
        context = rows.tokens[row][segment & (np.arange(rows.tokens.shape[1]) <= position)]
        kept = rows.ids[row, position] >= 0
        ids = rows.ids[row, position][kept].tolist()
        result[tuple(context.tolist())] = dict(
            zip(ids, rows.logprobs[row, position][kept].tolist(), strict=True)
        )
    return result


def test_exported_rows_come_back_at_their_positions(exported: Path, teacher: Path, tmp_path: Path) -> None:
    arguments = ["distillkit", str(exported / "rows"), str(tmp_path / "new"), "--teacher", str(teacher)]
    said = CliRunner().invoke(import_rows, arguments, catch_exceptions=False).output
    assert "outside the stored entries" in said
    assert list(verify(str(tmp_path / "new"))) == []
    new, old = open_cache(tmp_path / "new")["imported"], open_cache(exported / "cache")
    assert len(new.validation) > 0
    before: dict[tuple[int, ...], dict[int, float]] = {}
    for domain in old.values():
        before |= entries(domain.train.read(range(len(domain.train))))
    after = entries(new.train.read(range(len(new.train)))) | entries(
        new.validation.read(range(len(new.validation)))
    )
    assert after.keys() == before.keys()
    for context, expected in before.items():
        assert after[context].keys() == expected.keys()
        for token, logprob in expected.items():  # each time rounded to the codec's grid, at most 0.02 nats
            assert after[context][token] == pytest.approx(logprob, abs=0.04)


def test_a_second_run_changes_nothing(exported: Path, teacher: Path, tmp_path: Path) -> None:
    model = TeacherConfig(model=str(teacher))
    first = import_distillkit(exported / "rows", str(tmp_path / "new"), model)
    files = {path: path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert import_distillkit(exported / "rows", str(tmp_path / "new"), model) == first
    assert {path: path.read_bytes() for path in files} == files


def write_hand_made(path: Path, *, last: int = 9, **changes: Any) -> Path:
    rows = [
        {
            "input_ids": [start, 8, last],
            "token_ids": [[8, 1], [1, 2], [3, 4]],
            "top_values": [[-0.1, -4.0]] * 3,
        }
        for start in (5, 6, 7)
    ]
    pq.write_table(pa.Table.from_pylist([row | changes for row in rows]), path)
    return path


def test_by_hand(teacher: Path, tmp_path: Path) -> None:
    """Token 8 after the first is an entry; token 9 after 8 is not, and shares the tail with 398 tokens."""
    path = write_hand_made(tmp_path / "rows.parquet")
    import_distillkit(path, str(tmp_path / "new"), TeacherConfig(model=str(teacher)))
    rows = open_cache(tmp_path / "new")["imported"].train.read([0])
    assert rows.loss_mask.tolist() == [[True, True, False]]
    assert rows.label_logprob is not None
    tail = np.log(1 - np.exp(-0.1) - np.exp(-4.0))
    np.testing.assert_allclose(rows.label_logprob[0, :2], [-0.1, tail - np.log(398)], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"last": 4000}, "input_ids: 4000 is no token of 400: another model"),
        ({"last": -1}, "input_ids: -1 is no token of 400: another model"),
        ({"token_ids": [[8, 1], [1, 4000], [3, 4]]}, "token_ids: 4000 is no token of 400"),
        ({"token_ids": [[8, 1], [1, -7], [3, 4]]}, "token_ids: -7 is no token of 400"),
        (
            {"top_values": [[0.1, 2.0]] * 3},
            "top_values: are no log-probabilities: those of a position sum to 8.4",
        ),
    ],
)
def test_what_cannot_be_the_teachers_is_refused(
    teacher: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_hand_made(tmp_path / "rows.parquet", **changes)
    with pytest.raises(ConfigError, match=message):
        import_distillkit(path, str(tmp_path / "new"), TeacherConfig(model=str(teacher)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"input_ids": [], "token_ids": [], "top_values": []}, "input_ids is null or empty"),
        ({"input_ids": None, "token_ids": None, "top_values": None}, "input_ids is null or empty"),
        ({"input_ids": [5, None, 7]}, "input_ids holds a null"),
        ({"top_values": [[-0.1, None]] * 3}, "top_values holds a null"),
        ({"input_ids": [5, 8]}, "its columns differ in length: input_ids 2, top_values 3"),
        (
            {"token_ids": [[8]] * 3},
            "token_ids does not have 2 values at each position, as the first row does",
        ),
        ({"token_ids": [[8], [1, 2, 3], [3, 4]]}, "token_ids does not have 2 values at each position"),
    ],
)
@pytest.mark.parametrize("index", [0, 2])
def test_a_row_of_another_shape_is_named(
    teacher: Path, tmp_path: Path, changes: dict[str, Any], problem: str, index: int
) -> None:
    path = write_hand_made(tmp_path / "rows.parquet")
    rows = pq.read_table(path).to_pylist()
    rows[index] |= changes
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    if index == 0 and problem.startswith("token_ids does"):  # the first row says how many
        problem = "(token_ids|top_values) does not have [12] values at each position"
    with pytest.raises(
        ConfigError, match=rf"rows.parquet: row \d: ({problem}).*; correct or remove the row$"
    ):
        import_distillkit(path, str(tmp_path / "new"), TeacherConfig(model=str(teacher)))


def test_what_no_cache_can_have_is_refused(teacher: Path, tmp_path: Path) -> None:
    model, path = TeacherConfig(model=str(teacher)), write_hand_made(tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"--domain: name: .* \(got 'a b'\)"):
        import_distillkit(path, str(tmp_path / "new"), model, domain="a b")
    wide: dict[str, Any] = {"token_ids": [[*range(5000)]] * 3, "top_values": [[-9.0] * 5000] * 3}
    path = write_hand_made(tmp_path / "wide.parquet", **wide)
    with pytest.raises(ConfigError, match=r"wide.parquet: top_k: .* \(got 5000\)"):
        import_distillkit(path, str(tmp_path / "new"), model)


def test_other_files_are_refused(teacher: Path, tmp_path: Path) -> None:
    model = TeacherConfig(model=str(teacher))
    with pytest.raises(ConfigError, match="holds no parquet files"):
        import_distillkit(tmp_path, str(tmp_path / "new"), model)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(ConfigError, match="has no column input_ids"):
        import_distillkit(tmp_path, str(tmp_path / "new"), model)
