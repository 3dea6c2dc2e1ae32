"""The rules of the house as assertions on the source tree."""

import ast
import re
from pathlib import Path

import pytest

from fastdiff.core.contract import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastdiff"
OPS = sorted(p for p in (PACKAGE / "ops").iterdir() if (p / "__init__.py").exists())
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "_native" not in p.parts)
# part of the package -> parts it may import; the package itself (fastdiff/__init__.py, __main__.py) imports all of them.
MAY_IMPORT = {
    "core": {"core"}, "ops": {"core", "ops"}, "nn": {"core", "ops", "nn"}, "models": {"core", "ops", "nn", "models"},
    "diffusion": {"core", "ops", "diffusion"}, "accelerate": {"core", "ops", "nn", "accelerate"},
    "distributed": {"core", "ops", "nn", "distributed"}, "testing": {"core", "ops", "testing"},
    "bench": {"core", "ops", "testing", "bench"}}
ROLES = {"__init__.py", "reference.py", "triton.py", "cases.py", "NOTES.md"}
# A kernel file that would pass 600 lines is split by pass.
SPLIT_ROLES = ROLES | {"triton_forward.py", "triton_backward.py"}
NATIVE_ROLES = re.compile(r"(op\.(h|cpp)|\w+\.h|((cpu|forward|backward)\.simd\.cpp)|cuda\.cu|(kernel|forward|backward)\.cuh)$")
OPTIONAL = {"denoising_diffusion_pytorch", "einops", "scipy", "torch_dct", "dctorch", "diffusers", "timm", "rin_pytorch",
            "perceiver_pytorch", "transformers", "flash_attn", "liger_kernel", "xformers"}
# The demo shows public models (and mends torchvision's import for one of them): the libraries they come from are its subject.
DEMO = PACKAGE / "demo.py"
# The presets of `train` are made of models and ops, as a user's program is.
PRESETS = PACKAGE / "presets.py"


def imports(path):
    """(absolute module, line) of every import in a file, with relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])]) if node.level else node.module
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def sources(*parts):
    return [p for p in SOURCES if p.relative_to(PACKAGE).parts[0] in parts]


def names(path):
    return str(path.relative_to(ROOT))


def test_layers():
    wrong = []
    for path in SOURCES:
        part = path.relative_to(PACKAGE).parts[0]
        for module, line in imports(path):
            target = module.split(".")
            if part in MAY_IMPORT and target[0] == "fastdiff" and len(target) > 1 and target[1] not in MAY_IMPORT[part]:
                if (PACKAGE / target[1]).is_dir():
                    wrong.append(f"{names(path)}:{line} imports {module}")
    assert not wrong


def test_every_part_has_its_place():
    parts = {p.name for p in PACKAGE.iterdir() if p.is_dir() and list(p.glob("*.py"))}
    assert parts <= set(MAY_IMPORT)


def test_siblings_import_public_functions_alone():
    """An op that is composed of others calls them as users do, and there are no cycles."""
    folders, uses = {p.name for p in OPS}, {}
    public = {f"fastdiff.ops.{c.module.split('.')[-1]}.{name}" for c in REGISTRY.values() for name in c.cases()}
    for path in sources("ops"):
        for module, line in imports(path):
            if len(path.relative_to(PACKAGE).parts) == 3 and module.startswith("fastdiff.ops."):
                sibling = module.split(".")[2]
                if sibling in folders - {path.parent.name}:
                    assert path.name == "__init__.py" and module in public, f"{names(path)}:{line} imports {module}"
                    uses.setdefault(path.parent.name, set()).add(sibling)
    while uses:
        free = {op for op, used in uses.items() if not used & set(uses)}
        assert free, f"ops that import each other: {sorted(uses)}"
        uses = {op: used for op, used in uses.items() if op not in free}


def test_references_import_nothing_of_ours():
    for folder in OPS:
        wrong = [module for module, _ in imports(folder / "reference.py") if module.split(".")[0] == "fastdiff"]
        assert not wrong, f"{folder.name}/reference.py imports {wrong}"


def test_only_contract_calls_torch_library():
    for path in SOURCES:
        if path in (PACKAGE / "core" / "contract.py", DEMO) or path.relative_to(PACKAGE).parts[0] == "testing":
            continue  # testing calls torch.library.opcheck, which registers nothing
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.library")), f"{names(path)}:{node.lineno}"
        assert not [m for m, _ in imports(path) if m.startswith("torch.library")], names(path)


def test_nobody_imports_tests_or_benchmarks():
    wrong = [f"{names(path)}:{line} imports {module}" for path in SOURCES for module, line in imports(path)
             if module.split(".")[0] in ("tests", "benchmarks")]
    assert not wrong


def test_optional_libraries_only_among_peers():
    wrong = [f"{names(path)}:{line} imports {module}" for path in SOURCES if path != DEMO
             for module, line in imports(path) if module.split(".")[0] in OPTIONAL]
    assert not wrong


@pytest.mark.parametrize("folder", OPS, ids=lambda p: p.name)
def test_op_folder(folder):
    files = {p.name for p in folder.iterdir() if p.is_file()}
    assert {"__init__.py", "reference.py", "cases.py"} <= files
    assert files <= SPLIT_ROLES, f"roles are fixed: {sorted(files - SPLIT_ROLES)}"
    native = ROOT / "csrc" / "ops" / folder.name
    for path in native.glob("*"):
        assert NATIVE_ROLES.match(path.name), f"roles are fixed: {path.name}"
        assert not path.name.startswith(folder.name), f"a role never repeats the op's name: {path.name}"
    contracts = [c for c in REGISTRY.values() if c.module == f"fastdiff.ops.{folder.name}"]
    assert contracts, "the folder makes no contract"
    for name, function in contracts[0].public().items():
        assert function.__doc__, f"{name} has no docstring"
        for section in ("Shapes", "Dtypes", "Grads", "Raises"):
            assert f"\n    {section} " in function.__doc__, f"{name}: the docstring has no {section}"


def test_native_folders_are_ops():
    native = {p.name for p in (ROOT / "csrc" / "ops").iterdir() if p.is_dir()}
    assert native <= {p.name for p in OPS}


def test_native_includes():
    """csrc/ops/x includes common/ and itself; a kernel file sees no torch."""
    wrong = []
    for path in (ROOT / "csrc" / "ops").rglob("*.[hc]*"):
        for target in re.findall(r'#include "([^"]+)"', path.read_text()):
            mine = f"ops/{path.parent.name}/"
            if not target.startswith(("common/", mine)):
                wrong.append(f"{names(path)} includes {target}")
        if path.name.endswith((".simd.cpp", ".cuh")) and (seen := [p for p in included(path) if "<torch/" in p.read_text()]):
            wrong.append(f"{names(path)} sees torch through {[p.name for p in seen]}")
    assert not wrong


def test_cuda_kernels_run_on_the_cpu():
    """Kernels and their launches are in .cuh files that tests/native builds for the CPU; .cu files see torch and have none."""
    native = "".join(path.read_text() for path in (ROOT / "tests" / "native").glob("*.cpp"))
    for path in (ROOT / "csrc" / "ops").glob("*/*.cu*"):
        if path.suffix == ".cu":
            assert "__global__" not in path.read_text() and "<<<" not in path.read_text(), f"{names(path)} has a kernel or a launch"
        elif "__global__" in path.read_text():
            assert f'#include "{path.relative_to(ROOT / "csrc")}"' in native, f"no test runs {names(path)}"


def included(path):
    """The file and all of ours that it includes, however deep."""
    found, todo = set(), [path]
    while todo:
        here = todo.pop()
        if here not in found:
            found.add(here)
            todo += [ROOT / "csrc" / target for target in re.findall(r'#include "([^"]+)"', here.read_text())]
    return found


def test_no_utils():
    assert not list(PACKAGE.rglob("util*.py"))


def test_length_of_kernel_files():
    kernels = [*(ROOT / "csrc").rglob("*.*"), *(PACKAGE / "ops").rglob("*.py")]
    long = [f"{names(p)}: {n} lines" for p in kernels if p.is_file() and (n := len(p.read_text().splitlines())) > 600]
    assert not long


# What names an op: the one import line in ops/__init__.py. Ops called by name, as their users do, are in the parts above ops.
NEUTRAL = [*sources("core", "testing", "bench"), *sorted(p for p in PACKAGE.glob("*.py") if p not in (DEMO, PRESETS)),
           ROOT / "setup.py", ROOT / "CMakeLists.txt", *sorted((ROOT / "tests").glob("*t_[ch]*.py")),
           *sorted((ROOT / "csrc" / "common").glob("*"))]


@pytest.mark.parametrize("path", NEUTRAL, ids=names)
def test_names_no_op(path):
    # "linear" is an adjective too, and vec.h makes a float from its bits.
    words = ({p.name for p in OPS} | {name for c in REGISTRY.values() for name in (c.name, *c.cases())}) - {"linear", "from_bits"}
    pattern = re.compile(r"\b(" + "|".join(sorted(words, key=len, reverse=True)) + r")\b")
    found = [f"{i}: {line.strip()}" for i, line in enumerate(path.read_text().splitlines(), 1) if pattern.search(line)]
    assert not found


def test_one_line_per_op():
    lines = (PACKAGE / "ops" / "__init__.py").read_text().splitlines()
    for folder in OPS:
        assert sum(line.startswith(f"from .{folder.name} import") for line in lines) == 1
    listed = [line for line in lines if line.startswith("from .")]
    assert listed == sorted(listed), "one sorted import line per op"
