"""Versions, processor, GPU and native libraries of this process: behind `python -m fastdiff info`."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from .core import device, native
from .version import __version__


def versions():
    """name -> version of what results depend on; None for what is not installed."""
    return {"fastdiff": __version__, "python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton"),
            "numpy": _version("numpy"), "cuda": torch.version.cuda}


def _version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine():
    """What the numbers of this process belong to."""
    facts = {"system": f"{platform.system()} {platform.machine()}", "processor": _processor(), "cores": os.cpu_count(), "isa": device.isa(),
             "cpu_capability": torch.backends.cpu.get_cpu_capability(), "memory_bytes": _memory(), "gpu": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {"name": properties.name, "architecture": device.gpu(0)[0], "multiprocessors": properties.multi_processor_count,
                        "memory_bytes": properties.total_memory}
    return facts


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory():
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not a POSIX system
        return None


def advice(library, why):
    """What to do about a native library that is not loaded for the reason `why`; None where the reason says it."""
    rebuild = "`pip install --no-build-isolation .` in a checkout"
    if "FASTDIFF_NATIVE=0" in why:
        return "unset FASTDIFF_NATIVE"
    if library == "cuda" and not torch.cuda.is_available():
        return "nothing to do on a machine without a GPU; with one, nvidia-smi must list it and torch must be a CUDA build"
    if "FASTDIFF_CUDA=0" in why:
        return f"unset FASTDIFF_CUDA and rebuild: {rebuild}"
    if "did not load" in why:
        return f"rebuild against this torch ({torch.__version__}): {rebuild}"
    if "install" in why:
        return None
    return f"until it is built ops run on the other backends: install g++ (C++17), cmake and ninja, then {rebuild}"


def main(argv):
    argparse.ArgumentParser("python -m fastdiff info", description=__doc__).parse_args(argv)
    facts = machine()
    rows = [(name, version or "not installed") for name, version in versions().items() if name != "cuda"]
    rows += [("cuda of torch", torch.version.cuda or "none: a CPU build of torch"), ("system", facts["system"]),
             ("processor", f"{facts['processor']}, {facts['cores']} cores, {torch.get_num_threads()} threads in torch"),
             ("ISA of the kernels", f"{facts['isa'] or 'none: the native library is not loaded'} (torch: {facts['cpu_capability']})")]
    gpu = facts["gpu"]
    rows.append(("GPU", f"{gpu['name']}, architecture {gpu['architecture']}, {gpu['multiprocessors']} multiprocessors" if gpu else "none"))
    for library, why in native.WHY_NOT.items():
        rows.append((f"native {library}", why or "loaded"))
        if why and (what := advice(library, why)):
            rows.append(("", f"-> {what}"))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:{width}}  {text}")
    return 0
