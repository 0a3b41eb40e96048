"""The training stage's part of ``ddk-cache doctor``: torch, its devices, and optional packages."""

from importlib.util import find_spec

from ddk_cache.util.packages import package_version

PACKAGES = ("transformers", "safetensors", "peft", "bitsandbytes", "flash-attn", "triton", "accelerate")


def facts() -> list[tuple[str, str]]:
    """Return versions and GPUs."""
    packages = [(name, package_version(name)) for name in PACKAGES]
    if find_spec("torch") is None:
        return [("torch", "not installed"), *packages]
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
        *(
            (
                f"gpu {index}",
                f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}",
            )
            for index, gpu in enumerate(gpus)
        ),
        *([] if torch.cuda.is_available() else [("gpu", "none that torch can use")]),
        *packages,
    ]
