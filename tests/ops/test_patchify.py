"""What is peculiar to space_to_depth and depth_to_space: they are torch's pixel shuffles, and patchify's tokens as an image."""

import pytest
import torch
import torch.nn.functional as F

from fastdiff.ops import depth_to_space, patchify, space_to_depth


@pytest.fixture
def image():
    return torch.randn(2, 5, 120, 480, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("patch", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixel_shuffle(image, patch, layout):
    x = image.to(memory_format=layout)
    depth = space_to_depth(x, patch, order="cpq")
    assert torch.equal(depth, F.pixel_unshuffle(image, patch))
    assert torch.equal(depth_to_space(depth.to(memory_format=layout), patch, order="cpq"), image)


@pytest.mark.parametrize("order", ["pqc", "cpq"])
@pytest.mark.parametrize("patch", [(2, 3), (4, 2), (6, 8)])
def test_tokens_as_an_image(image, patch, order):
    depth = space_to_depth(image, patch, order=order)
    assert torch.equal(depth.flatten(2).transpose(1, 2), patchify(image, patch, order=order))
    assert torch.equal(depth_to_space(depth, patch, order=order), image)


def test_refusals(image):
    with pytest.raises(ValueError, match="space_to_depth: patch wants divisors"):
        space_to_depth(image, 7)
    with pytest.raises(ValueError, match="depth_to_space: patch wants a product that divides the 5 channels"):
        depth_to_space(image, 2)
