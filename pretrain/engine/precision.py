"""Selects the precision of a model's computation: fp32 weights under torch's autocast."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(device: torch.device, precision: str) -> str:
    """Returns `precision`, or "fp32" for bf16 on a CPU without bf16 instructions.

    On such a CPU PyTorch's bf16 convolutions are plain loops, many times slower than those in fp32.
    """
    is_missing = device.type == "cpu" and precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "fp32" if is_missing else precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the autocast context for a precision of the settings on a device; disabled for fp32."""
    usable = resolve_precision(device, precision)
    return torch.autocast(device.type, dtype=DTYPES[usable], enabled=usable != "fp32")
