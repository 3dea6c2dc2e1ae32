"""AdaLayerNorm against its formula and against diffusers' layers."""

import pytest
import torch
import torch.nn.functional as F

from fastdiff.nn import AdaLayerNorm


@pytest.mark.parametrize("options", [{}, dict(first="scale", affine=True, width=6), dict(chunks=6, bias=False)], ids=str)
def test_formula(options):
    made, x = AdaLayerNorm(10, eps=1e-3, **options), torch.randn(2, 5, 10)
    if "affine" in options:
        torch.nn.init.normal_(made.norm.weight), torch.nn.init.normal_(made.norm.bias)
    condition = torch.randn(2, options.get("width", 10))
    one, two, *others = F.linear(F.silu(condition), made.linear.weight, made.linear.bias).chunk(options.get("chunks", 2), 1)
    shift, scale = (two, one) if "first" in options else (one, two)
    norm = F.layer_norm(x, (10,), made.norm.weight, made.norm.bias, 1e-3)
    wanted = norm * (1 + scale[:, None]) + shift[:, None]
    got = made(x, condition)
    for mine, theirs in zip(got if others else [got], [wanted, *others], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="AdaLayerNorm: chunks wants at least 2, got 1"):
        AdaLayerNorm(4, chunks=1)
    with pytest.raises(ValueError, match="AdaLayerNorm: first wants 'shift' or 'scale', got 'gate'"):
        AdaLayerNorm(4, first="gate")


# (diffusers' layer, its options, what it is called with beside x)
LAYERS = [
    ("AdaLayerNorm", (12, 20), dict(timestep=torch.tensor(7))),
    ("AdaLayerNorm", (12, None, None, True, 1e-3, 1), dict(temb=torch.randn(2, 12))),
    ("AdaLayerNormZero", (12, 5), dict(timestep=torch.tensor([3, 700]), class_labels=torch.tensor([1, 4]), hidden_dtype=torch.float32)),
    ("AdaLayerNormZero", (12, None, "layer_norm", False), dict(emb=torch.randn(2, 12))),
    ("AdaLayerNormZeroSingle", (12,), dict(emb=torch.randn(2, 12))),
    ("AdaLayerNormContinuous", (12, 8, False, 1e-6), dict(conditioning_embedding=torch.randn(2, 8)))]


@pytest.mark.parametrize(("name", "options", "condition"), LAYERS, ids=range(len(LAYERS)))
def test_diffusers(diffusers_normalization, name, options, condition):
    theirs = getattr(diffusers_normalization, name)(*options).eval()
    ours, x = AdaLayerNorm.from_diffusers(theirs).eval(), torch.randn(2, 5, 12)
    mine, original = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(original) and all(torch.equal(mine[key], original[key]) for key in mine)
    dtype = {"hidden_dtype": condition["hidden_dtype"]} if "hidden_dtype" in condition else {}
    got, wanted = ours(x, *(c for c in condition.values() if isinstance(c, torch.Tensor)), **dtype), theirs(x, **condition)
    assert type(got) is type(wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_refused_diffusers(diffusers_normalization):
    with pytest.raises(ValueError, match="from_diffusers: layer wants a diffusers"):
        AdaLayerNorm.from_diffusers(torch.nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"from_diffusers: layer wants a layer with an nn.LayerNorm, got FP32LayerNorm"):
        AdaLayerNorm.from_diffusers(diffusers_normalization.AdaLayerNormZero(4, norm_type="fp32_layer_norm"))
