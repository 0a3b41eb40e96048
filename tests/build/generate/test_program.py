"""The program around the engine: prompts, files, resuming and refusals. Its engine needs no model."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from helpers.documents import write_rows
from helpers.dying import die_at_call
from helpers.writing import Echo, use
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ddk_build import cli
from ddk_build.data.written import Written
from ddk_build.generate import folder, program, vllm_engine
from ddk_build.generate.config import GenerateConfig
from ddk_build.generate.engine import Request
from ddk_cache.errors import CacheError, ConfigError

QUESTIONS = [f"print {number}" for number in range(11)]
Write = Callable[..., Path]


class Mute(Echo):
    def text(self, request: Request) -> str:
        return " \n"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Echo:
    """Put an ``Echo`` in the place of vLLM."""
    return use(monkeypatch, Echo())


@pytest.fixture
def settings(tmp_path: Path, teacher_folder: Path, datasets_cache: None) -> dict[str, Any]:
    rows = [{"question": question} for question in QUESTIONS]
    return {
        "model": str(teacher_folder),
        "output": str(tmp_path / "written"),
        "sampling": {"max_tokens": 8, "samples": 2},
        "shard_tokens": 4 * 8 * 2,
        "domains": {
            "qa": {
                "path": write_rows(tmp_path / "qa.jsonl", rows),
                "prompt_column": "question",
                "prompt_format": "plain",
            }
        },
    }


def configured(settings: dict[str, Any], **changes: Any) -> GenerateConfig:
    return GenerateConfig.model_validate(settings | changes)


def files(written: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in written.rglob("*.parquet*")}


def rows(written: Path, domain: str = "qa") -> list[dict[str, Any]]:
    paths = sorted((written / domain).glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def test_files_do_not_depend_on_the_order_in_which_completions_end(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = []
    for order in range(3):
        use(monkeypatch, Echo(order))
        contents.append(files(program.generate(configured(settings, output=str(tmp_path / f"{order}")))))
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) == 3


def run_until(settings: dict[str, Any], nth: int, after: bool) -> None:
    vllm_engine.VllmEngine = lambda *_: Echo(nth)  # type: ignore[assignment,misc]
    vllm_engine.check_arguments = lambda *_: None
    Path.replace = die_at_call(nth, Path.replace, after=after)  # type: ignore[method-assign]
    program.generate(configured(settings))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 6])
def test_killed_at_any_file_it_resumes_to_the_same_bytes(
    settings: dict[str, Any], tmp_path: Path, engine: Echo, nth: int, after: bool
) -> None:
    whole = files(program.generate(configured(settings, output=str(tmp_path / "whole"))))
    process = multiprocessing.get_context("fork").Process(target=run_until, args=(settings, nth, after))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    done = files(Path(settings["output"])).keys() & whole.keys()
    assert len(done) == max(0, min(3, nth - 2 - (not after)))
    engine.asked.clear()
    assert files(program.generate(configured(settings))) == whole
    assert len({(request.index, request.sample) for request in engine.asked}) == len(engine.asked)
    assert len(engine.asked) == 2 * len(QUESTIONS) - 8 * min(len(done), 2) - 6 * (len(done) == 3)


def test_a_finished_folder_needs_no_engine(settings: dict[str, Any], engine: Echo) -> None:
    program.generate(configured(settings))
    engine.asked.clear()
    lines: list[str] = []
    program.generate(configured(settings), report=lines.append)
    assert not engine.asked
    cut = sum(row["finish_reason"] == "length" for row in rows(Path(settings["output"])))
    assert lines[0] == "qa: prompts are continued as plain text (prompt_format: plain)"
    assert lines[1:] == [f"qa: 11 prompts, 22 completions (66 tokens), {cut} cut by max_tokens, 0 empty"]


def test_more_prompts_and_domains_can_be_added(settings: dict[str, Any], engine: Echo) -> None:
    source = settings["domains"]["qa"]
    first = program.generate(configured(settings, domains={"qa": source | {"max_prompts": 6}}))
    before = rows(first)
    program.generate(configured(settings, domains={"qa": source, "again": source}))
    assert [row["sample"] for row in rows(first)] == [0, 1] * 11
    assert rows(first)[:12] == before
    assert rows(first, "again") == rows(first)
    note = Written.read(first)
    assert note is not None
    assert {name: domain.completions for name, domain in note.domains.items()} == {"qa": 22, "again": 22}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "seed: 0 -> 5"),
        ({"sampling": {"max_tokens": 8, "samples": 2, "top_p": 0.5}}, "sampling.top_p: 1.0 -> 0.5"),
        ({"dtype": "float32"}, "dtype: 'bfloat16' -> 'float32'"),
        ({"drop_truncated": True}, "drop_truncated: False -> True"),
        ({"max_prompts": 5}, "domains.qa: 11 prompts -> 5"),
        ({"prompt_format": "chat"}, "domains.qa.prompt_format: 'plain' -> 'chat'"),
    ],
)
def test_another_configuration_is_refused_by_name(
    settings: dict[str, Any], engine: Echo, changes: dict[str, Any], message: str
) -> None:
    program.generate(configured(settings))
    if changes.keys() & {"max_prompts", "prompt_format"}:
        changes = {"domains": {"qa": settings["domains"]["qa"] | changes}}
    with pytest.raises(ConfigError, match="was written with another configuration") as error:
        program.generate(configured(settings, **changes))
    assert message in str(error.value)


def test_prompts_that_have_changed_are_refused(settings: dict[str, Any], engine: Echo) -> None:
    program.generate(configured(settings))
    path = Path(settings["domains"]["qa"]["path"])
    path.write_text(path.read_text().replace("print 3", "print 33"))
    with pytest.raises(ConfigError, match=r"domains\.qa: its prompts have changed since"):
        program.generate(configured(settings))


def test_the_folder_must_be_its_own(settings: dict[str, Any], engine: Echo) -> None:
    written = Path(settings["output"])
    written.mkdir()
    (written / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"output: .* holds other files, such as thesis.tex"):
        program.generate(configured(settings))
    (written / "thesis.tex").unlink()
    plan = program.make_plan(configured(settings))
    with (
        folder.open_folder(written, plan.note, plan.vocabulary, 4),
        pytest.raises(CacheError, match="another generate is at work there"),
    ):
        program.generate(configured(settings))


def test_completions_that_were_cut_can_be_left_out(settings: dict[str, Any], engine: Echo) -> None:
    kept = rows(program.generate(configured(settings, drop_truncated=True)))
    assert 0 < len(kept) < 2 * len(QUESTIONS)
    assert {row["finish_reason"] for row in kept} == {"stop"}


def test_columns_of_the_source_can_be_kept(settings: dict[str, Any], engine: Echo) -> None:
    """With the source's types, also where a whole file has nulls; a build can score by them."""
    answers = [None] * 4 + [{"value": number / 2, "steps": ["a", "b"]} for number in range(7)]
    given = [
        {"question": question, "answer": answer, "other": 1}
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]
    domain = settings["domains"]["qa"] | {"keep_columns": ["answer"]}
    write_rows(Path(domain["path"]), given)
    written = program.generate(configured(settings, domains={"qa": domain}))
    assert [row["answer"] for row in rows(written)] == [answer for answer in answers for _ in range(2)]
    schemas = [pq.read_schema(path) for path in sorted(written.rglob("*.parquet"))]
    assert len(schemas) == 3
    assert all(schema == schemas[0] for schema in schemas)
    assert "other" not in schemas[0].names


def test_the_prompt_itself_can_be_kept(settings: dict[str, Any], engine: Echo) -> None:
    domain = settings["domains"]["qa"] | {"keep_columns": ["question"]}
    written = program.generate(configured(settings, domains={"qa": domain}))
    assert [row["question"] for row in rows(written)] == [text for text in QUESTIONS for _ in range(2)]


def test_only_empty_completions_are_an_error(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Mute())
    with pytest.raises(ConfigError, match=r"domains\.qa: all of its first 8 completions are empty"):
        program.generate(configured(settings))
    assert not files(Path(settings["output"]))


def test_seeds_depend_on_seed_prompt_and_sample_alone(settings: dict[str, Any], engine: Echo) -> None:
    program.generate(configured(settings))
    by_prompt = {(request.prompt.id, request.sample): request.seed for request in engine.asked}
    assert len(set(by_prompt.values())) == 2 * len(QUESTIONS)
    assert all(0 <= seed < 2**63 for seed in by_prompt.values())
    path = Path(settings["domains"]["qa"]["path"])
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    engine.asked.clear()
    program.generate(configured(settings, output=settings["output"] + "2"))
    assert {(request.prompt.id, request.sample): request.seed for request in engine.asked} == by_prompt
    program.generate(configured(settings, output=settings["output"] + "3", seed=1))
    assert engine.asked[-1].seed not in by_prompt.values()


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    settings: dict[str, Any], engine: Echo
) -> None:
    program.generate(configured(settings, domains={"qa": settings["domains"]["qa"] | {"max_prompts": 4}}))
    before = files(Path(settings["output"]))
    text = program.dry_run(configured(settings))
    assert GenerateConfig.model_validate(yaml.safe_load(text)) == configured(settings)
    tokens = [len(request.prompt.tokens) for request in engine.asked]
    assert "# qa: 11 prompts (" in text
    assert f"the longest {max(tokens)}" in text
    assert "22 completions of at most 176 tokens" in text
    assert text.endswith("can be written; 3 files, 1 done\n")
    assert files(Path(settings["output"])) == before


def prompts(settings: dict[str, Any], given: list[Any], engine: Echo, **keys: Any) -> list[str]:
    """Return the prompts that the engine gets of these rows, as texts."""
    domain = {"path": write_rows(Path(settings["output"] + ".jsonl"), given)} | keys
    program.generate(configured(settings, domains={"qa": domain}, sampling={"max_tokens": 8}))
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    return [str(tokenizer.decode(request.prompt.tokens)) for request in engine.asked]


def test_a_question_can_be_a_users_message(settings: dict[str, Any], engine: Echo) -> None:
    """With an instruct model they are by default, as in a build."""
    [text] = prompts(settings, [{"q": "print"}], engine, prompt_column="q")
    assert text == "<|im_start|>user\nprint<|im_end|><|im_start|>assistant\n"


def test_prompts_are_texts_or_conversations(settings: dict[str, Any], engine: Echo) -> None:
    given = [{"q": [{"from": "human", "value": "fox"}, {"from": "gpt", "value": "dog"}]}]
    [text] = prompts(settings, given, engine, prompt_column="q")
    assert text == "<|im_start|>user\nfox<|im_end|><|im_start|>assistant\n"


def test_rows_without_a_prompt_are_counted_by_reason(settings: dict[str, Any], engine: Echo) -> None:
    given = [{"q": "fox"}, {"q": None}, {"q": "fox"}, {"q": ""}, {"q": "fox " * 600}, {"q": "dog"}]
    assert prompts(settings, given, engine, prompt_column="q", prompt_format="plain") == ["fox", "dog"]
    note = Written.read(Path(settings["output"]))
    assert note is not None
    assert note.domains["qa"].skipped == {
        "null": 1,
        "a copy of an earlier prompt": 1,
        "empty": 1,
        "longer than the model with max_tokens": 1,
    }


def test_the_templates_own_options(
    settings: dict[str, Any], engine: Echo, teacher_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in teacher_folder.iterdir():
        os.link(path, model / path.name)
    template = (model / "chat_template.jinja").read_text() + "{% if not enable_thinking %}<t></t>{% endif %}"
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").write_text(template)
    settings["model"] = str(model)
    given = [{"m": [{"role": "user", "content": "fox"}]}]
    [text] = prompts(
        settings, given, engine, messages_column="m", chat_template_kwargs={"enable_thinking": False}
    )
    assert text.endswith("assistant\n<t></t>")
    message = r"domains\.qa\.chat_template_kwargs\.enable_thinkin: .* no such option; did you mean 'enable_th"
    with pytest.raises(ConfigError, match=message):
        prompts(settings, given, engine, messages_column="m", chat_template_kwargs={"enable_thinkin": False})


def test_no_content_is_not_written_as_none(settings: dict[str, Any], engine: Echo) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    given = [{"m": [{"role": "user", "content": "fox"}, call, {"role": "tool", "content": "3"}]}]
    [text] = prompts(settings, given, engine, messages_column="m", allow_dropped=["tool_calls"])
    assert "<|im_start|>assistant\n<|im_end|>" in text


def test_a_prompt_that_the_template_cannot_render_is_skipped(
    settings: dict[str, Any], engine: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PreTrainedTokenizerBase.apply_chat_template

    def apply(self: Any, messages: list[Any], **options: Any) -> Any:
        int(messages[0]["content"])
        return original(self, messages, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", apply)
    [text] = prompts(settings, [{"q": "fox"}, {"q": "3"}], engine, prompt_column="q")
    assert "user\n3<|im_end|>" in text


def test_what_the_template_would_drop_is_skipped(settings: dict[str, Any], engine: Echo) -> None:
    """As in a build; but reasoning before the last question is dropped rightly."""
    tools = [{"type": "function", "function": {"name": "add"}}]
    question = {"role": "user", "content": "fox"}
    answer = {"role": "assistant", "content": "dog", "reasoning_content": "because"}
    given = [
        {"m": [question, answer, {"role": "user", "content": "jumps"}], "tools": None},
        {"m": [question, answer, {"role": "tool", "content": "3"}], "tools": None},
        {"m": [question], "tools": tools},
    ]
    assert len(prompts(settings, given, engine, messages_column="m")) == 1
    note = Written.read(Path(settings["output"]))
    assert note is not None
    assert note.domains["qa"].skipped == {
        "with reasoning_content that the chat template drops": 1,
        "with tools that the chat template drops": 1,
    }
    keys = {"messages_column": "m", "allow_dropped": ["tools"]}
    with pytest.raises(
        ConfigError, match=r"has no prompt \(1 with reasoning_content .*; use a chat template"
    ):
        prompts(settings | {"output": settings["output"] + "-2"}, given[1:2], engine, **keys)
    assert len(prompts(settings | {"output": settings["output"] + "-3"}, given[2:], engine, **keys)) == 2


@pytest.mark.parametrize(
    ("given", "keys", "message"),
    [
        (
            [{"q": "fox " * 600}],
            {"prompt_column": "q"},
            r"has no prompt \(1 longer .*; lower sampling.max_tok",
        ),
        ([{"q": "fox"}], {"prompt_column": "r"}, "there is no column 'r'; there are: q"),
        ([{"q": "fox"}], {"messages_column": "q"}, r"has no prompt \(1 not a list of messages with roles\)"),
        (
            [{"q": [{"role": "assistant", "content": "fox"}]}],
            {"messages_column": "q"},
            r"has no prompt \(1 without a message to answer\)",
        ),
    ],
)
def test_a_domain_without_prompts(
    settings: dict[str, Any], engine: Echo, given: list[Any], keys: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"domains\.qa: {message}"):
        prompts(settings, given, engine, **keys)


def test_a_model_without_a_chat_template(
    settings: dict[str, Any], engine: Echo, teacher_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in teacher_folder.iterdir():
        if path.name != "chat_template.jinja":
            os.link(path, model / path.name)
    settings["model"] = str(model)
    with pytest.raises(ConfigError, match=r"domains\.qa\.messages_column: the model's tokenizer has no chat"):
        prompts(settings, [{"m": [{"role": "user", "content": "fox"}]}], engine, messages_column="m")
    assert prompts(settings, [{"q": "fox"}], engine, prompt_column="q") == ["fox"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./nowhere"}, r"^model: \./nowhere: there is no such folder"),
        (
            {"sampling": {"max_tokens": 512}},
            r"sampling\.max_tokens: 512 leaves no room for a prompt in the 512",
        ),
        (
            {"engine_args": {"max_model_len": "auto"}},
            r"^engine_args\.max_model_len: must be a whole number, not 'auto'; leave it out",
        ),
        ({"engine_args": {"max_model_len": None}}, r"^engine_args\.max_model_len: must be .*, not None"),
        ({"model": "./runs/teacher.v2"}, r"^model: \./runs/teacher\.v2: there is no such folder"),
    ],
)
def test_what_cannot_be_written(
    settings: dict[str, Any], engine: Echo, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        program.generate(configured(settings, **changes))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sampling", {"temperature": 0, "samples": 4}, "sampling: samples: must be 1 with temperature 0"),
        (
            "sampling",
            {"temprature": 1},
            "sampling.temprature: unknown key; did you mean 'temperature'?",
        ),
        ("output", "s3://bucket/x", "output: must be a folder of this machine, not a URL"),
        (
            "engine_args",
            {"dtype": "float16"},
            "engine_args.dtype: use the key dtype beside engine_args instead",
        ),
        ("domains", {"qa": {"path": "x"}}, "domains.qa: give messages_column or prompt_column"),
        (
            "domains",
            {"qa": {"path": "x", "prompt_column": "q", "keep_columns": ["text"]}},
            "domains.qa: keep_columns: there would be two columns 'text'",
        ),
    ],
)
def test_wrong_keys(settings: dict[str, Any], tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = tmp_path / "generate.yaml"
    path.write_text(yaml.safe_dump(settings | {key: value}))
    with pytest.raises(ConfigError) as error:
        GenerateConfig.from_yaml(path)
    assert message in str(error.value)


def test_a_damaged_note(settings: dict[str, Any], engine: Echo) -> None:
    note = program.generate(configured(settings)) / "generate.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"version": 2}))
    with pytest.raises(ConfigError, match=r"generate\.json: is not a note of ddk-cache generate: version"):
        program.generate(configured(settings))


def test_an_error_of_the_cluster_names_the_key(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "generate.yaml"
    path.write_text(yaml.safe_dump(settings | {"engine_args": {"tensor_parallel_size": "two"}}))
    for name in ("init", "shutdown", "nodes"):
        monkeypatch.setattr(f"ray.{name}", lambda *_, **__: [])
    with pytest.raises(
        ConfigError, match=r"generate.yaml: engine_args\.tensor_parallel_size: must be .* not 'two'$"
    ):
        cli.generate.main([str(path), "--ray"], standalone_mode=False)
