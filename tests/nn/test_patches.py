"""PatchEmbed and Unpatch against a convolution and a linear layer with the attributes of timm's, diffusers' and DiT's modules, and against
these; PatchedUNet around small convolutional nets."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdiff.nn import PatchedUNet, PatchEmbed, Unpatch


class StandIn(nn.Module):
    """What the loaders read of timm's and diffusers' PatchEmbed, and its output."""

    def __init__(self, norm, bias=True, position=None, **convolution):
        super().__init__()
        self.proj, self.flatten, self.norm = nn.Conv2d(3, 40, 4, **dict(stride=4) | convolution, bias=bias), True, norm
        if position is not None:
            self.register_buffer("pos_embed", position)

    def forward(self, x):
        y = self.proj(x).flatten(2).transpose(1, 2)
        return y + self.pos_embed if hasattr(self, "pos_embed") else y


@pytest.fixture
def image():
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
def test_from_timm(image, bias):
    theirs = StandIn(nn.Identity(), bias)
    ours = PatchEmbed.from_timm(theirs)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)
    ours.load_state_dict(theirs.state_dict())


def test_from_diffusers(image):
    theirs = StandIn(None, position=torch.randn(1, 24, 40))
    ours = PatchEmbed.from_diffusers(theirs)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with pytest.raises(ValueError, match="position wants N = 12"):
        ours(image[..., :12])


def test_from_dit(image):
    theirs = SimpleNamespace(x_embedder=StandIn(nn.Identity()), pos_embed=nn.Parameter(torch.randn(1, 24, 40), requires_grad=False))
    torch.testing.assert_close(PatchEmbed.from_dit(theirs)(image), theirs.x_embedder(image) + theirs.pos_embed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"patch_size": (4, 8)}], ids=str)
def test_timm(timm_patch_embed, options):
    theirs = timm_patch_embed(**dict(img_size=(16, 24), patch_size=4, embed_dim=40) | options).double()
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    ours = PatchEmbed.from_timm(theirs)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    ours.load_state_dict(theirs.state_dict())


def test_refused_timm(timm_patch_embed):
    for options in (dict(flatten=False), dict(output_fmt="NHWC"), dict(norm_layer=nn.LayerNorm), dict(dynamic_img_pad=True)):
        with pytest.raises(ValueError, match="from_timm: module wants flattened tokens"):
            PatchEmbed.from_timm(timm_patch_embed(img_size=16, patch_size=4, embed_dim=8, **options))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"pos_embed_type": None}, {"interpolation_scale": 2}], ids=str)
def test_diffusers(diffusers_patch_embed, options):
    theirs = diffusers_patch_embed(height=16, width=16, patch_size=4, embed_dim=40, **options).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(PatchEmbed.from_diffusers(theirs)(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_refused_diffusers(diffusers_patch_embed):
    for options in (dict(flatten=False), dict(layer_norm=True), dict(pos_embed_max_size=8)):
        with pytest.raises(ValueError, match="from_diffusers: module wants flattened tokens"):
            PatchEmbed.from_diffusers(diffusers_patch_embed(height=16, width=16, patch_size=4, embed_dim=8, **options))


def test_gradients_of_a_convolution(image):
    theirs = StandIn(nn.Identity())
    ours = PatchEmbed.from_timm(theirs)
    for module in (ours, theirs):
        module(image).square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="from_timm: module wants a projection with"):
        PatchEmbed.from_timm(StandIn(nn.Identity(), stride=2))
    with pytest.raises(ValueError, match="from_timm: module wants flattened tokens"):
        PatchEmbed.from_timm(StandIn(nn.LayerNorm(40)))
    with pytest.raises(ValueError, match="from_diffusers: module wants flattened tokens"):
        PatchEmbed.from_diffusers(StandIn(nn.LayerNorm(40)))
    with pytest.raises(ValueError, match="from_linear: patch wants a product that divides 16"):
        Unpatch.from_linear(nn.Linear(8, 16), 3)


def test_unpatch_is_the_end_of_a_dit():
    final = SimpleNamespace(linear=nn.Linear(48, 2 * 2 * 8))
    tokens = torch.randn(2, 15, 48)
    image = final.linear(tokens).reshape(2, 3, 5, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(2, 8, 6, 10)
    torch.testing.assert_close(Unpatch.from_linear(final.linear, 2)(tokens, (3, 5)), image, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes, patch", [(1, 4), (3, (1, 2, 4))])
def test_axes(axes, patch):
    module = PatchEmbed(3, 10, patch, axes=axes)
    x = torch.randn(1, 3, *(8,) * axes)
    torch.testing.assert_close(module(x), module.proj(x).flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


class ConvNet(nn.Module):
    """A denoiser of (x, t): two convolutions, and t in every channel between them."""

    def __init__(self, channels, out):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 10, 3, padding=1), nn.Conv2d(10, out, 3, padding=1)

    def forward(self, x, t, *, scale=1.0):
        return self.last(torch.tanh(self.first(x) + scale * t.view(-1, 1, 1, 1)))


def _patched_by_hand(unet, x, t, p, order, heads=1, **options):
    """Channel (row * p + column) * C + c, or c * p * p + row * p + column, one by one."""
    C = x.shape[1]
    at = (lambda i, j, c, C: (i * p + j) * C + c) if order == "pqc" else (lambda i, j, c, C: (c * p + i) * p + j)
    small = torch.empty(x.shape[0], p * p * C, x.shape[2] // p, x.shape[3] // p, dtype=x.dtype)
    for i in range(p):
        for j in range(p):
            for c in range(C):
                small[:, at(i, j, c, C)] = x[:, c, i::p, j::p]
    y = unet(small, t, **options)
    width = y.shape[1] // (p * p * heads)
    image = torch.empty(x.shape[0], heads * width, *x.shape[2:], dtype=x.dtype)
    for head in range(heads):
        for i in range(p):
            for j in range(p):
                for c in range(width):
                    image[:, head * width + c, i::p, j::p] = y[:, head * width * p * p + at(i, j, c, width)]
    return image


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels-last"])
@pytest.mark.parametrize("order", ["pqc", "cpq"])
@pytest.mark.parametrize("patch, heads", [(1, 1), (2, 1), (4, 2)])
def test_patched_unet(layout, order, patch, heads):
    torch.manual_seed(0)
    unet = ConvNet(3 * patch ** 2, 3 * heads * patch ** 2).double().to(memory_format=layout)
    model, t = PatchedUNet(unet, patch, order=order, heads=heads), torch.tensor([0.2, 0.7], dtype=torch.float64)
    x = torch.randn(2, 3, 8, 16, dtype=torch.float64).to(memory_format=layout)
    sides = []
    for run in (model, lambda x, t, **options: _patched_by_hand(unet, x, t, patch, order, heads, **options)):
        given = x.clone().requires_grad_()
        out = run(given, t, scale=0.5)
        assert out.shape == (2, 3 * heads, 8, 16)
        sides.append([out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum(),
                                                [given, *unet.parameters()])])
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert model.state_dict().keys() == {f"unet.{name}" for name in unet.state_dict()}


def test_patched_unet_of_a_tuple():
    class Two(nn.Module):
        def forward(self, x):
            return x, torch.cat((x, 2 * x), 1)

    x = torch.randn(2, 3, 8, 8)
    same, both = PatchedUNet(Two(), (4, 2), order="cpq")(x)
    assert torch.equal(same, x) and torch.equal(both, torch.cat((x, 2 * x), 1))


def test_patched_unet_refuses():
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="patch wants divisors of the image size"):
        PatchedUNet(nn.Identity(), 3)(x)
    with pytest.raises(ValueError, match="heads wants a divisor of the unet's 12 channels, got 5"):
        PatchedUNet(nn.Identity(), 2, heads=5)(x)
    with pytest.raises(ValueError, match="heads wants an int of at least 1, got 0"):
        PatchedUNet(nn.Identity(), 2, heads=0)
    with pytest.raises(TypeError, match="gave a dict"):
        PatchedUNet(type("Net", (nn.Module,), {"forward": lambda self, x: {"sample": x}})(), 2)(x)
