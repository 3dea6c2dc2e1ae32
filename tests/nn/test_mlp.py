"""MLP against its formula, in whole and by parts."""

import pytest
import torch
import torch.nn.functional as F

from fastdiff import nn
from fastdiff.nn.mlp import PART

PLAIN = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "squared_relu": lambda x: x.clamp(min=0) ** 2,
         "geglu": lambda x: x[..., :12] * F.gelu(x[..., 12:])}


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", PLAIN)
def test_formula(activation, residual):
    made = nn.MLP(8, 12, activation=activation, residual=residual, eps=1e-3)
    x = torch.randn(2, PART, 8)[:, :PART - 3]  # in parts, the last one short; not contiguous
    z = F.layer_norm(x, (8,), made.norm.weight, made.norm.bias, 1e-3)
    wanted = F.linear(PLAIN[activation](F.linear(z, made.up.weight, made.up.bias)), made.down.weight, made.down.bias) + residual * x
    torch.testing.assert_close(made(x), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(made(x), wanted, rtol=1e-5, atol=1e-5)
    assert set(made.state_dict()) == {f"{name}.{kind}" for name in ("norm", "up", "down") for kind in ("weight", "bias")}


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 8)])
def test_few_rows(shape):
    made, x = nn.MLP(8, 12), torch.randn(shape)
    with torch.no_grad():
        assert made(x).shape == shape


def test_dropout_is_for_training():
    made, x = nn.MLP(8, 12, dropout=0.5), torch.randn(4, 8)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))


def test_refusal():
    with pytest.raises(ValueError, match="MLP: activation wants one of 'gelu', 'gelu_tanh', 'squared_relu', 'geglu', got 'relu'"):
        nn.MLP(8, 12, activation="relu")


@pytest.mark.parametrize(("approximate", "bias"), [("none", True), ("tanh", False)])
def test_geglu(approximate, bias):
    made, x = nn.GEGLU(8, 12, bias=bias, approximate=approximate), torch.randn(2, 5, 8)
    value, gate = F.linear(x, made.proj.weight, made.proj.bias).chunk(2, -1)
    torch.testing.assert_close(made(x), value * F.gelu(gate, approximate=approximate))


@pytest.mark.parametrize("bias", [True, False])
def test_geglu_from_diffusers(diffusers_activations, bias):
    theirs, x = diffusers_activations.GEGLU(8, 12, bias), torch.randn(2, 5, 8)
    ours = nn.GEGLU.from_diffusers(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    with pytest.raises(ValueError, match=r"layer wants a diffusers.models.activations.GEGLU, got a diffusers.models.activations.SwiGLU"):
        nn.GEGLU.from_diffusers(diffusers_activations.SwiGLU(8, 12))
