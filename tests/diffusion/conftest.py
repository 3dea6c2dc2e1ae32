from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """The tensors of a file of tests/golden, floating ones in float64."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

    def load(name):
        tensors = safetensors.load_file(GOLDEN / f"{name}.safetensors")
        return {key: x.double() if x.is_floating_point() else x for key, x in tensors.items() if "asis_float32" not in key}

    return load


@pytest.fixture(scope="session")
def near():
    """Holds a tensor to another: max |a - b| <= tolerance max |b|."""

    def check(got, want, tolerance=1e-11):
        assert got.shape == want.shape and got.dtype == want.dtype
        error, size = (got - want).abs().max().item(), want.abs().max().item()
        assert error <= tolerance * (size or 1), f"{error / (size or 1):.1e} > {tolerance:.0e}"

    return check


@pytest.fixture
def draws(monkeypatch):
    """Gives `sample` its noise from a list."""

    def give(noises):
        noises = iter(noises)
        monkeypatch.setattr("fastdiff.diffusion.sampling.normal", lambda z, generator: next(noises))

    return give
