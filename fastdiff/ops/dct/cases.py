"""Sizes, inputs, work and benchmark shapes of the frequency ops."""

from math import log2, prod

from ...core.case import Array, Case, Dim, OneOf

_SIZES = dict(B=Dim(0, 3), C=Dim(0, 4), h=Dim(0, 70), w=Dim(0, 70))
_SHAPES = {
    "128x3x32x32": (128, 3, 32, 32), "64x3x64x64": (64, 3, 64, 64), "32x3x128x128": (32, 3, 128, 128), "8x3x256x256": (8, 3, 256, 256),
    "1x3x1024x1024": (1, 3, 1024, 1024), "128x1x28x28": (128, 1, 28, 28), "16x3x100x217": (16, 3, 100, 217)}
_BENCH = {name: dict(zip("BChw", shape, strict=True)) for name, shape in _SHAPES.items()}


def _gain(name, B, C, h, w):
    return {"frequency": (h, w), "sample": (B, 1, h, w), "channel": (C, 1, 1), "all": (B, C, h, w), "one": ()}[name]


def _transform(B, C, h, w, dims):
    return dict(x=Array((B, C, h, w)), dims=dims)


def _frequency_gain(B, C, h, w, gain, dims):
    return dict(x=Array((B, C, h, w)), gain=Array(_gain(gain, B, C, h, w)), dims=dims)


def _blur(B, C, h, w, floor):
    return dict(x=Array((B, C, h, w)), width=Array((B,), dtype="float32"), floor=floor)


def _blur_diffuse(B, C, h, w, floor):
    x, scalar = Array((B, C, h, w)), Array((B,), dtype="float32")
    return dict(x=x, noise=x, signal=scalar, sigma=scalar, width=scalar, floor=floor)


def _blur_denoise(B, C, h, w, gain):
    x, gain = Array((B, C, h, w)), Array(_gain(gain, B, C, h, w))
    return dict(z=x, eps=x, noise=x, gain_z=gain, gain_eps=gain, gain_noise=gain)


def _case(arguments, batched, transforms, images, linear=False, **dims):
    """transforms, images: how many transforms are computed, and how many arrays of the image's size are read or written."""

    def flops(**given):
        *_, h, w = given[batched[0]].shape
        # 2.5 n log2 n of the best fast transforms of n real elements, along each of two axes.
        return transforms * int(2.5 * prod(given[batched[0]].shape) * log2(max(2, h * w)))

    return Case(dims=_SIZES | dims, arguments=arguments, flops=flops, batched=batched, linear=linear, bench=_BENCH,
                any_rank=("x",) if "dims" in dims else (),
                bytes=lambda size, **given: images * size * prod(given[batched[0]].shape))


_DIMS, _FLOOR = OneOf(2, 1), OneOf(0.0, 1e-3, 0.25)
_GAINS = OneOf("frequency", "sample", "channel", "all", "one")
CASES = {
    "dct": _case(_transform, ("x",), 1, 2, linear=True, dims=_DIMS),
    "idct": _case(_transform, ("x",), 1, 2, linear=True, dims=_DIMS),
    "frequency_gain": _case(_frequency_gain, ("x",), 2, 2, gain=_GAINS, dims=_DIMS),
    "blur": _case(_blur, ("x", "width"), 2, 2, floor=_FLOOR),
    "blur_diffuse": _case(_blur_diffuse, ("x", "noise", "signal", "sigma", "width"), 2, 3, floor=_FLOOR),
    "blur_denoise": _case(_blur_denoise, ("z", "eps", "noise"), 3, 4, gain=_GAINS)}
