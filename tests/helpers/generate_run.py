"""Run ``ddk-cache generate`` with the real vLLM; test_generate.py starts it and reads what it leaves.

A process of its own, because vLLM binds threads, seeds generators and warns as it likes.
"""

import os
import sys
from pathlib import Path

import vllm  # before the fork, so that it is imported once

from ddk_build.generate.config import GenerateConfig
from ddk_build.generate.program import generate
from helpers.dying import die_at_call

assert vllm.__version__


def main(path: Path) -> None:
    """Kill a run within its third file, resume it; write the same elsewhere, and with a stop text."""
    killed = GenerateConfig.from_yaml(path / "generate.yaml", [f"output={path / 'killed'}"])
    child = os.fork()
    if not child:
        Path.replace = die_at_call(5, Path.replace)  # type: ignore[method-assign]
        generate(killed)
        os._exit(0)
    (path / "signal").write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    (path / "after").write_text(
        "\n".join(sorted(file.name for file in (path / "killed").glob("*/*.parquet")))
    )
    generate(killed)
    generate(GenerateConfig.from_yaml(path / "generate.yaml", [f"output={path / 'whole'}"]))
    stopped = ["sampling.stop=['<|im_end|>']", "sampling.temperature=2", "sampling.max_tokens=64"]
    generate(GenerateConfig.from_yaml(path / "generate.yaml", [f"output={path / 'stopped'}", *stopped]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
