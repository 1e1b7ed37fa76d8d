"""Which devices there are, how much they hold and how fast they compute."""

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch


# Share of its peak that training reaches on a device: an assumption.
UTILISATION = 0.4

# Peak in half precision without sparsity (TFLOPS) and memory bandwidth (GB/s), from the makers' data sheets.
_GPUS = {
    "B200": (2250, 8000), "H200": (989, 4800), "H100": (989, 3350), "A100": (312, 1555), "L40S": (362, 864),
    "A6000": (155, 768), "A10": (125, 600), "V100": (112, 900), "RTX 5090": (210, 1792), "RTX 4090": (165, 1008),
    "RTX 3090": (71, 936), "L4": (121, 300), "T4": (65, 300),
}  # fmt: skip
# Float32 outside the tensor cores, roughly, on all of them.
_FLOAT32_SHARE = 1 / 16
# GB/s of a desktop's main memory, roughly.
_CPU_BANDWIDTH = 20
_CGROUP = Path("/sys/fs/cgroup/memory.max")
_MEASURED_S = 0.3


@dataclass(frozen=True)
class Device:
    """
    One of the devices that would train.

    Parameters:
        name (`str`):
            What it is.
        memory (`int` or `None`):
            Bytes; a CPU's are shared by all processes of a machine. `None` if it does not say.
        flops (`float` or `None`):
            Operations per second at its peak; `None` if it is not known.
        bandwidth (`float`):
            Bytes per second from its memory.
        cpu (`bool`):
            Whether it is the CPU.
    """

    name: str
    memory: int | None
    flops: float | None
    bandwidth: float
    cpu: bool


def find_device(cpu: bool, dtype: torch.dtype) -> Device:
    """
    Look at the smallest device, or measure the CPU for a moment.

    Args:
        cpu (`bool`):
            Whether the CPU trains.
        dtype (`torch.dtype`):
            Type that matrices are multiplied in.

    Returns:
        [`Device`]: what it is.
    """
    if cpu:
        return Device("CPU", main_memory(), _measured_flops(dtype), 1e9 * _CPU_BANDWIDTH, True)
    if not torch.cuda.is_available():
        return Device(torch.accelerator.current_accelerator().type, None, None, 1e9 * _CPU_BANDWIDTH, False)
    all_of_them = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    smallest = min(all_of_them, key=lambda found: found.total_memory)
    flops, bandwidth = gpu_peak(smallest.name, dtype)
    return Device(smallest.name, smallest.total_memory, flops, bandwidth, False)


def gpu_peak(name: str, dtype: torch.dtype) -> tuple[float | None, float]:
    """
    Look a GPU up by its name.

    Args:
        name (`str`):
            Name that the driver gives it, such as `"NVIDIA H100 80GB HBM3"`.
        dtype (`torch.dtype`):
            Type that matrices are multiplied in.

    Returns:
        `tuple[float | None, float]`: operations per second, `None` if the name is not known, and bytes per second.
    """
    words = f" {name.replace('-', ' ').replace('NVIDIA', ' ')} "
    for known, (tflops, bandwidth) in _GPUS.items():
        if f" {known} " in words:
            return 1e12 * tflops * (_FLOAT32_SHARE if dtype.itemsize > 2 else 1), 1e9 * bandwidth
    return None, 1e9 * min(bandwidth for _, bandwidth in _GPUS.values())


def main_memory() -> int | None:
    """
    Say how much main memory this process may have.

    Returns:
        `int` or `None`: bytes, a container's limit among what bounds them; `None` where the system does not say.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        limit = _CGROUP.read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdecimal() else memory


@functools.lru_cache
def _measured_flops(dtype: torch.dtype) -> float:
    size = 1024
    matrix = torch.ones(size, size, dtype=dtype)
    torch.mm(matrix, matrix)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < _MEASURED_S:
        torch.mm(matrix, matrix)
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)
