"""What a GPU would be given, without one: ops run on meta tensors with every choice as on a GPU, whose kernels' launches are noted."""

import importlib
import random
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff.core import device, jit
from fastdiff.core.backend import Backend, choose
from fastdiff.core.case import Array, Dim, Integers
from fastdiff.core.contract import REGISTRY, public

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(bool(jit.INTERPRET), reason="launches are noted, not interpreted")


class Watch(TorchDispatchMode):
    """Notes the fastdiff ops that are called; refuses a tensor elsewhere. (A number read from a tensor, on which a GPU would be waited
    for, is refused by meta tensors themselves.)"""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fastdiff":
            self.calls.append((REGISTRY[op.name().split("::")[1]], args))
        out = op(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert all(x.is_meta for x in tensors), f"{op} touches a tensor on the CPU"
        return out


def _arguments(case, dims, dtype):
    def made(spec):
        if isinstance(spec, Array):
            own = getattr(torch, spec.dtype) if spec.dtype else dtype
            return torch.empty(spec.shape, dtype=own, device="meta").requires_grad_(spec.grad)
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") if isinstance(spec, Integers) else spec

    return {name: made(spec) for name, spec in case.arguments(**dims).items()}


def _calls(function, case, dims, dtype):
    """Contracts and arguments of a call and of its derivative."""
    arguments = _arguments(case, dims, dtype)
    with Watch() as watch:
        outs = case.taking(function)(**arguments)
        outs = [y for y in (outs if isinstance(outs, tuple) else (outs,)) if y.requires_grad]
        wanted = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        if outs:
            torch.autograd.grad(outs, wanted, [torch.empty_like(y) for y in outs], allow_unused=True)
    return watch.calls


def _why_not(backend, args):
    """Backend.why_not on a GPU where the CUDA library is not built."""
    if backend.name not in ("triton", "reference"):
        return "not there"
    if backend.dtypes is not None and args[0].dtype not in backend.dtypes:
        return "another dtype"
    return backend.refuse(*args) if backend.refuse else None


@pytest.mark.parametrize("name", public())
def test_launches(name, monkeypatch):
    """No step from an op's call to its launches, forward and backward, waits for the GPU or leaves it, and Triton takes the launches:
    it makes arguments of 1 constants, which are no tensors."""
    function, case = public()[name]
    launched = {}

    def note(kernel, *args, grid, warmup, **settings):
        assert all(x.is_meta for x in tree_leaves(args) if isinstance(x, torch.Tensor)), f"{kernel} is given a tensor on the CPU"
        job = module._job(kernel, args, settings)
        launched[repr(job)] = job

    module = importlib.import_module("test_triton")
    monkeypatch.setattr(Backend, "why_not", _why_not)
    monkeypatch.setattr(jit, "on_device", lambda x: nullcontext())
    monkeypatch.setattr(device, "architecture", lambda where: 90)
    monkeypatch.setattr(triton.runtime.JITFunction, "run", note)
    rng = random.Random(name)
    for dtype, ones in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
        size = lambda dim, ones=ones: max(dim.low, 1) if ones else rng.randint(max(dim.low, 1), dim.high)
        dims = {k: size(d) if isinstance(d, Dim) else rng.choice(d.values) for k, d in case.dims.items()}
        for contract, args in _calls(function, case, dims, dtype):
            with Watch(), torch.no_grad():
                outs = contract.outputs(*args)
                choose(contract.name, contract.backends, args).run(args, outs if isinstance(outs, tuple) else (outs,))
    for job in launched.values():
        _ttir(job)


def _ttir(job):
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    module, name, signature, constants, attributes, options = job
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options, context = backend.parse_options(options), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(getattr(importlib.import_module(module), name), signature, constants, attributes)
    try:
        source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    except Exception as error:
        raise AssertionError(f"{name} {signature} {constants}: {error}") from error
