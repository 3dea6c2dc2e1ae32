"""Registers, shared memory and spills of every GPU kernel, without a GPU: python benchmarks/resources.py writes results/resources.txt.

Triton's kernels at every launch row, as tests/test_triton.py compiles them; CUDA C++ kernels as they are in the built library.
"""

import argparse
import concurrent.futures
import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from fastdiff.core import native
from fastdiff.core.backend import FLOATS

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "results" / "resources.txt"
REGISTERS = 255  # of a thread, on every chip


def cuobjdump():
    """The tool of the CUDA toolkit, or the one that comes with Triton; None if there is neither."""
    found = shutil.which("cuobjdump")
    if found is None and importlib.util.find_spec("triton"):
        bundled = Path(importlib.import_module("triton").__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def _plain(symbol):
    """`patchify::move<unsigned short, true>` of a mangled name."""
    if shutil.which("c++filt"):
        symbol = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\(fastdiff.*|\(.*\)$", "", symbol.removeprefix("void ").removeprefix("fastdiff::"))


def cuda(library):
    """(architecture, registers, static shared memory, bytes of stack and local memory, kernel) of each kernel in a library."""
    text = subprocess.run([cuobjdump(), "--dump-resource-usage", str(library)], capture_output=True, text=True, check=True).stdout
    rows, architecture, symbol = [], None, None
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\S+):", line):
            symbol = match[1]
        elif symbol and "REG:" in line:
            used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
            rows.append((architecture, used["REG"], used["SHARED"], used["STACK"] + used["LOCAL"], _plain(symbol)))
            symbol = None
    return rows


def triton(architecture, pool):
    """(architecture, registers, shared memory, bytes of stack and local memory, kernel and launch row) of each launch."""
    import pytest
    import test_triton as compiled  # it has the calls that take every launch row

    dtypes = FLOATS if architecture == 90 else FLOATS[:2]
    with pytest.MonkeyPatch.context() as patch:
        jobs = [job for dtype in dtypes for job in compiled._launched(patch, architecture, compiled._calls(dtype))]
    made = pool.map(compiled._compile, jobs, [architecture] * len(jobs))
    return [(f"sm_{architecture}", registers, shared, stack, compiled._text(job))
            for job, (shared, registers, stack) in zip(jobs, made, strict=True)]


def table(rows):
    """Lines: a kernel's registers / shared memory on each chip; the most of launches that look the same."""
    chips = sorted({row[0] for row in rows}, key=lambda chip: (len(chip.rstrip("a")), chip))
    cells = {}
    for chip, registers, shared, stack, name in rows:
        before = cells.setdefault(name, {}).get(chip, (0, 0, 0))
        cells[name][chip] = tuple(map(max, before, (registers, shared, stack)))
    text = lambda used: "-" if used is None else f"{used[0]} / {used[1]}" + (f" SPILLS {used[2]}" if used[2] else "")
    form = "".join("{:>14}" for _ in chips) + "  {}"
    yield form.format(*chips, "kernel")
    for name in sorted(cells):
        yield form.format(*(text(cells[name].get(chip)) for chip in chips), name)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TABLE, metavar="FILE")
    parser.add_argument("--architectures", default="80,90,100", metavar="N[,N]")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    if cuobjdump() is None:
        parser.error("needs cuobjdump, of the CUDA toolkit or of Triton")
    library = native.FOLDER / "libfastdiff_cuda.so"
    with concurrent.futures.ProcessPoolExecutor(min(8, os.cpu_count()), multiprocessing.get_context("spawn")) as pool:
        rows = [row for n in options.architectures.split(",") for row in triton(int(n), pool)]
    versions = f"torch {torch.__version__}, Triton {importlib.import_module('triton').__version__}"
    lines = ["Registers of a thread / bytes of shared memory of a block; a kernel that spills says so.",
             f"Written by python benchmarks/resources.py; {versions}", "",
             "CUDA C++ (shared memory beside what the launch asks for)", *(table(cuda(library)) if library.exists() else ["not built"]), "",
             "Triton, every launch row", *table(rows)]
    options.out.write_text("\n".join(lines) + "\n")
    print(f"{len(rows)} launches of Triton kernels; wrote {options.out}")


if __name__ == "__main__":
    main()
