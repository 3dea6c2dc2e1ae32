"""The Triton kernels on a machine without a GPU: right in Triton's interpreter, and machine code of every launch row for three chips."""

import concurrent.futures
import importlib
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastdiff.core import device
from fastdiff.core.backend import FLOATS
from fastdiff.core.case import Dim
from fastdiff.core.contract import REGISTRY, public
from fastdiff.core.jit import INTERPRET, power_of_two
from fastdiff.testing import Example, properties, subjects

triton = pytest.importorskip("triton")
ATTENTION, GRID, CROSS, DCT, LAYER = (importlib.import_module(f"fastdiff.ops.{name}.triton") for name in
                                      ("attention", "fourier_cross_attend", "cross_attend", "dct", "layer_norm_modulate"))
interpreter = pytest.mark.skipif(not INTERPRET, reason="runs in the process of test_interpreter")
compiler = pytest.mark.skipif(bool(INTERPRET), reason="the interpreter compiles nothing")


@compiler
def test_interpreter():
    """The tests below that need TRITON_INTERPRET=1 before Triton is imported."""
    run = subprocess.run([sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"], capture_output=True, text=True,
                         env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout, run.stdout


# In the interpreter

SUBJECTS = {s.name: s for s, why in subjects("cpu", backends=("triton",)) if why is None}
# One layout per dtype: dense, transposed heads, an odd offset.
DRESSED = list(zip(FLOATS, ("contiguous", "heads", "offset"), strict=True))


def _example(name, dtype, layout, values=(), **dims):
    case = public()[name][1]
    dims = case.sizes(**dims)
    names = Example(case, dims, dtype, {}, {}, 3).tensors()
    return Example(case, dims, dtype, dict.fromkeys(names, layout), dict.fromkeys(names, "normal") | dict(values), 3)


def _row(B, H, M, N, E, bias=None, lengths=False, causal=False, scale=None):
    return dict(B=B, H=H, M=M, N=N, E=E, bias=bias, lengths=lengths, causal=causal, scale=scale)


EDGES = [_row(0, 2, 3, 4, 8, "shared"), _row(1, 1, 0, 5, 8, "keys"), _row(2, 1, 5, 0, 8, "full"), _row(1, 1, 1, 1, 1), _row(1, 2, 7, 1, 40)]
SIZES = [
    _row(1, 2, 31, 33, 40), _row(2, 1, 33, 32, 72, "full"), _row(2, 2, 32, 31, 16, "heads", lengths=True),
    _row(1, 1, 20, 50, 261, "shared"), _row(1, 1, 17, 40, 512), _row(2, 1, 129, 65, 5, "keys", causal=True, scale=-0.5),
    _row(2, 2, 40, 140, 24, "one head", causal=True), _row(1, 2, 33, 64, 32, causal=True, lengths=True, scale=0.37)]
SHARED_KEYS = [_row(1, 1, 16, 300, 32), _row(1, 1, 20, 260, 40, "heads", lengths=True), _row(1, 1, 40, 270, 80, "full", causal=True)]
SHARED_QUERIES = [_row(1, 1, 150, 16, 32), _row(1, 1, 160, 20, 40, "keys", lengths=True), _row(1, 1, 170, 130, 72, "full", causal=True)]


@interpreter
@pytest.mark.parametrize(("dtype", "layout"), DRESSED)
@pytest.mark.parametrize("dims", EDGES + SIZES + SHARED_KEYS + SHARED_QUERIES)
def test_attention(dims, dtype, layout):
    values = {"bias": "-inf"} if dims["bias"] else {}
    properties.gradients(SUBJECTS["attention_with_lse"], _example("attention_with_lse", dtype, layout, values, **dims))


@interpreter
@pytest.mark.parametrize("values", [{"bias": "-inf rows"}, {"bias": "all -inf"}, {"q": "one dominant"}, {"k": "offset 1e3"}, {"v": "tiny"}])
@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_values(dtype, values):
    example = _example("attention_with_lse", dtype, "heads", values, **_row(2, 1, 33, 150, 40, "full"))
    properties.gradients(SUBJECTS["attention_with_lse"], example)


@interpreter
@pytest.mark.parametrize("dims", [SIZES[2], SHARED_KEYS[0], SHARED_QUERIES[0]])
@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_attention_memory(dims, layout):
    """Strides that are copied, overlap or have gaps; every output element is written, nothing else is."""
    example = _example("attention_with_lse", torch.bfloat16, layout, **dims)
    checks = (properties.gradients, properties.written, properties.unharmed) if layout == "sliced" else (properties.gradients,)
    for check in checks:
        check(SUBJECTS["attention_with_lse"], example)


def _splits(dims):
    """Programs that share the loop of one block: in the forward, for dq, for dk and dv."""
    q = torch.empty(dims["B"], dims["H"], dims["M"], dims["E"])
    by_query, by_key = ATTENTION._backward_plan(q, dims["N"])
    return ATTENTION._forward_plan(q, dims["N"])[1], by_query[1], by_key[1]


@interpreter
def test_plans():
    """The sizes above take every plan."""
    for dims in SHARED_KEYS:
        forward, query, _ = _splits(dims)
        assert forward > 1 and query > 1, dims
    for dims in SHARED_QUERIES:
        assert _splits(dims)[2] > 1, dims
    assert all(_splits(dims) == (1, 1, 1) for dims in EDGES)


@interpreter
@pytest.mark.parametrize("name", ["patchify", "unpatchify", "space_to_depth", "depth_to_space"])
@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (0, 2), (7,), (32,), (2, 3, 4), (1, 31, 2), (11, 13)])
@pytest.mark.parametrize("order", ["pqc", "cpq"])
def test_patches(name, grid, order):
    for (dtype, layout), C, square in zip(DRESSED, (3, 1, 0), (True, False, True), strict=True):
        for strides in (layout, "transposed", "expanded"):
            properties.gradients(SUBJECTS[name], _example(name, dtype, strides, B=2, C=C, grid=grid, patch=3, order=order, square=square))


@interpreter
@pytest.mark.parametrize(("dtype", "layout"), DRESSED)
@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (1, 1, 1, 1), (2, 3, 33, 40), (1, 2, 0, 8), (1, 1, 129, 261)])
@pytest.mark.parametrize("mask", ["normal", "-inf"])
def test_merge(sizes, dtype, layout, mask):
    example = _example("merge_attention", dtype, layout, {"lse_a": mask, "lse_b": mask}, **dict(zip("BHME", sizes, strict=True)))
    properties.gradients(SUBJECTS["merge_attention"], example)
    properties.written(SUBJECTS["merge_attention"], example)


@interpreter
@pytest.mark.parametrize(("dtype", "layout"), DRESSED)
@pytest.mark.parametrize("name", ["add_noise", "guide", "denoise_step", "denoise_step_with_x0"])
def test_sampling(name, dtype, layout):
    options = [dict(rescale=0.7)] if name == "guide" else [{}]
    if name.startswith("denoise_step"):
        options = [dict(prediction=p, clip=clip, noise=noise, rederive=rederive) for p, clip, noise, rederive in (
            ("eps", None, "fixed", True), ("x0", 0.3, "learned", True), ("v", None, "none", True), ("eps", 0.3, "none", False),
            ("v", 1.0, "learned", False), ("x0", 1.0, "fixed", False))]
    for option in options:
        for sizes in (dict(B=2, C=3, h=19, w=33), dict(B=3, C=5, h=33, form="tokens"), dict(B=0, C=2, h=3, w=4)):
            properties.values(SUBJECTS[name], _example(name, dtype, layout, **sizes, **option))


@interpreter
@pytest.mark.parametrize(("dtype", "layout"), DRESSED)
@pytest.mark.parametrize("order", ["lsb", "msb"])
def test_analog_bits(order, dtype, layout):
    for name in ("to_bits", "from_bits"):
        for width in ((8, "uint8"), (4, "int32"), (31, "int64")):
            for form in ("image", "volume"):
                properties.values(SUBJECTS[name], _example(name, dtype, layout, B=2, C=3, h=13, w=31, form=form, order=order, width=width))


GRIDS = [dict(M=20, C=3, grid=(9, 33)), dict(M=40, C=1, heads=2, grid=(2, 3, 4), bias=True, residual=False), dict(B=2, C=5, grid=(1, 1)),
         dict(M=130, C=3, grid=(3, 18), norm=True), dict(C=GRID.LARGEST, grid=(4, 5), norm=True), dict(B=0, grid=(3, 18))]


@interpreter
@pytest.mark.parametrize("dims", GRIDS)
def test_grid(dims):
    """In float32, which the op computes in whatever it is given."""
    example = _example("fourier_cross_attend", torch.float32, "transposed", **dict(B=1, M=3, D=8, O=8, width=5, bands=3) | dims)
    properties.gradients(SUBJECTS["fourier_cross_attend"], example)
    properties.written(SUBJECTS["fourier_cross_attend"], example)


@interpreter
@pytest.mark.parametrize("values", [{"image": "one dominant"}, {"image": "offset 1e3"}, {"q_weight": "one dominant"}])
def test_grid_values(values):
    """Programs share rows and queries, and a score is far from the others."""
    example = _example("fourier_cross_attend", torch.float32, "offset", values, D=8, O=8, width=5, bands=3, M=40, C=3, grid=(17, 33), B=1)
    q = torch.empty(1, 1, 40, 3)
    assert GRID._blocks(q, torch.empty(1, 1, 40, 17), torch.empty(1, 1, 40, 33))[2] > 1
    properties.gradients(SUBJECTS["fourier_cross_attend"], example)


_EVERY = dict(heads=2, norm=True, bias=True, lengths=True)
READS = [dict(M=20, N=300, D=24, C=70, width=20, **_EVERY), dict(M=33, N=33, C=130, O=24, width=40, residual=False), dict(B=0)]
WRITES = [dict(M=70, N=45, D=40, C=24, width=20, **_EVERY), dict(M=5, N=4, D=72, C=8, O=300, width=40, residual=False), dict(M=3, N=0)]


@interpreter
@pytest.mark.parametrize("layout", ["contiguous", "offset", "transposed", "expanded"])
@pytest.mark.parametrize("dims", READS + WRITES)
def test_cross(dims, layout):
    example = _example("cross_attend", torch.bfloat16, layout, **dict(B=2, M=3, N=5, D=8, C=8, O=8, width=3) | dims)
    properties.gradients(SUBJECTS["cross_attend"], example)


@interpreter
@pytest.mark.parametrize("dims", [READS[0], WRITES[0]])
def test_cross_memory(dims):
    example = _example("cross_attend", torch.bfloat16, "sliced", **dict(B=2) | dims)
    for check in (properties.written, properties.unharmed, properties.batch_independence):
        check(SUBJECTS["cross_attend"], example)


# What the two kernels do not take: other dtypes, wide heads, wide results.
BY_PARTS = [(dims, dtype) for dims in (READS[0], WRITES[0]) for dtype in (torch.float32, torch.float16)] + [
    (dict(M=9, N=600, width=70, bias=True, lengths=True), torch.bfloat16), (dict(M=600, N=9, O=520, residual=False), torch.bfloat16)]


@interpreter
@pytest.mark.parametrize(("dims", "dtype"), BY_PARTS)
def test_cross_by_parts(dims, dtype, monkeypatch):
    """One part, as on a GPU at these sizes, and as many as the sizes allow."""
    module = importlib.import_module("fastdiff.ops.cross_attend")
    for chunk in (module._GPU.chunk, 1):
        monkeypatch.setattr(module, "_GPU", module._GPU._replace(chunk=chunk))
        example = _example("cross_attend", dtype, "offset", **dict(B=2, D=8, C=8, O=8, width=3, norm=True) | dims)
        properties.gradients(SUBJECTS["cross_attend"], example)


@interpreter
@pytest.mark.parametrize(("EQ", "EV"), [(24, 40), (40, 5)])
def test_cross_widths(EQ, EV):
    """Keys and values of different widths."""
    generator = torch.Generator().manual_seed(0)
    made = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16()
    B, M, N, D, C, H = 2, 20, 300, 48, 70, 2
    target, source, q, bias = made(B, M, D), made(B, N, C), made(B, M, H * EQ), made(H * EV)
    weights = [made(H * E, C) / 8 for E in (EQ, EV)]
    split = lambda x: x.double().unflatten(-1, (H, -1)).transpose(1, 2)
    attend = lambda q, k, v: torch.softmax(split(q) @ split(k).mT * EQ**-0.5, -1) @ split(v)
    attended, lse, low = torch.empty(B, M, H * EV), torch.empty(B, H, M), torch.empty(B, H, M)
    CROSS.read(q, source, (weights[0], None), (weights[1], bias), (None, None), None, H, 1e-6, attended, lse, low)
    k, v = source.double() @ weights[0].double().T, source.double() @ weights[1].double().T + bias
    torch.testing.assert_close(attended.double(), attend(q, k, v).transpose(1, 2).flatten(2), atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse.double() + low, torch.logsumexp(split(q) @ split(k).mT * EQ**-0.5, -1), atol=0.05, rtol=0.01)
    q_weight, out_weight, out = made(H * EQ, D) / 8, made(D, H * EV) / 8, torch.empty(B, M, D).bfloat16()
    keys, values = made(B, 7, H * EQ), made(B, 7, H * EV)
    CROSS.write(target, keys, values, (q_weight, None), out_weight, None, (None, None), None, H, 1e-6, True, out)
    y = attend(target.double() @ q_weight.double().T, keys, values).transpose(1, 2).flatten(2) @ out_weight.double().T
    torch.testing.assert_close(out.double(), target.double() + y, atol=0.06, rtol=0.02)


@interpreter
def test_cross_plans():
    """The first read's source is shared, and the sizes above are for kernels or for parts as their tests say."""
    assert CROSS.read_plan(torch.empty(1, 20, 40, dtype=torch.bfloat16), 300, 2, 40)[1] > 1
    for dims in READS + WRITES:
        kind = "read" if dims.get("M", 3) <= dims.get("N", 5) else "write"
        width, O = dims.get("width", 3), dims.get("O", dims.get("D", 8))
        assert CROSS.refuse(kind, torch.empty(0, dtype=torch.bfloat16), width, width, O) is None
    assert CROSS.refuse("read", torch.empty(0, dtype=torch.bfloat16), 70, 70, 8)
    assert CROSS.refuse("write", torch.empty(0, dtype=torch.bfloat16), 3, 3, 520)


@interpreter
@pytest.mark.parametrize(("dtype", "layout"), DRESSED)
@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 5, 0), (1, 1, 1), (129, 70, 150)])
def test_linear(sizes, dtype, layout):
    for strides in (layout, "transposed", "expanded"):
        properties.gradients(SUBJECTS["linear"], _example("linear", dtype, strides, **dict(zip("MNK", sizes, strict=True))))


EMBEDDED = [dict(B=2, C=3, D=70, patch=(8, 8), grid=(3, 5)), dict(B=1, C=5, D=130, patch=(1, 3), grid=(4, 33), biased=False),
            dict(B=2, C=2, D=5, patch=(2, 2), grid=(2, 3, 4), order="cpq"), dict(B=2, C=1, D=0, patch=(5, 4), grid=(7,))]


@interpreter
@pytest.mark.parametrize(("dtype", "layout"), DRESSED)
@pytest.mark.parametrize("dims", EMBEDDED)
def test_embed(dims, dtype, layout):
    for name in ("patch_embed", "unpatch_project"):
        properties.gradients(SUBJECTS[name], _example(name, dtype, layout, **dims))


# A plane that one program holds, one of two launch rows, and one that goes axis by axis; odd lengths have a middle.
PLANES = [(2, 1, 17, 32), (1, 1, 33, 64), (1, 1, 65, 66), (2, 1, 3, 131), (1, 1, 0, 5)]


@interpreter
@pytest.mark.parametrize("sizes", PLANES)
@pytest.mark.parametrize(("name", "options"), [("dct", {}), ("idct", {"dims": 1}), ("frequency_gain", {"gain": "sample"}),
                                               ("blur_denoise", {"gain": "all"}), ("blur_diffuse", {"floor": 0.25})])
def test_frequencies(name, options, sizes):
    dtype, layout = DRESSED[sizes[3] % 2]
    properties.values(SUBJECTS[name], _example(name, dtype, layout, **dict(zip("BChw", sizes, strict=True)), **options))


@interpreter
def test_frequencies_are_refused():
    """A length beyond the kernels' goes to the reference."""
    x = torch.empty(1, DCT.LARGEST + 1)
    row = next(b for b in REGISTRY["dct"].backends if b.name == "triton")
    assert "at most" in row.why_not((x, 1, False)) and not row.why_not((x.T, 1, False))


MODULATED = [dict(B=2, N=17, D=70, affine="weight bias", wide=True), dict(N=20, D=33, scale="token", affine="weight"), dict(B=0, D=4)]


@interpreter
@pytest.mark.parametrize("width", [8192, 32])
@pytest.mark.parametrize("dims", MODULATED)
def test_layer_norm(dims, width, monkeypatch):
    """Rows that are one block of columns, and several."""
    monkeypatch.setitem(LAYER.LAUNCH, "width", width)
    name = "gate_residual_norm_modulate"
    for (dtype, layout), per in zip(DRESSED, ("sample", "token", "sample"), strict=True):
        values = {"x": "offset 1e3"} if dtype == torch.float32 else {}
        example = _example(name, dtype, layout, values, **dict(B=1, gate=per, shift=per) | dims)
        properties.gradients(SUBJECTS[name], example)
    properties.written(SUBJECTS[name], example)


@interpreter
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dims", [dict(B=2, groups=2, per_group=5, space=(16, 17), wide=True), dict(groups=1, per_group=33, space=(130,)),
                                  dict(B=0)])
def test_group_norm(dims, layout):
    for dtype, values in zip(FLOATS, ("offset 1e3", "normal", "one dominant"), strict=True):
        example = _example("group_norm_modulate", dtype, layout, {"x": values}, **dict(B=1) | dims)
        properties.gradients(SUBJECTS["group_norm_modulate"], example)
    properties.written(SUBJECTS["group_norm_modulate"], example)


@interpreter
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("sizes", [(2, 7, 70), (1, 1, 1100), (1, 0, 4)])
def test_geglu(sizes, approximate):
    for dtype, layout in DRESSED:
        example = _example("geglu", dtype, layout, {"x": "one dominant"}, **dict(zip("BNF", sizes, strict=True)), approximate=approximate)
        properties.gradients(SUBJECTS["geglu"], example)


def _apart(x, path):
    """x, the rows of its last axis but one so far apart that only 64-bit offsets reach the last; what is not touched takes no memory."""
    if x.dtype != torch.bfloat16 or x.dim() < 2 or x.shape[-2] < 3 or not x.numel():
        return x
    memory = torch.from_file(str(path), shared=True, size=2**31 + 2**24, dtype=x.dtype)
    y = x.movedim(-2, 0).contiguous()
    step = (2**31 // (x.shape[-2] - 1) + 16) // 16 * 16
    return memory.as_strided(y.shape, (step, *y.stride()[1:])).copy_(y).movedim(0, -2)


@interpreter
@pytest.mark.parametrize("name", {subject.contracts: name for name, subject in SUBJECTS.items()}.values())
def test_far(name, tmp_path):
    """The same, forward and backward, from memory that 32-bit offsets do not reach; but for the order of PyTorch's own sums, to the bit."""
    subject, case = SUBJECTS[name], public()[name][1]
    rng = random.Random(name)
    dims = {k: min(max(d.low, rng.randint(3, 20)), d.high) if isinstance(d, Dim) else d.values[0] for k, d in case.dims.items()}
    given = _example(name, torch.bfloat16, "contiguous", **dims).arguments()
    results = []
    for place in (lambda x, i: x, lambda x, i: _apart(x, tmp_path / str(i))):
        made = {k: place(x, i) if isinstance(x, torch.Tensor) else x for i, (k, x) in enumerate(given.items())}
        wanted = [x.requires_grad_() for x in made.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        with subject.forced():
            outs = subject.function(**made)
            outs = outs if isinstance(outs, tuple) else (outs,)
            through = [y for y in outs if y.requires_grad]
            douts = [place(y.detach().cos(), 15) for y in through[:1]]
            grads = torch.autograd.grad(through[:1], wanted, douts, allow_unused=True) if through else ()
        results.append([y for y in (*outs, *grads) if y is not None])
    for near, distant in zip(*results, strict=True):
        torch.testing.assert_close(distant, near, rtol=1e-5, atol=1e-5, equal_nan=True)


# Compiled

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a program can have, by architecture
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}


def _specialized(value, path, constants, attributes):
    """Triton's type of an argument, as a launch would specialise it."""
    if isinstance(value, tuple):
        return tuple(_specialized(v, (*path, i), constants, attributes) for i, v in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if (value.data_ptr() if isinstance(value, torch.Tensor) else value) % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _job(kernel, args, settings):
    """A launch as (module, kernel, signature, constants, attributes, options): what compiles it in another process."""
    options = {name: value for name, value in settings.items() if name not in kernel.arg_names}
    given = dict(zip(kernel.arg_names, args, strict=False)) | {name: value for name, value in settings.items() if name not in options}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = _specialized(value, (i,), constants, attributes)
    return kernel.fn.__module__, kernel.fn.__name__, signature, constants, attributes, options


def _launched(monkeypatch, architecture, calls):
    """Jobs of all kernels that these calls, (contract, args), would launch on a GPU of that architecture."""
    jobs = {}

    def record(kernel, *args, grid, warmup, **settings):
        job = _job(kernel, args, settings)
        jobs[repr(job)] = job

    monkeypatch.setattr(triton.runtime.JITFunction, "run", record)
    monkeypatch.setattr(device, "architecture", lambda _: architecture)
    for contract, args in calls:
        outs = contract.outputs(*args)
        row = next(b for b in contract.backends if b.name == "triton")
        row.run(args, outs if isinstance(outs, tuple) else (outs,))
    return list(jobs.values())


def _calls(dtype):
    """Calls that take every launch row with every branch of its kernels; in float16 odd sizes, few queries and few keys instead."""

    def made(*shape):
        return torch.empty(shape, dtype=dtype)

    limits = {size or ATTENTION.LARGEST for rows in ATTENTION.LAUNCH.values() for _, size, _ in rows[dtype.itemsize]}
    rows = [(1, 2, 512, 4096, E, True) for E in sorted(limits)]
    if dtype == torch.float16:
        rows = [(16, 16, 1024, 1024, 40, False), (16, 16, 1024, 1024, 72, False), (1, 4, 4, 4096, 64, True), (1, 4, 4096, 77, 40, False),
                (1, 1, 512, 4096, 144, True), (1, 1, 512, 4096, 261, True)]
    for B, H, M, N, E, masked in rows:
        q, k, v = made(B, M, H, E).transpose(1, 2), made(B, N, H, E).transpose(1, 2), made(B, N, H, E).transpose(1, 2)
        bias, lengths = (made(1, H, M, N), torch.full((B,), N)) if masked else (None, None)
        lse, low = torch.empty(B, H, M), made(B, H, M, E if dtype.itemsize == 2 else 0)
        yield REGISTRY["attention"], (q, k, v, bias, lengths, masked, None)
        grads = (q, lse if masked else None, q, k, v, bias, lengths, q, low, lse, lse, masked, None, masked, False)
        yield REGISTRY["attention_backward"], grads
    part = (made(2, 4, 256, 64), torch.empty(2, 4, 256))
    yield REGISTRY["merge_attention"], (*part, *part)
    yield REGISTRY["merge_attention_backward"], (*part, *part, *part)
    yield REGISTRY["linear"], (made(512, 1024), made(256, 1024), made(256), made(512, 256))
    yield REGISTRY["linear"], (made(1024, 512).T, made(1024, 261).T, None, None)
    if dtype == torch.float32:
        for M, K in ((512, 4), (256, GRID.LARGEST), (20, 1)):
            rows, columns, planes, lse = made(1, 2, M, 224), made(1, 2, M, 64), made(1, K + 1, 224, 64), made(1, 2, M)
            grid = (made(1, 2, M, K), rows, columns)
            yield REGISTRY["grid_attention"], (*grid, planes)
            yield REGISTRY["grid_attention_backward"], (*grid, *grid, planes, *grid, lse, lse, True)
    if dtype == torch.bfloat16:
        for M, N, D, C, E, every in ((256, 4096, 768, 512, 32, True), (256, 4096, 512, 768, 64, True), (20, 4096, 264, 264, 40, False),
                                     (4096, 256, 256, 512, 64, True), (4096, 256, 512, 512, 32, True), (4096, 77, 512, 768, 64, False)):
            A = 8 * E
            weights, widths = ((A, D), (A, C), (A, C), (D, A)), (A, A, A, D, D, D, C, C)
            vectors = [made(n) if every else None for n in widths]
            lengths = torch.full((1,), N) if every else None
            yield REGISTRY["cross_attend"], (made(1, M, D), made(1, N, C), *(made(*w) for w in weights), *vectors, lengths, 8, 1e-6, every)
    for D, per in ((1152, (2,)), (9000, (2, 300))):
        x, modulation, vector = made(2, 300, D), made(*per, D), made(D)
        yield REGISTRY["gate_residual"], (x, x, modulation)
        yield REGISTRY["gate_residual_backward"], (x, x, modulation)
        yield REGISTRY["layer_norm_modulate"], (x, modulation, modulation, None, None, 1e-6)
        yield REGISTRY["gate_residual_norm_modulate"], (x, x, *(modulation,) * 3, vector, vector, 1e-6)
        wants = [True, False, False, True, True, False, False]
        yield REGISTRY["layer_norm_modulate_backward"], (x, None, x, None, None, modulation, modulation, None, None, 1e-6, wants)
        yield REGISTRY["layer_norm_modulate_backward"], (x, x, x, x, *(modulation,) * 3, vector, vector, 1e-6, [True] * 7)
    for C, memory in ((320, torch.contiguous_format), (192, torch.channels_last), (2048, torch.channels_last)):
        x, vector, modulation = made(2, C, 16, 16).to(memory_format=memory), made(C), made(2, C)
        modulated = (32, vector, vector, modulation, modulation, 1e-5, True)
        yield REGISTRY["group_norm_modulate"], (x, *modulated)
        yield REGISTRY["group_norm_modulate"], (x, 32, None, None, None, None, 1e-5, False)
        yield REGISTRY["group_norm_modulate_backward"], (x, x, torch.empty(2, 32, 3), *modulated, [True] * 5)
    for approximate in ("none", "tanh"):
        yield REGISTRY["geglu"], (made(4096, 2560), approximate)
        yield REGISTRY["geglu_backward"], (made(4096, 1280), made(4096, 2560), approximate)
    for order in ("pqc", "cpq"):
        yield REGISTRY["patchify"], (made(2, 3, 64, 64), [8, 8], order)
        yield REGISTRY["unpatchify"], (made(2, 64, 192), [8, 8], [8, 8], order)
    yield REGISTRY["space_to_depth"], (made(2, 3, 64, 64), [8, 8], "pqc")
    yield REGISTRY["depth_to_space"], (made(2, 192, 8, 8), [8, 8], "cpq")
    for C, patch, D, every in ((4, 2, 1152, True), (3, 8, 512, True), (3, 5, 261, False))[:3 if dtype.itemsize == 2 else 2]:
        K, image = C * patch * patch, (2, C, 16 * patch, 16 * patch)
        bias, position = (made(D), made(256, D)) if every else (None, None)
        yield REGISTRY["patch_embed"], (made(*image), made(D, K), bias, position, [patch] * 2)
        yield REGISTRY["unpatch_project"], (made(2, 256, D), made(K, D), made(K) if every else None, [patch] * 2, [16, 16])
    if dtype == torch.float32:
        yield REGISTRY["dct"], (made(2, 3, DCT.PLANE, DCT.PLANE), 2, False)
        for h, w in ((28, 32), (DCT.PLANE, DCT.PLANE), (100, 217)):
            x, gain, scalar = made(2, 3, h, w), made(2, 1, h, w), made(2)
            yield REGISTRY["frequency_mix"], (x, gain, x, gain, x, gain, 2)
            if w > 32:
                yield REGISTRY["blur_diffuse"], (x, scalar, scalar, 0.0, x, scalar)
    if dtype == torch.bfloat16:
        x, c = made(2, 3, 64, 64), torch.empty(2)
        yield REGISTRY["add_noise"], (x, x, c, c)
        yield REGISTRY["guide"], (x, x, c, 0.0)
        yield REGISTRY["guide"], (x, x, c, 0.7)
        yield REGISTRY["denoise_step"], (x, x, c, c, c, c, None, None, None, None, "eps", None, True)
        yield REGISTRY["denoise_step_with_x0"], (x, x, c, c, c, c, c, x, x, c, "x0", 1.0, True)
        yield REGISTRY["denoise_step_with_x0"], (x, x, c, c, c, c, c, x, None, None, "v", 1.0, False)
        yield REGISTRY["from_bits"], (made(2, 24, 64, 64), 8, "lsb", torch.uint8)
        yield REGISTRY["to_bits"], (torch.empty(2, 3, 64, 64, dtype=torch.uint8), 8, 1.0, "lsb", dtype)
        yield REGISTRY["to_bits"], (torch.empty(2, 3, 64, 64, dtype=torch.int64), 31, 1.0, "msb", dtype)


def _compile(job, architecture):
    """(shared memory in bytes, registers of a thread, bytes of a thread's stack), the last 0 unless registers spill."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name, signature, constants, attributes, options = job
    kernel = getattr(importlib.import_module(module), name)
    made = triton.compile(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", architecture, 32), options=options)
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = shutil.which("cuobjdump") or str(bundled)
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(field.split(":") for field in text.split() if field.count(":") == 1 and field.split(":")[1].isdigit())
    return made.metadata.shared, int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _text(job):
    """A line's worth of what was compiled."""
    _, name, signature, constants, _, options = job
    names = {path[0]: value for path, value in constants.items() if len(path) == 1}
    shown = {key: names[i] for i, key in enumerate(signature) if key.isupper() and i in names}
    dtype = next(kind for kind in signature.values() if isinstance(kind, str) and kind.startswith("*"))[1:]
    return f"{name:18} {dtype} {' '.join(f'{k}={v}' for k, v in shown.items() if v)} warps={options['num_warps']}"


@pytest.fixture(scope="module")
def pool():
    with concurrent.futures.ProcessPoolExecutor(min(8, os.cpu_count()), multiprocessing.get_context("spawn")) as made:
        yield made


@compiler
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compile(architecture, monkeypatch, pool):
    """Every kernel and launch row becomes machine code without a spill, within the chip's shared memory. -s prints a table.

    float16 on sm_90 alone: its code is bfloat16's with other instructions.
    """
    dtypes = FLOATS if architecture == 90 else FLOATS[:2]
    jobs = [job for dtype in dtypes for job in _launched(monkeypatch, architecture, _calls(dtype))]
    monkeypatch.undo()
    made = list(pool.map(_compile, jobs, [architecture] * len(jobs)))
    wrong = []
    print(f"\nsm_{architecture}  shared  registers  spilled")
    for job, (shared, registers, stack) in zip(jobs, made, strict=True):
        line = f"{shared:13} {registers:10} {stack:8}  {_text(job)}"
        print(line)
        if stack or shared > SHARED_MEMORY[architecture]:
            wrong.append(line)
    assert not wrong, "\n".join(wrong)


def test_sizes_are_cut():
    for E in range(1, ATTENTION.LARGEST + 1):
        first, second = ATTENTION._cut(E)
        assert E <= first + second <= power_of_two(E, least=16) and all(x == power_of_two(x) for x in (first, second) if x)
