"""Whole runs on the CPU: what they leave, what they draw, and that they go on exactly where they were."""

import json
from pathlib import Path
from typing import Any

from ddk_train.train import train


def read_lines(run: str | Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / f"{name}.jsonl").read_text().splitlines()]
