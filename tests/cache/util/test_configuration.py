"""Every mistake in a configuration is one line, also in a hostile file, and comes quickly."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from ddk_cache.errors import ConfigError
from ddk_cache.storage.addresses import Address
from ddk_cache.util.configuration import Config, load


class Settings(Config):
    """Something to validate against."""

    cache: Address = "runs/cache"
    rest: Any = None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], "
    f"{', '.join(f'k{n}_{i}: [*a{n - 1}]' for i in range(9))}}}\n"
    for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rest: " + "[" * 3000 + "]" * 3000, "is nested too deep"),
        ("rest: " + "{a: " * 3000 + "}" * 3000, "is nested too deep"),
        ("".join(" " * n + "a:\n" for n in range(3000)), "is nested too deep"),
        (BOMB, "holds more than 100,000 values"),
        ("rest: {<<: 3}", "expected a mapping or list of mappings for merging"),
        ("rest: &a [*a]", "is nested too deep"),
        ("rest: &a {b: [*a]}", "is nested too deep"),
        ("rest: " + "9" * 5000, "is not valid YAML"),
        ("rest: 2020-13-45", "is not valid YAML"),
        ("rest: **/*.md", "; quote a text that begins with *, such as a glob: '**/*.md'"),
        ("rest: !!timestamp x", "'x' is no timestamp in line 1, column 7"),
        ("rest: [!!bool maybe]", "'maybe' is no bool in line 1"),
        ("rest: !!int x", "'x' is no int in line 1"),
        ("\n".join(f"? !!timestamp x{n}\n: 1" for n in range(75)), "'x0' is no timestamp in line 1"),
        ("rest: !!python/object/apply:os.system [ls]", "is not valid YAML"),
        ("cache: a\ncache: b", "'cache' is given twice"),
        (MERGE_BOMB, "holds more than 100,000 values"),
        ("cache: s3://user:SECRET@bucket/cache", "cache: s3://bucket/cache: contains credentials"),
        ("cache: s3://bucket/cache#SECRET", "cache: s3://bucket/cache: contains credentials"),
        ("cache: https://host/x?X-Amz-Signature=SECRET", "contains credentials"),
        ("cache: $NO_SUCH_VARIABLE/x", "cache: the environment variable NO_SUCH_VARIABLE is not set"),
        ("cache: 'http://[x'", "cache: is not a valid URL"),
    ],
)
def test_a_mistake_is_one_line(path: Path, text: str, expected: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:  # a bomb that is expanded would take forever
        load(path, [], Settings)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(f"{path}: ")
    assert len(message) < 600
    assert "\n" not in message
    assert "SECRET" not in message


def test_a_merged_key_is_not_a_repeated_key(path: Path) -> None:
    path.write_text(
        "rest:\n  a: &a {x: 1, y: 2}\n  b: &b {<<: *a, x: 3}\n  c: {<<: [*b, *a], y: 4}\n  d: {<<: *b}\n"
    )
    assert load(path, [], Settings).rest == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 3, "y": 2},
        "c": {"x": 3, "y": 4},
        "d": {"x": 3, "y": 2},
    }


def test_an_override_changes_no_alias_of_what_it_changes(path: Path) -> None:
    path.write_text("rest:\n  a: &a {x: 1}\n  b: *a\n")
    assert load(path, ["rest.b.x=2"], Settings).rest == {"a": {"x": 1}, "b": {"x": 2}}


def test_paths_are_expanded_as_in_a_shell(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("BUCKET", "teachers")
    for written, expanded in {
        "~/cache": "/home/me/cache",
        "$HOME/cache": "/home/me/cache",
        "s3://${BUCKET}/cache": "s3://teachers/cache",
        "runs/ca~che": "runs/ca~che",
        "Qwen/Qwen2.5-14B": "Qwen/Qwen2.5-14B",
    }.items():
        path.write_text(f"cache: {written}\n")
        assert load(path, [], Settings).cache == expanded


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("cache: b: c", "mapping values are not allowed here in line 1, column 9"),
        ("cache: a\nrest: [1,\n", "'<stream end>' in line 3, column 1"),
        ("cache: \x00", "special characters are not allowed in position 7"),
    ],
)
def test_a_slip_in_the_yaml_is_named_by_file_and_line(path: Path, text: str, where: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, [], Settings)
    assert str(caught.value).startswith(f"{path}: is not valid YAML: ")
    assert where in str(caught.value)
    assert "unicode string" not in str(caught.value)


class Inner(Config):
    rows: int


class Outer(Config):
    seq_length: int
    domains: dict[str, Inner] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seq_lenght: 9", "seq_lenght: unknown key; did you mean 'seq_length'?"),
        ("seq_length: 9\ndomains: [a]", "domains: must hold keys and values, such as 'name: ...'"),
        (
            "seq_length: 9\ndomains: {a: b}",
            "domains.a: must hold keys and values, such as 'rows: b' (got 'b')",
        ),
    ],
)
def test_a_slip_is_named_by_what_was_written(path: Path, text: str, expected: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, [], Outer)
    assert str(caught.value) == f"{path}: {expected}"


@pytest.mark.parametrize(("written", "meant"), [("1e6", 1_000_000), ("+3E2", 300), ("1_0e1", 100)])
def test_whole_numbers_with_an_exponent(path: Path, written: str, meant: int) -> None:
    path.write_text(f"seq_length: {written}")
    assert load(path, [], Outer).seq_length == meant
    assert load(path, [f"seq_length={written}"], Outer).seq_length == meant


def test_a_number_with_a_unit_is_to_be_written_out(path: Path) -> None:
    path.write_text("seq_length: 10M")
    with pytest.raises(ConfigError, match=r"seq_length: .*; write it out, such as 1_000_000 \(got '10M'\)"):
        load(path, [], Outer)


class Numbers(Config):
    count: int | None = None
    rate: float = 0
    weights: dict[str, float] = Field(default_factory=dict)
    inner: Inner | None = None
    switch: bool = False
    rest: Any = None


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("count: yes", "count"),
        ("rate: off", "rate"),
        ("weights: {a: 1, b: true}", "weights.b"),
        ("inner: {rows: on}", "inner.rows"),
    ],
)
def test_a_boolean_is_no_number(path: Path, text: str, key: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, [], Numbers)
    assert str(caught.value).startswith(f"{path}: {key}: must be a number; YAML reads yes,")


def test_a_boolean_is_one_where_it_may(path: Path) -> None:
    path.write_text("switch: yes\nrest: {a: on}")
    read = load(path, [], Numbers)
    assert (read.switch, read.rest) == (True, {"a": True})
