"""The built CUDA library's kernels fit the chips: no spills, no more registers or static shared memory than there are."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from fastdiff.core import native

LIBRARY = native.FOLDER / "libfastdiff_cuda.so"


@pytest.fixture
def resources():
    spec = importlib.util.spec_from_file_location("resources", Path(__file__).parents[1] / "benchmarks" / "resources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.cuobjdump() is None:
        pytest.skip("there is no cuobjdump")
    return module


@pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built")
def test_cuda_kernels_fit(resources):
    rows = resources.cuda(LIBRARY)
    assert rows
    wrong = [row for row in rows if row[1] > resources.REGISTERS or row[2] > 48 << 10 or row[3]]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_a_spill_is_seen(resources, tmp_path):
    """A planted one: 128 values held across a barrier by threads that have 64 registers each."""
    (tmp_path / "spill.cu").write_text("""
        __global__ void __launch_bounds__(1024) spill(float* x) {
          float held[128];
          for (int i = 0; i < 128; ++i) held[i] = x[i * 1024 + threadIdx.x];
          __syncthreads();
          for (int i = 0; i < 128; ++i) x[threadIdx.x * 128 + i] = held[i] * held[127 - i];
        }
        __global__ void fits(float* x) { x[threadIdx.x] += 1; }""")
    subprocess.run(["nvcc", "-fatbin", "-gencode=arch=compute_90,code=sm_90", "spill.cu"], cwd=tmp_path, check=True)
    found = {row[4]: row for row in resources.cuda(tmp_path / "spill.fatbin")}
    assert found["spill"][3] > 0 and found["fits"][3] == 0 and found["fits"][0] == "sm_90"
    assert any("SPILLS" in line for line in resources.table(found.values()))
