"""What is peculiar to patch_embed and unpatch_project: they are the ops they are composed of, and convolutions with a stride."""

import pytest
import torch
import torch.nn.functional as F

from fastdiff.ops import linear, patch_embed, patchify, unpatch_project, unpatchify

SIZES = [((2, 3, 24, 20), (8, 5)), ((1, 4, 18), (3,)), ((2, 1, 4, 6, 8), (2, 3, 4)), ((1, 2, 64, 96), (2, 2))]


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("order", ["pqc", "cpq"])
@pytest.mark.parametrize("shape, patch", SIZES)
def test_patches_and_linear(shape, patch, order):
    x = draw(*shape)
    patches = patchify(x, patch, order=order)
    weight, bias, position = draw(37, patches.shape[2]), draw(37), draw(patches.shape[1], 37)
    y = patch_embed(x, weight, bias, position, patch=patch, order=order)
    torch.testing.assert_close(y, linear(patches, weight, bias) + position, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["pqc", "cpq"])
@pytest.mark.parametrize("shape, patch", SIZES)
def test_linear_and_image(shape, patch, order):
    grid = tuple(size // p for size, p in zip(shape[2:], patch, strict=True))
    N, K = patchify(draw(*shape), patch).shape[1:]
    tokens, weight, bias = draw(shape[0], N, 300), draw(K, 300), draw(K)
    image = unpatch_project(tokens, weight, bias, patch=patch, grid=grid, order=order)
    torch.testing.assert_close(image, unpatchify(linear(tokens, weight, bias), patch, grid, order=order), rtol=1e-4, atol=1e-4)


def test_convolution_with_a_stride():
    x, weight, bias = draw(2, 3, 32, 48), draw(300, 3, 16, 16), draw(300)
    y = patch_embed(x, weight.flatten(1), bias, patch=16, order="cpq")
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, stride=16).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_channels_last():
    x, weight = draw(2, 3, 32, 48), draw(64, 192)
    y = patch_embed(x.to(memory_format=torch.channels_last), weight, patch=8)
    assert torch.equal(y, patch_embed(x, weight, patch=8))


@pytest.mark.parametrize("change, message", [
    (dict(patch=5), "patch wants divisors"), (dict(weight=draw(8, 11)), "weight wants"),
    (dict(position=draw(5, 8)), "position wants N = 6")])
def test_refusals(change, message):
    given = dict(x=draw(1, 3, 8, 12), weight=draw(8, 48), position=draw(6, 8), patch=4)
    patch_embed(**given)
    with pytest.raises(ValueError, match=f"patch_embed: {message}"):
        patch_embed(**given | change)


def test_refusals_of_the_other_way():
    tokens, weight = draw(1, 6, 8), draw(48, 8)
    with pytest.raises(ValueError, match="unpatch_project: grid wants a product of N = 6"):
        unpatch_project(tokens, weight, patch=4, grid=(2, 2))
    with pytest.raises(ValueError, match="unpatch_project: patch wants a product that divides"):
        unpatch_project(tokens, weight, patch=5, grid=(2, 3))
