"""Sizes, inputs, work and benchmark shapes of the sampling ops."""

from math import prod

from ...core.case import Array, Case, Dim, OneOf

_SIZES = dict(B=Dim(0, 4), C=Dim(0, 6), h=Dim(0, 60), w=Dim(0, 60), form=OneOf("image", "tokens", "vector"))
_SHAPES = {"1x3x64x64": (1, 3, 64, 64), "32x3x64x64": (32, 3, 64, 64), "8x3x256x256": (8, 3, 256, 256),
           "32x4x64x64 latents": (32, 4, 64, 64)}
_BENCH = {name: dict(zip("BChw", shape, strict=True)) for name, shape in _SHAPES.items()}
_LEARNED = {f"{name}, learned variance": dims | dict(noise="learned", clip=1.0) for name, dims in _BENCH.items()}


def _shape(B, C, h, w, form):
    return {"image": (B, C, h, w), "tokens": (B, h, C), "vector": (B, C)}[form]


def _per_sample(B, *within):
    return Array((B,), dtype="float32", within=within or None, number=True)


def _add_noise(B, **sizes):
    x, c = Array(_shape(B, **sizes)), _per_sample(B)
    return dict(x=x, noise=x, signal=c, sigma=c)


def _guide(B, rescale, **sizes):
    x = Array(_shape(B, **sizes))
    return dict(cond=x, uncond=x, weight=_per_sample(B, 0.5, 8.0), rescale=rescale)


def _denoise_step(B, prediction, clip, noise, rederive, **sizes):
    x, c, level = Array(_shape(B, **sizes)), _per_sample(B), _per_sample(B, 0.1, 1.0)
    given = dict(x=x, pred=x, signal=level, sigma=level, to_x0=c, to_eps=c, prediction=prediction, clip=clip, rederive=rederive,
                 variance_0=None, variance_1=None)
    if noise != "none":
        given |= dict(to_noise=c, noise=x)
    if noise == "learned":
        given |= dict(variance_0=Array(x.shape, within=(-1.0, 1.0)), variance_1=Array((B,), dtype="float32", within=(0.0, 3.0)))
    return given


def _images(count):
    """Bytes of `count` arrays of the image's size."""
    return lambda size, **given: count(given) * size * prod(next(iter(given.values())).shape)


_STEP = dict(prediction=OneOf("eps", "x0", "v"), clip=OneOf(None, 1.0, 0.3), noise=OneOf("none", "fixed", "learned"),
             rederive=OneOf(True, False))
_STEP_BATCHED = ("x", "pred", "signal", "sigma", "to_x0", "to_eps", "to_noise", "noise", "variance_0", "variance_1")
CASES = {
    "add_noise": Case(dims=_SIZES, arguments=_add_noise, batched=("x", "noise", "signal", "sigma"), bench=_BENCH,
                      flops=lambda x, **_: 3 * prod(x.shape), bytes=_images(lambda given: 3)),
    "guide": Case(dims=_SIZES | dict(rescale=OneOf(0.0, 0.7)), arguments=_guide, batched=("cond", "uncond", "weight"),
                  bench=_BENCH | {f"{name}, rescaled": dims | dict(rescale=0.7) for name, dims in _BENCH.items()},
                  flops=lambda cond, **_: 3 * prod(cond.shape), bytes=_images(lambda given: 3)),
    **{name: Case(dims=_SIZES | _STEP, arguments=_denoise_step, batched=_STEP_BATCHED, gather=("variance",), bench=_BENCH | _LEARNED,
                  flops=lambda x, **_: 8 * prod(x.shape),
                  bytes=_images(lambda given, wrote=wrote: 2 + wrote + ("noise" in given) + (given["variance_0"] is not None)))
       for name, wrote in (("denoise_step", 1), ("denoise_step_with_x0", 2))}}
