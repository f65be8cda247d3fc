"""How much memory a stage needed at most."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

MEGABYTE = 1e6
_PROCESS = Path("/proc/self")


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure anew; see `peak_memory_mb`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not Linux, or a sandbox that does not have it: the peak is the process's then
        (_PROCESS / "clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """The most memory in use at a time since `reset_peak_memory`, in megabytes (10^6 bytes).

    On CUDA what torch allocated on `device`; else the resident set of this process, with interpreter,
    libraries and what an earlier stage left behind. Where the system has no Linux `/proc/self/clear_refs` it
    is the peak since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEGABYTE
    try:
        status = (_PROCESS / "status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / MEGABYTE
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024 / MEGABYTE
