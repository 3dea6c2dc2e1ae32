"""Golden vectors: what the published programs compute, and how close a model must come."""

import json
from math import prod
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastdiff

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


class Golden:
    """A file of tests/golden. tensors: as stored; config: of the published program; weights: in float64."""

    def __init__(self, name):
        safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
        with safetensors.safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}
            self.config = json.loads(file.metadata()["config"])
        self.weights = {key: value.double() for key, value in self.under("weights/").items()}

    def __getitem__(self, key):
        return self.tensors[key]

    def under(self, prefix):
        """The tensors of a prefix, by the rest of their names."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


@pytest.fixture
def golden():
    return Golden


@pytest.fixture(params=["float64, reference", "float32, cpu"])
def held(request):
    """A dtype on one backend, and the judge of outputs and gradients there."""
    dtype, backend = request.param.split(", ")
    with fastdiff.use_backend(backend):
        yield Held(getattr(torch, dtype))


class Held:
    """Relative errors, max |got - want| / max |want|; `published` is the published program's in float32, twice which is granted there."""

    def __init__(self, dtype):
        self.dtype = dtype

    def close(self, name, got, want, published, exact, slack):
        assert got.shape == want.shape, name
        error = ((got.detach().double() - want).abs().max() / want.abs().max()).item()
        limit = exact if self.dtype is torch.float64 else 2 * published + slack
        assert error <= limit, f"{name}: {error:.1e} > {limit:.1e}"

    def outputs(self, published, **pairs):
        for name, (got, want) in pairs.items():
            self.close(name, got, want, published, 1e-12, 1e-7)

    def gradients(self, published, pairs):
        for name, (got, want) in pairs.items():
            self.close(name, got, want, published, 1e-11, 1e-6)


@pytest.fixture
def size():
    """size(make, *inputs): (parameters in millions, multiply-adds of a forward pass in milliards), without memory for either.

    inputs: shapes of images, and None for an int64 per sample.
    """
    ops = torch.ops.fastdiff
    work = {ops.attention: lambda q, k, *_, **__: 4 * prod(q) * k[2], ops.patch_embed: lambda x, weight, *_, **__: 2 * prod(x) * weight[0],
            ops.unpatch_project: lambda tokens, weight, *_, **__: 2 * prod(tokens) * weight[0]}

    def count(make, *inputs):
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=work) as counter:
            model = make()
            model(*(torch.zeros(1, dtype=torch.int64) if shape is None else torch.zeros(1, *shape) for shape in inputs))
        return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9

    return count
