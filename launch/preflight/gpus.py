"""A node's GPUs as NVIDIA's management library (NVML) sees them, and which of what it says makes one unfit.

    gpus = read_gpus()              # raises ValueError where there is no NVML, in words
    problems = broken(gpus[0])      # pure

NVML's own names and meanings: docs.nvidia.com/deploy/nvml-api. No GPU is initialised and no memory of one is taken.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pynvml

T = TypeVar("T")

USED_SHARE = 0.05  # of a GPU's memory that may be taken before the job starts: the driver's own is less, what a job left behind is more
# Clocks that the hardware itself holds down. A GPU that idles, as all do before a job, has no reason for any of them.
_HELD = {
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hardware thermal slowdown",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
}


@dataclass(frozen=True)
class Gpu:
    """`memory` and `used` in bytes; the rest is None or 0 where the card does not count such things. `clocks` is NVML's bit mask of
    reasons why clocks are held down."""

    number: int
    name: str
    memory: int
    used: int
    uncorrected: int | None = None  # ECC errors since the driver was loaded
    repair_pending: bool = False  # rows to be remapped, or pages to be retired, at the next reset
    repair_failed: bool = False  # no spare row was left
    clocks: int = 0


def read_gpus() -> tuple[str, list[Gpu]]:
    """The driver's version and the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order.

    Raises ValueError where NVML is missing or fails.
    """
    try:
        pynvml.nvmlInit()
        try:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible is not None else [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
            gpus = [_read(number, name.strip()) for number, name in enumerate(names) if name.strip()]
            return str(pynvml.nvmlSystemGetDriverVersion()), gpus
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise ValueError(f"NVML: {error}") from error


def _read(number: int, name: str) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(name)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    rows = _where_supported(lambda: pynvml.nvmlDeviceGetRemappedRows(handle))  # since Ampere; before it pages were retired
    pages = _where_supported(lambda: pynvml.nvmlDeviceGetRetiredPagesPendingStatus(handle))
    errors = _where_supported(
        lambda: pynvml.nvmlDeviceGetTotalEccErrors(handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
    )
    return Gpu(
        number=number,
        name=str(pynvml.nvmlDeviceGetName(handle)),
        memory=memory.total,
        used=memory.used,
        uncorrected=errors,
        repair_pending=bool((rows and rows[2]) or pages),
        repair_failed=bool(rows and rows[3]),
        clocks=_where_supported(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)) or 0,
    )


def _where_supported(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except pynvml.NVMLError_NotSupported:
        return None


def broken(gpu: Gpu) -> list[str]:
    """What makes this GPU unfit, in words."""
    faults = []
    if gpu.uncorrected:
        faults.append(f"{gpu.uncorrected} uncorrected ECC errors since the driver was loaded")
    if gpu.repair_pending:
        faults.append("memory rows or pages wait for a reset to be replaced")
    if gpu.repair_failed:
        faults.append("a memory row could not be remapped")
    if held := [name for bit, name in _HELD.items() if gpu.clocks & bit]:
        faults.append(f"clocks held down by {', '.join(held)}")
    if gpu.used > USED_SHARE * gpu.memory:
        faults.append(f"{gpu.used / 1e9:.1f} of {gpu.memory / 1e9:.1f} GB are in use by others")
    return [f"GPU {gpu.number}: {fault}" for fault in faults]


def hot(gpu: Gpu) -> bool:
    """Whether the driver holds clocks down for the temperature: slow, not broken."""
    return bool(gpu.clocks & pynvml.nvmlClocksEventReasonSwThermalSlowdown)
