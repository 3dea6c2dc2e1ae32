"""The module against the published package, live."""

import pytest
import torch

from fastdiff import nn
from fastdiff.ops.fourier_cross_attend import reference


@pytest.mark.parametrize(("axis", "grid"), [(2, (9, 20)), (3, (3, 4, 5))])
def test_reads_as_perceiver_pytorch(perceiver_pytorch, axis, grid):
    theirs = perceiver_pytorch.Perceiver(
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


@pytest.mark.parametrize("widths", [{}, {"qk_channels": 12, "v_channels": 24}], ids=["features' own", "q, k 12, v 24"])
@pytest.mark.parametrize("grid", [(9, 20), (3, 4, 5)], ids=str)
def test_reads_as_transformers(transformers_perceiver, same, grid, widths):
    package = transformers_perceiver
    config = package.PerceiverConfig(num_latents=6, d_latents=24, num_self_attends_per_block=1, num_self_attention_heads=3,
                                     num_cross_attention_heads=1, **widths)
    positions = dict(num_bands=4, max_resolution=[2 * n for n in grid])
    theirs = package.PerceiverModel(config, input_preprocessor=package.PerceiverImagePreprocessor(
        config, prep_type="pixels", spatial_downsample=1, fourier_position_encoding_kwargs=positions)).double().eval()
    pixels = torch.randn(2, 3, *grid, dtype=torch.float64)
    features, _, _ = theirs.input_preprocessor(pixels if len(grid) == 2 else pixels.transpose(1, 2))
    # Theirs are of float32 places: these are exact.
    exact = reference.features(pixels, 4, positions["max_resolution"], "kind")
    torch.testing.assert_close(features, exact, rtol=0, atol=1e-5)
    names = {"query": "self.query", "key": "self.key", "value": "self.value", "out": "output.dense", "target_norm": "self.layernorm1",
             "source_norm": "self.layernorm2"}
    parameters = {f"{mine}.{part}": lambda m, path=f"encoder.cross_attention.attention.{there}.{part}": m.get_parameter(path).grad
                  for mine, there in names.items() for part in ("weight", "bias")}

    def read(m, latents, pixels):
        return m.encoder.cross_attention.attention(latents, inputs=reference.features(pixels, 4, positions["max_resolution"], "kind"))[0]

    same(nn.FourierCrossAttention.from_transformers, theirs, read, (torch.randn(2, 6, 24), pixels), parameters)


def test_loads_a_whole_classifier(transformers_perceiver, config):
    theirs = transformers_perceiver.PerceiverForImageClassificationFourier(config).eval()
    mine = nn.FourierCrossAttention.from_transformers(theirs)
    latents, pixels = torch.randn(1, 6, 24), torch.randn(1, 3, 12, 10)
    features, _, _ = theirs.perceiver.input_preprocessor(pixels)
    wanted = theirs.perceiver.encoder.cross_attention.attention(latents, inputs=features)[0]
    torch.testing.assert_close(mine(latents, pixels), wanted, rtol=1e-4, atol=1e-4)


def test_refusals(transformers_perceiver, config, perceiver_pytorch):
    package, load = transformers_perceiver, nn.FourierCrossAttention.from_transformers
    with pytest.raises(ValueError, match=r"got dropout 0\.1 in training mode"):
        load(package.PerceiverForImageClassificationFourier(config).train())
    with pytest.raises(ValueError, match="its input preprocessor is a NoneType, not a PerceiverImagePreprocessor"):
        load(package.PerceiverModel(config))
    positions = dict(num_bands=4, max_resolution=[8, 8])
    for option, value, why in (("prep_type", "conv1x1", "prep_type='conv1x1', not 'pixels'"),
                               ("concat_or_add_pos", "add", "concat_or_add_pos='add', not 'concat'"),
                               ("spatial_downsample", 2, "spatial_downsample=2, not 1"),
                               ("project_pos_dim", 5, "its positions are no sines")):
        options = dict(prep_type="pixels", spatial_downsample=1, out_channels=18) | {option: value}
        model = package.PerceiverModel(config, input_preprocessor=package.PerceiverImagePreprocessor(
            config, fourier_position_encoding_kwargs=positions, **options))
        with pytest.raises(ValueError, match=why):
            load(model.eval())
    theirs = perceiver_pytorch.Perceiver(num_freq_bands=4, depth=2, max_freq=10, inverted_cross_attn=(False, True))
    assert nn.FourierCrossAttention.from_perceiver_pytorch(theirs, 0)
    with pytest.raises(ValueError, match="layer wants a softmax over the pixels, got 1"):
        nn.FourierCrossAttention.from_perceiver_pytorch(theirs, 1)
    with pytest.raises(ValueError, match="fourier_encode_data=False"):
        nn.FourierCrossAttention.from_perceiver_pytorch(perceiver_pytorch.Perceiver(num_freq_bands=4, depth=1, max_freq=10,
                                                                                    fourier_encode_data=False))


def test_without_norm_or_bias():
    made = nn.FourierCrossAttention(8, 3, bands=2, max_freq=6.0, bias=False, norm=False, residual=False, heads=1)
    assert set(made.state_dict()) == {"query.weight", "key.weight", "value.weight", "out.weight"}
    assert made(torch.randn(1, 4, 8), torch.randn(1, 3, 5, 7)).shape == (1, 4, 8)
