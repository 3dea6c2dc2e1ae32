"""What the machine is: ISA of the processor, architecture and SM count of a GPU."""

from functools import lru_cache

import torch

from . import native


@lru_cache(None)
def isa():
    """ISA level that the CPU kernels run, baseline to avx512bf16 (FASTDIFF_ISA forces a lower one); None without the library."""
    which = native.op("cpu", "isa")
    return ("baseline", "avx2", "avx512", "avx512bf16")[which()] if which else None


@lru_cache(None)
def gpu(index):
    """(architecture, multiprocessors) of CUDA device `index`: (90, 132) on an H100."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def architecture(device):
    """Key into launch tables: 80, 90, 100 ... on a GPU; 0 on a CPU, where Triton kernels run in the interpreter."""
    return gpu(device.index if device.index is not None else torch.cuda.current_device())[0] if device.type == "cuda" else 0
