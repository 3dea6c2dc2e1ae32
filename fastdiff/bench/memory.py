"""Extra memory at the peak of a call, whoever allocates it."""

import ctypes
import gc
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(call, device):
    """(bytes above what is held before the call, its results included, or None where that cannot be measured; what the call returns).

    On a GPU: torch's allocator. On a CPU: resident pages by the kernel's high-water mark (Linux), since native kernels take scratch
    outside torch's allocator; pages that glibc keeps after a free are handed back first. Resolution there is about 0.3 MB, and
    scratch that a thread keeps from an earlier call is not seen.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    try:
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")  # sets VmHWM back to VmRSS
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        return None, call()
    result = call()
    return max(0, _resident("VmHWM") - before), result


def _resident(key):
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
