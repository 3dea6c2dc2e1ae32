"""The CUDA kernels, built for the CPU once a session: `emulator`."""

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent.parent / "build" / "emulator"


def _build():
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    tool = lambda name: shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not (tool("cmake") and tool("ninja") and shutil.which("c++")):
        pytest.skip("needs cmake, ninja and a C++ compiler")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folder = BUILD / suffix.strip(".")
    folder.mkdir(parents=True, exist_ok=True)
    includes = f"{sysconfig.get_path('include')};{pybind11.get_include()}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in ([tool("cmake"), "-S", HERE, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
                         f"-DPYTHON_INCLUDES={includes}", f"-DSUFFIX={suffix}"], [tool("cmake"), "--build", folder]):
            run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if run.returncode:
                pytest.fail(f"the kernels do not build for the CPU:\n{run.stdout[-8000:]}{run.stderr[-2000:]}", pytrace=False)
    spec = importlib.util.spec_from_file_location("emulator", folder / f"emulator{suffix}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulator():
    return _build()
