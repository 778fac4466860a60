"""Where and in what precision to compute: what `device=auto` and `precision=auto` come to on this machine."""

from __future__ import annotations

import torch


def resolve_device(name: str, key: str = "device") -> torch.device:
    """What `key`=`name` means here; refuses a device that is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{key}={name} is not a device; use auto, cpu, cuda, or cuda:1 for the second GPU.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{key}={name}, but this PyTorch ({torch.__version__}) sees no CUDA device. Use {key}=cpu, "
            "or install a CUDA build of PyTorch and check nvidia-smi."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{key}={name}, but this machine's GPUs are cuda:0 to cuda:{torch.cuda.device_count() - 1}.")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """auto is bfloat16 where the hardware multiplies it natively (CUDA, CPUs with AVX512-BF16 or AMX), else float32."""
    names = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if name in names:
        return names[name]
    if name != "auto":
        raise ValueError(f"precision={name} is not one of auto, {', '.join(names)}.")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(feature, False) for feature in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if fast else torch.float32
