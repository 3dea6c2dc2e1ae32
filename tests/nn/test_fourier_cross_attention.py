"""The module against the published package, live."""

import pytest
import torch

from fastdiff import nn


@pytest.mark.parametrize(("axis", "grid"), [(2, (9, 20)), (3, (3, 4, 5))])
def test_reads_as_perceiver_pytorch(axis, grid):
    theirs = pytest.importorskip("perceiver_pytorch", reason="perceiver-pytorch is not installed").Perceiver(
        num_freq_bands=4, depth=1, max_freq=10, input_axis=axis, num_latents=6, latent_dim=24, cross_dim_head=16, cross_heads=2).double()
    latents, pixels = torch.randn(2, 6, 24, dtype=torch.float64), torch.randn(2, *grid, 3, dtype=torch.float64)
    kept = {}
    read = theirs.layers[0].cross_attn
    read.register_forward_hook(lambda m, args, kwargs, out: kept.update(context=kwargs["context"]), with_kwargs=True)
    theirs(pixels)
    mine = nn.FourierCrossAttention.from_perceiver_pytorch(theirs)
    wanted = latents + read(latents, context=kept["context"])
    torch.testing.assert_close(mine(latents, pixels.movedim(-1, 1)), wanted, rtol=1e-10, atol=1e-10)
    assert set(mine.state_dict()) == {"query.weight", "key.weight", "value.weight", "out.weight", "out.bias", "target_norm.weight",
                                      "target_norm.bias", "source_norm.weight", "source_norm.bias"}


def test_without_norm_or_bias():
    made = nn.FourierCrossAttention(8, 3, bands=2, max_freq=6.0, bias=False, norm=False, residual=False, heads=1)
    assert set(made.state_dict()) == {"query.weight", "key.weight", "value.weight", "out.weight"}
    assert made(torch.randn(1, 4, 8), torch.randn(1, 3, 5, 7)).shape == (1, 4, 8)
