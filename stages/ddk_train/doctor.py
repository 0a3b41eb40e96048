"""What the training stage adds to ``ddk-cache doctor``: torch, its devices, and what is optional."""

from ddk_cache.doctor import Fact, package_version

PACKAGES = ("transformers", "safetensors", "peft", "bitsandbytes", "flash-attn", "triton", "accelerate")


def facts() -> list[Fact]:
    """Versions and GPUs."""
    import torch

    found = [("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")]
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        place = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        found.append((f"gpu {number}", place))
    if not torch.cuda.is_available():
        found.append(("gpu", "none that torch can use"))
    return found + [(name, package_version(name)) for name in PACKAGES]
