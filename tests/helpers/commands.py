"""Run ddk-cache as a user does: a process of its own, in an environment that nobody prepared."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COMMAND = Path(sys.executable).with_name("ddk-cache")
# What conftest.py and other tests set; a user has none of it.
PREPARED = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """The one line about it at the end of stderr; only our own progress may come before."""
        assert self.out == ""
        assert self.err.count("Error") == 1, self.err
        assert self.err.endswith("\n")
        line = self.err.splitlines()[-1]
        assert line.startswith("Error: "), self.err
        return line.removeprefix("Error: ")


Run = Callable[..., Done]
"""From a command's arguments to how it ended."""


def ddk_cache(*arguments: object, command: Path = COMMAND, **environment: str) -> Done:
    """Run the command to its end, away from any terminal."""
    ordinary = {name: value for name, value in os.environ.items() if name not in PREPARED}
    done = subprocess.run(
        [command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env=ordinary | {"OMP_NUM_THREADS": "1"} | environment,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def control_characters(text: str) -> list[str]:
    """Whatever moves a terminal's cursor or colours its text; line ends do not."""
    return re.findall(r"[\x00-\x09\x0b-\x1f\x7f]", text)
