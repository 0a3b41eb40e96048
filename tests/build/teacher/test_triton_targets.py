"""The targets of a GPU without one: the tests of targets under Triton's interpreter, and real compilation."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddk_build.teacher import targets
from ddk_cache.format.layout import Target

pytest.importorskip("triton", reason="Triton is made for Linux only")

TARGETS = [
    Target(top_k=64),
    Target(top_k=1),
    Target(top_k=200),
    Target(top_k=32, top_p=0.7),
    Target(top_k=16, temperature=2.0),
    Target(kind="sampled"),
    Target(kind="sampled", samples=50, temperature=0.7),
    None,
]


def test_the_kernel_passes_the_tests_of_the_targets() -> None:
    """Triton decides when it is imported whether to interpret, hence the process of its own."""
    files = [str(Path(__file__).with_name("test_targets.py")), __file__]
    # The statistics of thousands of rows take minutes, and the draws are the same code.
    left_out = "not kernel and not mean and not large and not floor_or_ceil"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", left_out],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the test above")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [50, 1000, 5003])
def test_both_paths_make_the_same_targets(vocab: int, dtype: torch.dtype) -> None:
    """Ids and order exactly; in bfloat16 many logits are equal, and rows have equal, missing, tall ones."""
    from ddk_build.teacher import triton_targets

    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(24, vocab + 6, generator=generator) * 3).to(dtype)[:, :vocab]  # a longer stride
    logits[0, 5:9], logits[1], logits[2], logits[2, 3] = -math.inf, 0.0, -40, 0
    logits[3, 7], logits[3, 8] = -0.0, 0.0
    labels = torch.randint(0, vocab, (24,), generator=generator)
    labels[0] = 4
    offsets = torch.rand(24, dtype=torch.float64, generator=generator)
    for target in TARGETS:
        expected = targets.sparse_target(logits, labels, target, offsets)
        result = triton_targets.sparse_target(logits, labels, target, offsets)
        assert torch.equal(result.ids, expected.ids)
        torch.testing.assert_close(result, expected, atol=4e-6, rtol=0)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("logits", ["*bf16", "*fp16", "*fp32"])
def test_the_kernel_compiles_for_gpus(
    capability: int, logits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, by the assembler that comes with Triton."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns where it is left open
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ddk_build.teacher.triton_targets import write_statistics

    signature = {
        "logits": logits,
        "stride": "i32",
        "statistics": "*fp32",
        "vocab": "i32",
        "temperature": "fp32",
    }
    source = ASTSource(write_statistics, signature, {})
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert kernel.asm["cubin"]
