"""Selects the arithmetic of a model: fp32 weights under torch's autocast, in the precision that the settings ask for."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(device: torch.device, precision: str) -> str:
    """Returns `precision`, or "fp32" for bf16 on a CPU without bf16 instructions.

    There PyTorch's convolutions in bf16 are plain loops, many times as slow as those in fp32.
    """
    is_missing = device.type == "cpu" and precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "fp32" if is_missing else precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the autocast context for a precision of the settings on a device; disabled for fp32."""
    usable = resolve_precision(device, precision)
    return torch.autocast(device.type, dtype=DTYPES[usable], enabled=usable != "fp32")
