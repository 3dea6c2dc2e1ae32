"""Loads the compiled libraries; says why one could not be loaded."""

import ctypes
import json
import os
from pathlib import Path

import torch

# FASTDIFF_NATIVE=0 loads no library, FASTDIFF_NATIVE=<folder> takes the libraries of another build (the sanitizers').
SETTING = os.environ.get("FASTDIFF_NATIVE")
FOLDER = Path(SETTING) if SETTING else Path(__file__).resolve().parent.parent / "_native"
LIBRARIES = {"cpu": "fastdiff_cpu", "cuda": "fastdiff_cuda"}


def _load(device):
    """None when loaded, otherwise the reason."""
    name = LIBRARIES[device]
    path = FOLDER / f"lib{name}.so"
    if SETTING == "0":
        return "switched off by FASTDIFF_NATIVE=0"
    if not path.exists():
        try:
            return json.loads((FOLDER / "build.json").read_text())[name]
        except (OSError, KeyError, ValueError):
            return "not built: run `pip install --no-build-isolation -e .` (or `make build`) in the checkout"
    try:
        if device == "cuda":
            if not torch.cuda.is_available():
                return "built, not loaded: torch sees no CUDA device"
            ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"), ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} did not load: {error}"
    return None


WHY_NOT = {device: _load(device) for device in LIBRARIES}


def op(device, name):
    """The native kernel `name`, or None when its library is not loaded; it writes into the tensors it is given."""
    return None if WHY_NOT[device] else getattr(getattr(torch.ops, LIBRARIES[device]), name).default


# From the size of a huge page on (csrc/common/tensor.h).
LARGE = 2 << 20
_prepare = op("cpu", "prepare")


def prepare(x):
    """Asks for huge pages under a large result on the CPU that is about to be written."""
    if _prepare is not None and x.device.type == "cpu":
        _prepare(x)
