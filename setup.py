"""Builds the native libraries with CMake and packs them into one py3-none wheel; metadata is in pyproject.toml.

Knobs: MAX_JOBS (parallel compilations), TORCH_CUDA_ARCH_LIST (as for torch extensions), FASTDIFF_CUDA=0|1 (never | required; unset builds
the CUDA library where nvcc is found), FASTDIFF_WERROR=1 (our own warnings are errors). Without torch, compiler or nvcc the install
succeeds; fastdiff/_native/build.json keeps the reason and `python -m fastdiff info` shows it.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cuda_architectures(text):
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX") in CMake's words ("80-real;90a-real;90a-virtual")."""
    out = []
    for item in text.replace(" ", ";").split(";"):
        number = item.removesuffix("+PTX").replace(".", "")
        if number:
            out += [f"{number}-real"] + [f"{number}-virtual"] * item.endswith("+PTX")
    return ";".join(out)


def torch_folder():
    spec = importlib.util.find_spec("torch")
    return Path(spec.submodule_search_locations[0]) if spec else None


def build(library, build_folder, torch, options):
    """Returns the built file, or a string that says why there is none."""
    build_folder.mkdir(parents=True, exist_ok=True)
    log = build_folder / "build.log"
    configure = ["cmake", "-S", str(ROOT), "-B", str(build_folder), "-G", "Ninja", f"-DFASTDIFF_TORCH={torch}", *options]
    jobs = os.environ.get("MAX_JOBS")
    # CMake and ninja of this interpreter's environment before the system's.
    environment = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))}
    compile_ = ["cmake", "--build", str(build_folder), "--target", library] + (["-j", jobs] if jobs else [])
    with log.open("w") as stream:
        for command in (configure, compile_):
            try:
                done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode == 0
            except FileNotFoundError:
                return f"{command[0]} not found"
            if not done:
                sys.stderr.write(log.read_text())
                return f"{' '.join(command[:2])} failed: " + " | ".join(log.read_text().strip().splitlines()[-3:])
    return build_folder / f"lib{library}.so"


class BuildNative(build_ext):
    def run(self):
        if self.inplace or self.editable_mode:
            target = ROOT / "fastdiff" / "_native"
        else:
            target = Path(self.build_lib) / "fastdiff" / "_native"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        facts = {}
        for library, result in self.libraries_built():
            if isinstance(result, Path):
                shutil.copy2(result, target / result.name)
                result = "built"
            facts[library] = result
        (target / "build.json").write_text(json.dumps(facts, indent=1))

    def libraries_built(self):
        torch = torch_folder()
        if torch is None:
            why = "torch was not importable at build time: install torch, then reinstall with pip install --no-build-isolation"
            if os.environ.get("FASTDIFF_CUDA") == "1":
                raise SystemExit(f"FASTDIFF_CUDA=1, but {why}")
            return [("fastdiff_cpu", why), ("fastdiff_cuda", why)]
        strict = os.environ.get("FASTDIFF_WERROR") == "1"
        switches = [f"-DFASTDIFF_WERROR={'ON' if strict else 'OFF'}"]
        base = ROOT / "build" / "native"
        cpu = build("fastdiff_cpu", base / "cpu", torch, switches)
        if strict and not isinstance(cpu, Path):
            raise SystemExit(f"FASTDIFF_WERROR=1, but the CPU library did not build: {cpu}")
        return [("fastdiff_cpu", cpu), ("fastdiff_cuda", self.cuda(base / "cuda", torch, switches))]

    def cuda(self, folder, torch, switches):
        wanted = os.environ.get("FASTDIFF_CUDA")
        if wanted == "0":
            return "switched off by FASTDIFF_CUDA=0"
        nvcc = shutil.which("nvcc") or next((p for p in ("/usr/local/cuda/bin/nvcc",) if os.path.exists(p)), None)
        if nvcc is None:
            result = "nvcc not found: install the CUDA toolkit (12.8 or newer) and put nvcc on PATH"
        else:
            options = [*switches, "-DFASTDIFF_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
            if text := os.environ.get("TORCH_CUDA_ARCH_LIST"):
                options.append(f"-DFASTDIFF_CUDA_ARCHITECTURES={cuda_architectures(text)}")
            result = build("fastdiff_cuda", folder, torch, options)
        if wanted == "1" and not isinstance(result, Path):
            raise SystemExit(f"FASTDIFF_CUDA=1, but the CUDA library did not build: {result}")
        return result

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()] + ["CMakeLists.txt"]


class PlatformWheel(bdist_wheel):
    """The libraries speak LibTorch's stable ABI and no Python C-API, so one wheel serves every Python."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


class NativeDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel}, distclass=NativeDistribution)
