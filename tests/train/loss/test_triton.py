"""The Triton path without a GPU: the loss's own tests under Triton's interpreter, and real compilation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")


def test_the_kernel_passes_the_tests_of_the_loss() -> None:
    """Triton decides when it is imported whether to interpret, hence the process of its own."""
    files = [str(Path(__file__).with_name(name)) for name in ("test_fused.py", "test_objectives.py")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *files],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("gradient", ["*fp32", "*bf16"])
@pytest.mark.parametrize(("soften", "capped", "kind"), [(False, False, 0), (True, True, 1), (True, True, 2)])
@pytest.mark.parametrize("policy", [False, True])
def test_the_kernel_compiles_for_gpus(
    capability: int,
    gradient: str,
    soften: bool,
    capped: bool,
    kind: int,
    policy: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Down to machine code, by the assembler that comes with Triton."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns where it is left open
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ddk_train.loss.triton import BLOCK, WARPS, row_loss

    floats = ["logits", "gradient", "logprobs", "tail_logprob", "cross_entropy_weight", "gamma"]
    floats += ["policy_weight", "teacher_logprob", "writer_logprob"]
    pointers = dict.fromkeys([*floats, "cross_entropy", "kl", "agrees"], "*fp32")
    signature = pointers | {
        "gradient": gradient,
        "ids": "*i64",
        "label_in_tail": "*i1",
        "likeliest": "*i1",
        "vocab_size": "i32",
        "width": "i32",
        "sharpness": "fp32",
        "softcap": "fp32",
        "beta": "fp32",
        "advantage_clip": "fp32",
        "importance_clip": "fp32",
    }
    constants = {"SOFTEN": soften, "CAPPED": capped, "DIVERGENCE": kind, "POLICY": policy}
    constants |= {"GRADIENT": True, "BLOCK": BLOCK, "WIDTH": 128}
    source = ASTSource(row_loss, signature | dict.fromkeys(constants, "constexpr"), constants)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
    assert kernel.asm["cubin"]
