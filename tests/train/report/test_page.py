"""The report has the values of a run's files, finished or not."""

import base64
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from helpers.commands import control_characters

from ddk_cache.errors import ConfigError
from ddk_train.config import TrainConfig
from ddk_train.report.page import watch, write_report
from ddk_train.report.plots import running_mean
from ddk_train.report.run_files import read_run
from ddk_train.train import train

Line = dict[str, Any]
TEACHER = {"code": 4.0, "prose": 10.0}
STUDENT = [{"code": 16.0, "prose": 30.0}, {"code": 8.0, "prose": 20.0}, {"code": 4.0, "prose": 15.0}]


def interval(index: int, domains: list[str], rows: int) -> Line:
    return {
        "interval": index,
        "step": 10 * index,
        "factor": dict.fromkeys(domains, 1 / len(domains)),
        "student_ppl": {name: STUDENT[index][name] for name in domains},
        "teacher_ppl": {name: TEACHER[name] for name in domains},
        "rows": dict.fromkeys(domains, rows),
    }


def metric(step: int) -> Line:
    return {
        "step": step,
        "loss": 3.0 - step / 100,
        "cross_entropy": 2.5,
        "kl": 2.5,
        "learning_rate": 1e-4,
        "grad_norm": 1.5,
        "tokens": 1000 * step,
        "tokens_per_second": 123.0,
        "data_wait_fraction": 0.01,
    }


Intervals = list[Line]
FINISHED = [
    interval(0, ["code", "prose"], 20),
    interval(1, ["code", "prose"], 20),
    interval(2, ["code", "prose"], 0),
]
METRICS = [metric(step) for step in range(5, 21, 5)]
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a run's files; None leaves a file out."""

    def make(
        intervals: Intervals | None = FINISHED, metrics: list[Line] | None = None, **changes: Any
    ) -> Path:
        keys = {"cache": "c", "student": "s", "output_dir": "o", "max_steps": 20, "distill_interval": 10}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys | changes))
        for name, lines in (("discrepancy", intervals), ("metrics", metrics)):
            if lines is not None:
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (tmp_path / f"{name}.jsonl").write_text(text)
        return tmp_path

    return make


def read(run_dir: Path) -> str:
    return write_report([run_dir]).read_text(encoding="utf-8")


def cells(page: str) -> list[list[str]]:
    """Return the first table's body without tags."""
    return table(page, 0)


def table(page: str, index: int) -> list[list[str]]:
    body = page.split("<tbody>")[index + 1].partition("</tbody>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    cells = [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in rows]
    return [[" ".join(re.sub("<.*?>", "", cell).split()) for cell in row] for row in cells]


def pictures(page: str) -> list[str]:
    """Return the SVGs."""
    return [base64.b64decode(data).decode() for data in re.findall('src="data:image/svg[^,]*,([^"]*)"', page)]


def test_table_and_headline_numbers(make_run: MakeRun) -> None:
    page = read(make_run(metrics=METRICS))
    assert cells(page) == [
        ["code", "4.00", "16.0", "4.00", "4.00 → 1.00", "100%", "0.500 → 0.500", "40 (50%)", "–"],
        ["prose", "10.0", "30.0", "15.0", "3.00 → 1.50", "63%", "0.500 → 0.500", "40 (50%)", "–"],
    ]
    assert "<strong>3.50 → 1.25</strong>" in page
    assert "<strong>20,000</strong>tokens trained on" in page
    assert "<strong>123</strong>tokens/s" in page
    assert "Finished: 20 steps." in page


def test_the_page_says_of_which_measurement_the_student_is(make_run: MakeRun) -> None:
    for keep_best, which in ((False, "last"), (True, "best")):
        text = " ".join(read(make_run(keep_best=keep_best)).split())
        assert f"After, and the second ratio and factor: of the {which} measurement." in text


def test_the_table_has_the_epochs_and_their_bound(make_run: MakeRun) -> None:
    ended = FINISHED[-1] | {"epochs": {"code": 3.96, "prose": 8.0}}
    run = make_run([*FINISHED[:-1], ended], domains={"prose": {"max_epochs": 8}})
    assert [row[-1] for row in cells(read(run))] == ["4.0", "8.0 of 8.00"]


@pytest.mark.parametrize(
    ("rows", "bound"), [(32, "8.00"), (10, "16.0")]
)  # the run draws 80 rows: 2.5 and 8 passes
def test_the_table_has_the_bound_of_auto(make_run: MakeRun, rows: int, bound: str) -> None:
    ended = FINISHED[-1] | {"epochs": {"code": 3.96, "prose": 8.0}}
    run = make_run([*FINISHED[:-1], ended], strategy="auto", domains={"prose": {"max_epochs": 9}})
    facts = FACTS | {"train_rows": {"code": rows - 2, "prose": 2}, "rows_in_a_step": 4}
    (run / "run.json").write_text(json.dumps(facts))
    assert [row[-1] for row in cells(read(run))] == [f"4.0 of {bound}", "8.0 of 9.00"]
    del facts["rows_in_a_step"]  # of an older run, whose bound is not known
    (run / "run.json").write_text(json.dumps(facts))
    assert [row[-1] for row in cells(read(run))] == ["4.0", "8.0 of 9.00"]


def test_the_bound_of_auto_is_that_of_an_extended_run(make_config: Callable[..., TrainConfig]) -> None:
    keys = {"strategy": "auto", "distill_interval": 40, "save_steps": 20, "sample_tokens": 0}
    train(make_config(max_steps=20, **keys))
    config = make_config(max_steps=80, **keys)
    train(config, resume=True)
    run = read_run(Path(config.output_dir))
    assert {run.most_epochs(name) for name in run.domains} == {16}  # 320 rows are 8 passes over 40


def test_gap_is_in_nats_and_none_without_a_gap(make_run: MakeRun) -> None:
    run = read_run(make_run())
    assert run.gap_closed("code") == pytest.approx(1.0)
    run.intervals[0].teacher_ppl["code"] = 16.0
    assert run.gap_closed("code") is None


class Checker(HTMLParser):
    """Check that every tag is closed in its turn, and that nothing is fetched."""

    VOID = frozenset({"meta", "link", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        for name in ("href", "src"):
            assert (dict(attrs).get(name) or "data:").startswith("data:"), "nothing is fetched"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_self_contained_and_always_the_same(make_run: MakeRun) -> None:
    page = read(make_run(metrics=METRICS))
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert "url(" not in page
    assert len(pictures(page)) == 9
    for picture in pictures(page):
        assert ElementTree.fromstring(picture).tag.endswith("svg")
        assert not re.search(r"<script|<image|url\((?!#)|href=\"(?!#)", picture)
    assert page == read(make_run(metrics=METRICS))


def test_single_domain(make_run: MakeRun) -> None:
    page = read(make_run([interval(index, ["code"], 20 * (index < 2)) for index in range(3)]))
    assert [row[0] for row in cells(page)] == ["code"]


def test_unfinished_run_says_so(make_run: MakeRun) -> None:
    page = read(make_run(FINISHED[:1], METRICS[:1]))
    assert "Not finished: 5 of 20 steps so far." in page
    assert "Over the intervals" not in page


def test_run_before_its_first_step(make_run: MakeRun) -> None:
    page = read(make_run(None, None))
    assert "Not finished: 0 of 20 steps so far." in page
    assert pictures(page) == []


def test_early_stop_says_why(make_run: MakeRun) -> None:
    assert "Stopped at step 20: every ratio was at or below 1.5." in read(
        make_run(max_steps=50, stop_ratio=1.5)
    )


def test_a_policy_gradient_has_its_own_plots(make_run: MakeRun) -> None:
    measures = {"reverse_kl": 0.4, "advantage": -0.4, "importance_spread": 0.1, "left_out": 0.01}
    lines = [line | {f"{name}/code": value for name, value in measures.items()} for line in METRICS]
    page = read(make_run(None, lines, gamma=0, policy_gradient_weight=1.0))
    for title in (
        "Reverse KL by domain",
        "Advantage by domain",
        "Importance by domain",
        "Left out by domain",
    ):
        assert f"<h3>{title}</h3>" in page
    assert "</i>loss</span>" in page
    assert "1 · policy gradient on the student's own text" in unescape(page)
    assert "Reverse KL by domain" not in read(make_run(None, METRICS))


def test_without_kl_no_kl_is_shown(make_run: MakeRun) -> None:
    assert "</i>kl</span>" in read(make_run(None, METRICS))
    page = read(make_run(None, METRICS, gamma=0))
    assert "</i>kl</span>" not in page
    assert "Loss: 1 · cross-entropy." in page
    assert "</i>kl</span>" not in read(make_run(None, METRICS, gamma={"start": 0, "end": 0}))
    page = unescape(read(make_run(metrics=METRICS, domains={name: {"gamma": 0} for name in TEACHER})))
    assert "</i>kl</span>" not in page
    assert "Loss: 1 · cross-entropy." in page


def test_the_loss_is_that_of_each_domain(make_run: MakeRun) -> None:
    written = {"gamma": 0, "cross_entropy_weight": 0, "policy_gradient_weight": 0.5}
    page = unescape(read(make_run(metrics=METRICS, domains={"prose": written})))
    assert (
        "Loss: code: 1 · cross-entropy + 0.2 · KL to the cached teacher (bucket tail); "
        "prose: 0.5 · policy gradient on the student's own text." in page
    )
    page = unescape(read(make_run(metrics=METRICS, domains=dict.fromkeys(TEACHER, written))))
    assert "Loss: 0.5 · policy gradient on the student's own text." in page
    assert "</i>kl</span>" not in page


def test_huge_and_infinite_perplexities(make_run: MakeRun) -> None:
    first, *rest = FINISHED
    page = read(make_run([first | {"student_ppl": {"code": 5e4, "prose": float("inf")}}, *rest]))
    assert cells(page)[0][2] == "50,000"
    assert cells(page)[1][2:6] == ["inf", "15.0", "inf → 1.50", "–"]


def test_incomplete_last_line_is_skipped(make_run: MakeRun) -> None:
    folder = make_run(metrics=METRICS)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "lo')
    assert len(read_run(folder).metrics) == len(METRICS)


def test_folder_without_a_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"no run of ddk-cache train"):
            write_report([folder])


def test_damaged_file_is_named(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "metrics.jsonl").write_text("{}}\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 1: Invalid JSON"):
        write_report([folder])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("metrics", {"loss": "<b>high</b>"}, r"line 2: loss: .*a valid number"),
        ("metrics", {"kl/code": "x"}, r"line 2: kl/code: .*a valid number"),
        ("metrics", {"tokens_per_second": 0}, r"line 2: tokens_per_second: .*greater than"),
        (
            "discrepancy",
            {"student_ppl": {"code": -1, "prose": 2}},
            r"line 2: student_ppl.code: .*greater than",
        ),
        ("discrepancy", {"student_ppl": {"code": 1}}, r"line 2: its maps do not all have the same domains"),
        ("discrepancy", {"factor": None}, r"line 2: factor: "),
        ("discrepancy", {"step": "soon"}, r"line 2: step: "),
    ],
    ids=["html", "by-domain", "speed", "negative", "domains", "null", "text"],
)
def test_an_invalid_line_has_a_one_line_error(
    make_run: MakeRun, name: str, change: Line, message: str
) -> None:
    lines = {"metrics": [*METRICS], "discrepancy": [*FINISHED]}
    lines[name][1] = lines[name][1] | change
    folder = make_run(lines["discrepancy"], lines["metrics"])
    with pytest.raises(ConfigError, match=rf"{name}\.jsonl: {message}") as caught:
        write_report([folder])
    assert "\n" not in str(caught.value)


SAMPLE = {"step": 0, "domain": "code", "prompt": "a", "text": "b", "sample": "c"}
FACTS: Line = {
    "began": "2026-01-01T00:00:00Z",
    "versions": {"torch": "2.9"},
    "machine": "m",
    "processes": 1,
    "teachers": ["t"],
    "target": "top 8",
    "seq_length": 64,
    "train_tokens": {"code": 3},
    "train_rows": {"code": 1},
    "cache_bytes": 1000,
}
DEEP = "[" * 100_000
STRANGE: list[tuple[str, str]] = [
    *((name, text) for name in ("metrics", "discrepancy", "samples") for text in ("", "[]", "null", "{}{}")),
    *((name, DEEP) for name in ("metrics", "discrepancy", "samples")),
    ("metrics", '{"step": 5, "loss": 1e999}'),
    ("metrics", json.dumps(metric(5) | {"step": 10**30})),
    ("metrics", json.dumps(metric(5) | {"tokens": 10**30})),
    ("metrics", json.dumps(metric(5) | {"tokens": float("inf")})),
    ("metrics", json.dumps(metric(5) | {"kl/code": {"nested": [1]}})),
    ("discrepancy", json.dumps(FINISHED[0] | {"rows": {"code": 10**30, "prose": 1}})),
    ("discrepancy", json.dumps(FINISHED[0] | {"step": -1})),
    ("discrepancy", json.dumps(FINISHED[0] | {"teacher_ppl": {"code": 1e-308, "prose": 1}})),
    ("discrepancy", json.dumps(FINISHED[0] | {"student_ppl": {"code": float("nan"), "prose": 1}})),
    ("discrepancy", json.dumps(FINISHED[0] | {"factor": {"code": 2, "prose": 1}})),
    ("samples", json.dumps(SAMPLE | {"sample": None})),
    ("run.json", "\udcff\udcfe"),
    ("run.json", ""),
    ("run.json", DEEP),
    ("run.json", json.dumps(FACTS | {"began": "2026-01-01T00:00:00"})),
    ("run.json", json.dumps(FACTS | {"ended": "2026-01-01"})),
    ("run.json", json.dumps(FACTS | {"versions": None})),
    ("config.yaml", ""),
    ("config.yaml", "\udcff"),
    ("config.yaml", DEEP),
    ("config.yaml", "cache: c\nstudent: !!python/object:os.system x\noutput_dir: o\n"),
    ("config.yaml", "cache: c\nstudent: s\noutput_dir: o\nmax_steps: [1]\n"),
    ("config.yaml", f"cache: c\nstudent: s\noutput_dir: o\nmax_steps: {10**400}\n"),
]


@pytest.mark.parametrize(("name", "text"), STRANGE)
def test_an_invalid_file_has_a_one_line_error(make_run: MakeRun, name: str, text: str) -> None:
    """Check wrong types, deep nesting, huge numbers, and bytes that are not UTF-8."""
    folder = make_run(metrics=METRICS)
    path = folder / (name if "." in name else f"{name}.jsonl")
    path.write_bytes((text if "." in name else f"{text}\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=rf"^{path}: ") as caught:
        write_report([folder])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>$x^2$&\x1b[2J\x07\x00\ufffe\u202e中"


def renamed(line: Line, name: str) -> Line:
    """Return the line with another name for the domain code."""
    return {
        key: {name if domain == "code" else domain: v for domain, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in line.items()
    }


@pytest.mark.parametrize("value", [1e308, -1e308, 1e-308, float("nan"), float("inf")])
def test_extreme_names_and_numbers_give_a_complete_page(make_run: MakeRun, value: float) -> None:
    """HTML and mathematics stay text, control characters go: in tables, plots, samples, facts, settings."""
    changes = {"loss": value, "kl": value, "grad_norm": value, f"kl/{EVIL}": value, "learning_rate": value}
    changes["tokens_per_second"] = abs(value) if value == value else 1.0
    measured = {"standard_error": 0.1, "validation_kl": value if value == value else 1.0}
    lines = [
        renamed(line | {k: dict.fromkeys(TEACHER, v) for k, v in measured.items()}, EVIL) for line in FINISHED
    ]
    folder = make_run(
        lines,
        [METRICS[0], METRICS[1] | changes, *METRICS[2:]],
        student=EVIL.translate({0: "0", ord("$"): None}),
    )
    samples = [dict.fromkeys(SAMPLE, EVIL) | {"step": step} for step in (0, 20)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    facts = FACTS | {"machine": EVIL, "teachers": [EVIL], "versions": {EVIL: EVIL}, "target": EVIL}
    (folder / "run.json").write_text(json.dumps(facts))
    page = read(folder)
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert not control_characters(page.replace("\n", ""))
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;") > 10


def test_other_domains_in_a_later_line(make_run: MakeRun) -> None:
    folder = make_run([interval(0, ["code", "prose"], 5), interval(1, ["code"], 5)])
    with pytest.raises(ConfigError, match="interval 1: its domains are not those of line 1"):
        write_report([folder])


def test_a_long_name_is_shortened_in_the_picture(make_run: MakeRun) -> None:
    name = "x" * 64
    page = read(make_run([renamed(line, name) for line in FINISHED]))
    assert f">{'x' * 19}…</text>" in "".join(pictures(page))
    assert f'title="{name}, teacher: 4"' in page


def test_values_appear_on_hovering(make_run: MakeRun) -> None:
    page = read(make_run(metrics=METRICS))
    assert 'title="code, optimizer step 10: 2 ratio"' in page
    assert 'title="prose, teacher: 10"' in page
    assert 'title="code, steps 1 to 10: 50.0%"' in page
    assert 'title="loss, optimizer step 20: 2.8 nats a token"' in page
    for unit in ("nats a token", "share of draws", "tokens/s", "optimizer step", "ratio"):
        assert f">{unit}</text>" in "".join(pictures(page))


def test_first_interval_draws_by_size_only_with_ddk(make_run: MakeRun) -> None:
    note = "The first interval draws by the domains' sizes instead."
    assert note in unescape(read(make_run()))
    assert note not in unescape(read(make_run(strategy="uniform")))


def test_plots_by_domain_where_the_files_have_values(make_run: MakeRun) -> None:
    assert "KL by domain" not in read(make_run(metrics=METRICS))
    metrics = [line | {"kl/code": 1.0, "cross_entropy/code": 2.0} for line in METRICS]
    measured = {name: {"code": 0.5, "prose": 0.25} for name in ("validation_kl", "validation_agreement")}
    intervals = [line | measured for line in FINISHED]
    page = read(make_run(intervals, metrics))
    for title in ("KL by domain", "Cross-entropy by domain", "KL to the teacher", "Top-1 agreement"):
        assert f"<h3>{title}</h3>" in page
    assert 'title="prose, optimizer step 20: 0.25 nats a token"' in page


def test_bits_per_byte_where_the_tokens_bytes_are_known(make_run: MakeRun, tmp_path: Path) -> None:
    assert "its per byte" not in read(make_run())
    teacher = {"code": 0.75, "prose": 1.0}
    lines = [
        line | {"teacher_bits_per_byte": teacher, "student_bits_per_byte": {"code": 2.5 - step, "prose": 2.0}}
        for step, line in enumerate(FINISHED)
    ]
    folder = make_run(lines)
    assert [row[-1] for row in cells(read(folder))] == ["2.500 → 0.500 (0.750)", "2.000 → 2.000 (1.000)"]
    page = write_report([folder, folder], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h3>Bits per byte</h3>" in page
    assert {row[6] for row in cells(page)} == {"1.25"}


def looks(page: str, name: str) -> set[str]:
    """Return the lines beside a name in the legends: width, style and colour."""
    return set(re.findall(rf'<i style="border-top:([^"]*)"></i>{name}</span>', page))


def test_a_domain_has_one_colour(make_run: MakeRun) -> None:
    """Whichever domain comes first, and also if another has no values."""
    first = {"cross_entropy/prose": 2.0}
    later = {"cross_entropy/code": 2.0, "kl/prose": 1.0, "cross_entropy/prose": 2.0}
    page = read(make_run(metrics=[METRICS[0] | first, *(line | later for line in METRICS[1:])]))
    assert page.count("<h3>Cross-entropy by domain</h3>") == page.count("<h3>KL by domain</h3>") == 1
    assert looks(page, "prose") == {"3px dashed #E69F00"}
    assert looks(page, "code") == {"3px solid #0072B2"}
    kl_by_domain = pictures(page.partition("KL by domain")[2])[0]
    assert "#e69f00" in kl_by_domain
    assert "#0072b2" not in kl_by_domain


def test_a_run_has_one_colour(make_run: MakeRun, tmp_path: Path) -> None:
    """Also beside a run without KL."""
    folders = []
    for index, changes in enumerate(({"gamma": 0}, {"seed": 1}, {"seed": 2})):
        folder = tmp_path / f"run{index}"
        shutil.copytree(make_run(metrics=METRICS, **changes), folder, ignore=lambda *_: {"run0", "run1"})
        folders.append(folder)
    page = write_report(folders).read_text()
    assert looks(page, "run1") == {"3px dashed #E69F00"}
    assert looks(page, "run2") == {"3px dotted #009E73"}


def test_several_runs_are_laid_over(make_run: MakeRun, tmp_path: Path) -> None:
    folders = []
    for index, strategy in enumerate(("ddk", "uniform")):
        folder = tmp_path / f"run{index}"
        shutil.copytree(make_run(metrics=METRICS, strategy=strategy), folder, ignore=lambda *_: {"run0"})
        folders.append(folder)
    page = write_report(folders)
    assert page == tmp_path / "report.html"
    text = page.read_text()
    assert "<title>2 runs: run0, run1</title>" in text
    assert [row[0] for row in table(text, 0)] == ["run0", "run1"]
    assert table(text, 1)[1] == ["prose", "10.0", "15.0 · 1.50", "15.0 · 1.50"]
    assert table(text, 2) == [["strategy", "ddk", "uniform"]]
    for title in ("Mean ratio", "Worst ratio", "code: ratio", "code: factor", "KL"):
        assert text.count(f"<h3>{title}</h3>") == 3, "once over each axis"
    for place in ("optimizer step 20", "million tokens 0.02", "hours in training steps 0.0452"):
        assert f'title="run1, {place}: 1.25 ratio"' in text
    checker = Checker()
    checker.feed(text)
    assert not checker.open


def test_facts_of_a_real_run(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config(max_steps=2)
    train(config)
    page = read(Path(config.output_dir))
    for fact in (
        "top 8, rows of 24 tokens",
        "tokens in the cache",
        "ddk-cache 0.",
        "UTC",
        "with interruptions and evaluation",
    ):
        assert fact in page
    assert re.search(r"<title>student\d* from teacher\d*, ddk \(run\)</title>", page)


def test_each_perplexity_has_its_standard_error(make_run: MakeRun) -> None:
    """It is null for one row."""
    lines = [line | {"standard_error": {"code": 0.125, "prose": None}} for line in FINISHED]
    code, prose = cells(read(make_run(lines)))[:2]
    assert code[2:4] == ["16.0 ± 2.00", "4.00 ± 0.50"]
    assert "±" not in "".join(prose)


def test_samples_of_a_domain_are_together(make_run: MakeRun) -> None:
    folder = make_run()
    line: dict[str, Any] = {"prompt": "def add(", "text": "a, b)", "sample": "<b>law</b>"}
    lines = [line | {"step": step, "domain": name} for step in (0, 20) for name in TEACHER]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = read(folder)
    assert page.count("<dd>&lt;b&gt;law&lt;/b&gt;</dd>") == 4
    assert page.count("<dt>student, step 0</dt>") == page.count("<dt>student, step 20</dt>") == 2


def test_samples_of_several_runs_are_the_last_of_each(make_run: MakeRun, tmp_path: Path) -> None:
    """The held-out text is shown once, unless the runs had different ones."""
    folders = []
    for index, prompts in enumerate(
        ({"code": "def a(", "prose": "Once"}, {"code": "def a(", "prose": "Then"})
    ):
        folder = tmp_path / f"run{index}"
        shutil.copytree(make_run(), folder, ignore=lambda *_: {"run0"})
        lines = [
            {"domain": name, "prompt": prompt, "text": "x", "step": step, "sample": f"{name} {index} {step}"}
            for step in (0, 20)
            for name, prompt in prompts.items()
        ]
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(folder)
    page = write_report(folders).read_text()
    assert [page.count(f"<dd>{prompt}</dd>") for prompt in ("def a(", "Once", "Then")] == [1, 1, 1]
    for index in range(2):
        assert f"<dt>run{index}, step 20</dt><dd>code {index} 20</dd>" in page
    assert "step 0</dt>" not in page


def test_a_long_series_has_its_running_mean(make_run: MakeRun) -> None:
    values = np.array([1.0, 3.0] * 100)
    assert running_mean(values)[10:-10] == pytest.approx(
        2.0, abs=0.12
    )  # nine values: five of one, four of the other
    values[[50, 60]] = np.nan, np.inf
    assert np.isfinite(running_mean(values)).all()
    assert np.isnan(running_mean([np.nan] * 200)).all()
    few, many = (read(make_run(metrics=[metric(step) for step in range(1, n + 1)])) for n in (99, 100))
    assert "As logged, not smoothed." in few
    assert "Pale: as logged; bold: its running mean." in many


def test_watch_updates_the_page_until_the_run_ends(make_run: MakeRun, tmp_path: Path) -> None:
    folder, reload = make_run(FINISHED[:2]), '<meta http-equiv="refresh" content="0.1">'
    page = write_report([folder], reload_seconds=0.1)
    assert reload in page.read_text()
    ending = threading.Timer(0.3, make_run, [FINISHED])
    ending.start()
    watch([folder], page, 0.1)
    ending.join()
    assert reload not in page.read_text()
    assert "Finished: 20 steps." in page.read_text()


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync")  # fmt: skip
# Windows have a least width of 500, so the page stands in a frame.
FRAME = """<!doctype html><title></title><script>
function inside(box, figure) {
  const outer = figure.getBoundingClientRect()
  return outer.left < box.left && box.right < outer.right && outer.top < box.top && box.bottom < outer.bottom
}
function look({contentWindow: page, contentDocument: root}) {
  root.getElementById("axis-3")?.click()
  const [pictures, hovers] = [".plot img", ".plot i"].map(
    kind => [...root.querySelectorAll(kind)].filter(one => one.offsetParent))
  document.title = JSON.stringify({
    width: page.innerWidth, fits: root.documentElement.scrollWidth <= page.innerWidth,
    dark: page.matchMedia("(prefers-color-scheme: dark)").matches,
    light: page.getComputedStyle(root.body).backgroundColor == "rgb(245, 246, 248)",
    drawn: pictures.filter(one => one.naturalWidth > 100 && one.clientWidth > 100).length,
    inverted: pictures.filter(one => page.getComputedStyle(one).filter != "none").length,
    letters: Math.floor(Math.min(...pictures.map(one => 12 * one.clientWidth / one.naturalWidth))),
    hovers: hovers.length,
    scrolls: [...root.querySelectorAll(".table:has(td)")].some(one => one.scrollWidth > one.clientWidth),
    axes: [...root.querySelectorAll(".switch > .grid")].map(one => one.clientHeight > 0),
    outside: hovers.filter(one => !inside(one.getBoundingClientRect(), one.closest("figure"))).length,
    fetched: page.performance.getEntriesByType("resource").filter(one => !/^data:/.test(one.name)).length})}
</script>
<iframe style="border: 0; height: 900px; width: %dpx" onload="look(this)" srcdoc="%s"></iframe>"""


@pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: {', '.join(BROWSERS)}")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("runs", [1, 2])
def test_in_a_browser(make_run: MakeRun, tmp_path: Path, runs: int, width: int, scheme: str) -> None:
    """Check that plots are drawn and readable, nothing is too wide or fetched, and the console is empty."""
    assert BROWSER is not None
    measured = {"validation_kl": TEACHER, "standard_error": {"code": 0.05, "prose": 0.05}}
    if runs == 1:  # all columns, with numbers of usual lengths
        bits = {"code": 2.5, "prose": 2.0}
        measured |= {"teacher_bits_per_byte": bits, "student_bits_per_byte": bits}
    lines = [
        line | measured | {"rows": {name: 250 * rows for name, rows in line["rows"].items()}}
        for line in FINISHED
    ]
    folder = make_run(intervals=lines, metrics=METRICS)
    page = write_report([folder] * runs, tmp_path / "page.html")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % (width, escape(page.read_text())))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000",
         *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom",
         f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    seen = json.loads(unescape(done.stdout.partition("<title>")[2].partition("</title>")[0]))
    plots = 10
    assert len(pictures(page.read_text())) == (plots if runs == 1 else 3 * plots)
    assert seen.pop("hovers") > 3 * plots
    assert 10 <= seen.pop("letters") <= 16, "pixels"
    assert seen == {
        "width": width,
        "fits": True,
        "dark": scheme == "dark",
        "light": scheme == "light",
        "drawn": plots,
        "inverted": plots if scheme == "dark" else 0,
        "scrolls": width < 1200 or runs == 2,  # one folder twice: a name is its whole path
        "axes": [] if runs == 1 else [False, False, True],
        "outside": 0,
        "fetched": 0,
    }


def test_a_long_run_is_read_in_part_and_keeps_its_shape(make_run: MakeRun) -> None:
    """200,000 lines of metrics, 20,000 of measurements and a large samples.jsonl."""
    folder = make_run(max_steps=10**6)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 200_001):
            line = metric(step) | {"loss": 1 + step / 200_000, "tokens": 1000 * step}
            file.write(json.dumps(line) + "\n")
    with (folder / "discrepancy.jsonl").open("w") as file:
        for index in range(20_000):
            line = FINISHED[index > 0] | {"interval": index, "step": 10 * index}
            file.write(json.dumps(line | {"rows": {"code": 3 * (index < 19_999), "prose": 0}}) + "\n")
    generation = json.dumps(SAMPLE | {"sample": "x" * 2000}) + "\n"
    (folder / "samples.jsonl").write_text(generation * 4000)
    run = read_run(folder)
    assert run.excerpts == {
        "metrics.jsonl": 2000, "discrepancy.jsonl": 400, "samples.jsonl": 200,
    }  # fmt: skip
    steps = np.array([line.step for line in run.metrics])
    assert (steps[0], steps[-1]) == (1, 200_000)
    # Numbers of more digits make later lines longer, so the distance in steps varies a little.
    assert np.diff(steps).min() > 80
    assert np.diff(steps)[:-1].max() < 120
    assert steps[-1] - steps[-2] < 200
    assert run.tokens == 200_000_000
    assert run.training_seconds == pytest.approx(200_000_000 / 123)
    assert run.is_finished
    assert run.rows_drawn == {"code": 3 * 19_999, "prose": 0}
    page = read(folder)
    assert "metrics.jsonl: 2,000 lines, spread over the file" in page
    assert len(page) < 8_000_000


def test_numbers_of_hundreds_of_digits(make_run: MakeRun) -> None:
    folder = make_run(metrics=METRICS, distill_interval=10**400)
    assert f"{10**400:,}" in read(folder)
    (folder / "run.json").write_text(json.dumps(FACTS | {"cache_bytes": 10**400}))
    with pytest.raises(ConfigError, match=r"run\.json: cache_bytes: "):
        read(folder)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "samples.jsonl", "run.json", "report.html"])
def test_links_lead_neither_out_nor_in(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    """A stranger's run must not read the user's files into the page, nor write over them."""
    folder = shutil.copytree(make_run(metrics=METRICS), tmp_path / "stranger")
    (folder / "run.json").write_text(json.dumps(FACTS))
    (folder / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    diary = tmp_path / "diary"
    diary.write_text((folder / name).read_text() if (folder / name).exists() else "dear diary")
    before = diary.read_bytes()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(diary)
    if name == "report.html":
        assert not write_report([folder]).is_symlink()
    else:
        with pytest.raises(ConfigError, match=rf"{name}: is a link that leads out"):
            write_report([folder])
    assert diary.read_bytes() == before


def test_the_page_begins_with_a_verdict_and_marks_what_was_set(make_run: MakeRun) -> None:
    page = unescape(read(make_run(metrics=METRICS, run_name="first try", gamma=0.2)))
    assert "<h1>first try <small>" in page
    assert (
        "The student closed 82% of the gap to its teacher, mean of 2 domains; prose is furthest behind"
        in page
    )
    settings = page.partition("<pre>")[2].partition("</pre>")[0]
    assert "<b>max_steps: 20\n</b>" in settings
    assert "gamma: 0.2\n" in settings  # the default
    assert "<b>gamma" not in settings


def test_a_colour_has_one_meaning(make_run: MakeRun) -> None:
    """Domains have colours; measures of the whole run are in ink, apart by their lines."""
    page = read(make_run(metrics=[line | {"kl/code": 1.0, "kl/prose": 2.0} for line in METRICS]))
    assert [*looks(page, "loss"), *looks(page, "kl")] == ["3px solid #1c2430", "3px dotted #1c2430"]
    assert looks(page, "code") == {"3px solid #0072B2"}
    before_and_after = pictures(page)[0]
    for colour in ("#0072b2", "#e69f00", "#009e73", "#d55e00"):
        assert colour not in before_and_after


def test_axes_have_plain_numbers(make_run: MakeRun) -> None:
    lines = [
        line | {"learning_rate": 3e-5, "tokens_per_second": 2e6, "data_wait_fraction": 1e-3}
        for line in METRICS
    ]
    for picture in pictures(read(make_run(metrics=lines))):
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
        assert [text for text in texts if re.search(r"\de[-+−]?\d", text)] == []


def test_only_held_out_measures_are_bold_in_a_comparison(make_run: MakeRun, tmp_path: Path) -> None:
    folders = []
    for index, kl in enumerate((0.5, 0.25)):
        lines = [line | {"validation_kl": dict.fromkeys(TEACHER, kl)} for line in FINISHED]
        metrics = [line | {"kl": 0.1 * (index + 1)} for line in METRICS]
        folder = tmp_path / f"run{index}"
        shutil.copytree(make_run(lines, metrics), folder, ignore=lambda *_: {"run0"})
        folders.append(folder)
    text = write_report(folders).read_text()
    body = text.split("<tbody>")[1].partition("</tbody>")[0]
    assert re.findall(r"<b>([^<]*)</b>", body) == ["1.25", "1.50", "1.25", "1.50", "0.25"]
    assert [row[-3:-1] for row in table(text, 0)] == [["2.50", "0.10"], ["2.50", "0.20"]]
