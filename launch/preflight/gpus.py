"""Reads the state of a node's GPUs from NVIDIA's management library (NVML) and lists their faults.

docs.nvidia.com/deploy/nvml-api describes the values. NVML neither initializes a GPU nor allocates memory on it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pynvml

T = TypeVar("T")

USED_SHARE = 0.05  # of a GPU's memory that may be in use before a job: the driver uses less, a leftover process more
# Hardware reasons for reduced clocks. An idle GPU, as all are before a job, has none of them.
HARDWARE_SLOWDOWNS = {
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hardware thermal slowdown",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
}


@dataclass(frozen=True)
class Gpu:
    number: int
    name: str
    memory: int  # bytes
    used: int  # bytes
    uncorrected: int | None = None  # ECC errors since the driver was loaded; None if the GPU does not count them
    repair_pending: bool = False  # rows to be remapped, or pages to be retired, at the next reset
    repair_failed: bool = False  # no spare row was left
    clocks: int = 0  # NVML's bit mask of reasons for reduced clocks


def read_gpus() -> tuple[str, list[Gpu]]:
    """Returns the driver's version, and the GPUs in the order of CUDA_VISIBLE_DEVICES; ValueError if NVML is missing or fails."""
    try:
        pynvml.nvmlInit()
        try:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible is not None else [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
            gpus = [_read_gpu(number, name.strip()) for number, name in enumerate(names) if name.strip()]
            return str(pynvml.nvmlSystemGetDriverVersion()), gpus
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise ValueError(f"NVML: {error}") from error


def _read_gpu(number: int, name: str) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(name)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    rows = _if_supported(lambda: pynvml.nvmlDeviceGetRemappedRows(handle))  # since Ampere; earlier cards retire pages
    pages = _if_supported(lambda: pynvml.nvmlDeviceGetRetiredPagesPendingStatus(handle))
    errors = _if_supported(
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
        clocks=_if_supported(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)) or 0,
    )


def _if_supported(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except pynvml.NVMLError_NotSupported:
        return None


def list_faults(gpu: Gpu) -> list[str]:
    """Returns the faults that make a GPU unfit for a job."""
    faults = []
    if gpu.uncorrected:
        faults.append(f"{gpu.uncorrected} uncorrected ECC errors since the driver was loaded")
    if gpu.repair_pending:
        faults.append("memory repair is pending; reset the GPU")
    if gpu.repair_failed:
        faults.append("a memory row could not be remapped; replace the GPU")
    if slowdowns := [name for bit, name in HARDWARE_SLOWDOWNS.items() if gpu.clocks & bit]:
        faults.append(f"clocks are held down by {', '.join(slowdowns)}")
    if gpu.used > USED_SHARE * gpu.memory:
        faults.append(f"{gpu.used / 1e9:.1f} of {gpu.memory / 1e9:.1f} GB are in use by other processes")
    return [f"GPU {gpu.number}: {fault}" for fault in faults]
