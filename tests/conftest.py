"""Fixtures every test shares: no model hub, and tiny models and tokenizers made on the spot."""

import os
from collections import Counter
from pathlib import Path

import pytest
from helpers.models import make_model

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM compiles a function for its public logprobs: seconds a start

# Files of few tests that take minutes: as the last ones they would keep one process busy and no other.
LONG = (
    "end_to_end/test_scale_out.py",
    "loss/test_triton.py",
    "teacher/test_engines.py",
    "generate/test_generate.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    items.sort(key=lambda item: not any(item.path.match(name) for name in LONG))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests of each folder passed: one that never ran would not be missed otherwise."""
    passed = Counter(
        report.nodeid.partition("::")[0].rpartition("/")[0]
        for report in terminalreporter.stats.get("passed", [])
    )
    for folder, count in sorted(passed.items()):
        terminalreporter.write_line(f"{folder}: {count} tests passed")


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny random teacher: 1 layer, 64 wide, 400 tokens."""
    return make_model(tmp_path_factory.mktemp("teacher"), seed=1, layers=1)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a smaller random student with the teacher's tokenizer."""
    return make_model(tmp_path_factory.mktemp("student"), seed=2, layers=1, hidden=32)
