"""Sinusoids, their perceptron, and labels with a null label."""

import math

import pytest
import torch

from fastdiff.nn import LabelEmbedding, TimestepEmbedding, sinusoid


@pytest.mark.parametrize(("options", "places", "last"), [({}, "cs", 4), (dict(order="sin cos", last=True), "sc", 3)])
def test_sinusoid(options, places, last):
    got = sinusoid(torch.tensor([0, 3.5, 999]), 8, **options)
    waves = {"c": math.cos, "s": math.sin}
    want = [[waves[place](t * 10000 ** (-k / last)) for place in places for k in range(4)] for t in (0, 3.5, 999)]
    assert got.dtype is torch.float64
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timestep_embedding(dtype):
    made, t = TimestepEmbedding(16, 8, width=12).to(dtype), torch.tensor([1, 700])
    out = made(t)
    assert out.dtype is dtype and out.shape == (2, 8)
    torch.testing.assert_close(out, made.mlp(sinusoid(t, 16).to(dtype)))
    assert {name: tuple(p.shape) for name, p in made.named_parameters()} == {
        "mlp.0.weight": (12, 16), "mlp.0.bias": (12,), "mlp.2.weight": (8, 12), "mlp.2.bias": (8,)}


def test_labels_are_dropped_in_training_alone():
    made, labels = LabelEmbedding(5, 3, dropout=0.4), torch.arange(5).repeat(400)
    table = made.embedding_table.weight
    assert table.shape == (6, 3)
    torch.testing.assert_close(made.eval()(labels), table[labels])
    torch.manual_seed(0)
    out = made.train()(labels)
    dropped = (out == table[5]).all(1)
    torch.testing.assert_close(out[~dropped], table[labels[~dropped]])
    assert 0.36 < dropped.float().mean() < 0.44
    drop = labels == 2
    torch.testing.assert_close(made(labels, drop), table[torch.where(drop, 5, labels)])


def test_refusals():
    with pytest.raises(ValueError, match="sinusoid: dim wants an even number, got 7"):
        sinusoid(torch.zeros(1), 7)
    with pytest.raises(ValueError, match=r"sinusoid: order wants 'cos sin' or 'sin cos', got 'sincos'"):
        sinusoid(torch.zeros(1), 8, order="sincos")
    made = LabelEmbedding(5, 3)
    assert made.embedding_table.weight.shape == (5, 3)
    with pytest.raises(ValueError, match="LabelEmbedding: dropout wants to be above 0 for a null label, got 0"):
        made(torch.tensor([0]), drop=torch.tensor([True]))


@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 1)])
def test_timesteps_from_diffusers(diffusers_embeddings, flip, shift):
    timesteps, theirs = diffusers_embeddings.Timesteps(16, flip, shift), diffusers_embeddings.TimestepEmbedding(16, 24, out_dim=8)
    ours, t = TimestepEmbedding.from_diffusers(timesteps, theirs), torch.tensor([0, 7, 999])
    assert [*map(torch.Tensor.tolist, ours.state_dict().values())] == [*map(torch.Tensor.tolist, theirs.state_dict().values())]
    torch.testing.assert_close(ours(t), theirs(timesteps(t)), rtol=1e-4, atol=1e-4)


def test_refused_timesteps(diffusers_embeddings):
    timesteps, layer = diffusers_embeddings.Timesteps(16, True, 0), diffusers_embeddings.TimestepEmbedding(16, 24)
    with pytest.raises(ValueError, match="timesteps wants downscale_freq_shift 0 or 1 and scale 1, got 0 and 1000"):
        TimestepEmbedding.from_diffusers(diffusers_embeddings.Timesteps(16, True, 0, scale=1000), layer)
    with pytest.raises(ValueError, match="layer wants two linear layers with biases and silu between them"):
        TimestepEmbedding.from_diffusers(timesteps, diffusers_embeddings.TimestepEmbedding(16, 24, act_fn="gelu"))


def test_labels_from_diffusers(diffusers_embeddings):
    theirs, labels = diffusers_embeddings.LabelEmbedding(5, 3, 0.1), torch.arange(6)
    ours = LabelEmbedding.from_diffusers(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and ours.dropout == 0.1
    assert torch.equal(ours.eval()(labels), theirs.eval()(labels))
