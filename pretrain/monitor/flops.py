"""Counts the FLOPs of training and computes model FLOPs utilization (MFU, arXiv 2204.02311, appendix B).

flops = training_flops(model, config.data.image_size)
peak = peak_flops(device, config.engine.precision)
share = mfu(images_per_s / ranks, flops, peak) if peak is not None else None
"""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Dense FLOP/s of the tensor cores, (16-bit, TF32), by CUDA's name of the GPU, from NVIDIA's data sheets; these print twice as much "with
# sparsity". MIG instances and GPUs without published figures are not in the table.
_PEAKS = {
    r"NVIDIA A10": (125e12, 62.5e12),
    r"NVIDIA A30": (165e12, 82e12),
    r"NVIDIA A40": (149.7e12, 74.8e12),
    r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe": (312e12, 156e12),
    r"NVIDIA L4": (121e12, 60e12),
    r"NVIDIA L40S": (362e12, 183e12),
    r"NVIDIA H100 80GB HBM3": (989e12, 494.5e12),
    r"NVIDIA H100 PCIe": (756e12, 378e12),
    r"NVIDIA (H100|H200) NVL": (835.5e12, 417.5e12),
    r"NVIDIA H200": (989e12, 494.5e12),
    r"NVIDIA GH200 .*": (989e12, 494.5e12),
    r"NVIDIA B200": (2250e12, 1100e12),
    r"NVIDIA GB200": (2500e12, 1250e12),
}


def training_flops(model: nn.Module, image_size: int) -> float | None:
    """Returns the FLOPs of one image in training, forward and backward; a multiply-add counts as two.

    Counts convolutions and matrix products; the backward pass counts as twice the forward pass, recomputation is not counted. Works on
    shapes alone, but needs all of the weights and PyTorch's own operators: call this before layers are replaced and the engine is built.
    Returns None for a model whose forward pass does not run on the meta device.

    Raises:
        ValueError: the model can't compute images of `image_size` pixels, or does not return logits.
    """
    # A copy that shares nothing with the model and takes no memory. (functional_call breaks modules that a model uses twice.)
    tensors: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    tensors |= {id(parameter): nn.Parameter(parameter.detach().to("meta")) for parameter in model.parameters()}
    on_meta = copy.deepcopy(model, tensors)
    images, name = torch.empty(2, 3, image_size, image_size, device="meta"), type(model).__name__  # BatchNorm needs two
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            output, flops = on_meta(images), 3.0 * counter.get_total_flops() / 2
    except Exception:  # of any kind, raised by the model's own code
        output, flops = _compute(model, torch.zeros_like(images, device="cpu")), None
    if not isinstance(output, Tensor) or output.shape != (2, model.num_classes):
        actual = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"model.name: {name} returns {actual} for 2 images in training, instead of logits of 2 x {model.num_classes}")
    return flops


def _compute(model: nn.Module, images: Tensor) -> Any:
    """Returns the model's output for images; raises ValueError if the model fails."""
    training = model.training
    try:
        with torch.no_grad():
            return model.eval()(images)
    except Exception as error:
        size, reason = images.shape[-1], f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"model.name: {type(model).__name__} can't compute images of {size} x {size} ({reason}); choose another data.image_size, or "
            "set what the model needs for it in model.kwargs"
        ) from error
    finally:
        model.train(training)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Returns a GPU's peak FLOP/s by its data sheet; None for a CPU or an unlisted GPU."""
    return peak_by_name(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_by_name(name: str, precision: str) -> float | None:
    """Returns the peak FLOP/s of a GPU by its name, as `peak_flops` does.

    fp32 counts as TF32, in which cuDNN runs convolutions unless torch.backends.cudnn.allow_tf32 is off.
    """
    peaks = next((peaks for pattern, peaks in _PEAKS.items() if re.fullmatch(pattern, name)), None)
    return peaks and peaks[precision == "fp32"]


def mfu(images_per_s_per_gpu: float, training_flops: float, peak_flops: float) -> float:
    """Returns the MFU, 0 to 1, from the speed, the FLOPs of one image and a GPU's peak FLOP/s."""
    return images_per_s_per_gpu * training_flops / peak_flops
