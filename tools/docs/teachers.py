"""Which architectures answer correctly as teachers: the second list in docs/models.md, made by trying each.

    python -m tools.docs.teachers docs/models.md

A small random model of each architecture, saved as a folder, is checked and loaded by both engines as
``ddk-cache build`` does, in float32, and answers a few documents of random tokens. Their labels'
log-probabilities are compared with those of transformers' eager attention. Each runs in a new process.
"""

import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers

from ddk_build.config import TeacherConfig
from ddk_build.teacher.engines import check_teacher, load_teacher
from ddk_cache.errors import ConfigError, brief
from ddk_cache.format.layout import Target
from tools.docs.students import ARCHITECTURES, SEQ_LENGTH, VOCABULARY, make_model, quoted, replace_list

ENGINES = ("transformers", "vllm")
ROUNDING = 1e-5  # nats


def documents() -> list[np.ndarray]:
    """Return documents of random tokens, the longest as long as a row."""
    random = np.random.default_rng(0)
    return [random.integers(3, VOCABULARY, length, np.int32) for length in (2, 9, 17, SEQ_LENGTH)]


def save(name: str, folder: str) -> np.ndarray:
    """Write an architecture's model to ``folder``; return the labels' log-probabilities by transformers."""
    model = make_model(*ARCHITECTURES[name])
    model.save_pretrained(folder)
    model.set_attn_implementation("eager")
    parts = []
    with torch.inference_mode():
        for document in documents():
            tokens = torch.from_numpy(document).long()
            logprobs = model(tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            parts.append(logprobs.gather(1, tokens[1:, None])[:, 0])
    return torch.cat(parts).numpy()


def answer(folder: str, engine: str) -> np.ndarray | str:
    """Return the same from an engine, or its error message."""
    arguments = {"skip_tokenizer_init": True, "enforce_eager": True} if engine == "vllm" else {}
    config = TeacherConfig(model=folder, engine=engine, dtype="float32", engine_args=arguments)
    try:
        check_teacher(config, SEQ_LENGTH)
        teacher = load_teacher(config, Target(), SEQ_LENGTH)
        return teacher.score(documents(), labels_only=True).label_logprob
    except ConfigError as error:
        return str(error).replace(folder, "MODEL")


def isolated(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return a function's result from a forked process, which has all imports already; its error as text."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        try:
            sender.send(work(*arguments))
        except Exception as error:
            sender.send(f"{type(error).__name__}: {brief(error)}")
        sys.stderr.flush()
        os._exit(0)  # without the messages of an engine that shuts down

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return "the process died"
    finally:
        process.join()


def listing(names: list[str]) -> str:
    """Return Markdown: the architectures by what vLLM makes of them, and transformers' largest difference."""
    differences: dict[str, dict[str, float | None]] = {engine: {} for engine in ENGINES}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            expected = isolated(save, name, folder)
            assert not isinstance(expected, str), expected
            for engine in ENGINES:
                logprobs = isolated(answer, folder, engine)
                refused = isinstance(logprobs, str)
                differences[engine][name] = None if refused else float(np.abs(logprobs - expected).mean())
                print(f"{name}, {engine}: {logprobs if refused else differences[engine][name]}", flush=True)
    return as_markdown(differences)


def as_markdown(differences: dict[str, dict[str, float | None]]) -> str:
    """Return the lists, from the difference to transformers by engine and architecture; None: refused."""
    by_vllm = differences["vllm"]
    answered = {name: difference for name, difference in by_vllm.items() if difference is not None}
    other = [f"`{name}` {difference:.0e}" for name, difference in answered.items() if difference > ROUNDING]
    refused = [name for name in by_vllm if name not in answered]
    equal = len(answered) - len(other)
    largest = max(difference or 0 for difference in differences["transformers"].values())
    return f"""- **vLLM answers as transformers**: the other {equal} of the students' list
- **vLLM answers otherwise**, by so many nats ({len(other)}): {", ".join(other)}
- **vLLM refuses** ({len(refused)}): {quoted(refused)}

`engine: transformers` answers all of them, with a difference of {largest:.0e} at most.
"""


@click.command(help=__doc__)
@click.argument("page", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("names", nargs=-1, type=click.Choice(sorted(ARCHITECTURES)), metavar="[ARCHITECTURE]...")
def main(page: Path, names: tuple[str, ...]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from ddk_build.teacher.vllm_arguments import prepare_environment

    prepare_environment()
    # Imported before forking; to inspect an architecture, vLLM would start another process.
    import vllm.entrypoints.llm
    import vllm.v1.engine.core_client
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()
    replace_list(page, "teachers", listing(list(names) or sorted(ARCHITECTURES)))


if __name__ == "__main__":
    main()
