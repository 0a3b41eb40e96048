"""A study's file of results: a JSON line for each run, which is not trained again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Results:
    """The finished runs, by all that decides them: a line's ``what``."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = self._path.read_text("utf-8") if self._path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a kill cut the last line: its run is done again
            self._path.write_text(whole, "utf-8")
        lines = map(json.loads, whole.splitlines())
        self._finished = {json.dumps(line["what"], sort_keys=True): line for line in lines}

    def get(self, what: Line, train: Callable[[], Line]) -> Line:
        """Return the line of a run; without one ``train`` and append what it returns."""
        key = json.dumps(what, sort_keys=True)
        if key not in self._finished:
            text = json.dumps(train() | {"what": what})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
            self._finished[key] = json.loads(text)
        return self._finished[key]
