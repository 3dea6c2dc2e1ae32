"""Orthonormal cosine transforms of images, gains on their frequencies, and the steps of a blurring diffusion made of these."""

from dataclasses import replace

import torch

from ...core.backend import cpu, cuda
from ...core.backend import triton as on_triton
from ...core.check import dims as check_dims
from ...core.check import fail, tensor
from ...core.contract import contract, into
from . import reference, triton


def _like(x):
    return x.new_empty(x.shape)


SQUARES = (16, 32, 64, 128)


def _cuda(name, dims):
    """The CUDA kernel of a contract; dims(args): how many axes it transforms."""

    def refuse(x, *args):
        if dims(args) != 2 or not 2 <= x.dim() <= 4 or x.shape[-1] != x.shape[-2] or x.shape[-1] not in SQUARES:
            sides = ", ".join(map(str, SQUARES))
            return f"takes planes of {sides} elements a side in at most 4-D, got {tuple(x.shape)} with dims = {dims(args)}"
        return None

    return cuda(name, refuse=refuse, plan=lambda *_: "whole planes in shared memory, a row or a column in a thread's registers")


def _cuda_blur():
    """The kernel takes the factors of the gain."""
    kernel = _cuda("separable_gain", lambda args: 2)
    return replace(kernel, run=lambda args, outs: kernel.run((args[0], *reference.blur_factors(*args[:4]), *args[4:]), outs))


DCT = contract("dct(Tensor x, int dims, bool inverse) -> Tensor", outputs=lambda x, *_: _like(x), reference=reference.dct,
               backends=(_cuda("dct", lambda args: args[0]), triton.DCT, cpu("dct")), module=__name__,
               entries=("dct_eager",))
# IDCT(gain DCT(x) + gain_eps DCT(eps) + gain_noise noise); gains in float32 (float64 beside float64), broadcast to x, whole along its axes.
MIX = contract("frequency_mix(Tensor x, Tensor gain, Tensor? eps, Tensor? gain_eps, Tensor? noise, Tensor? gain_noise, int dims) -> Tensor",
               outputs=lambda x, *_: _like(x), reference=reference.frequency_mix, module=__name__,
               backends=(_cuda("frequency_mix", lambda args: args[-1]), triton.MIX, cpu("frequency_mix")), entries=("frequency_mix_eager",))
# signal IDCT(((1 - floor) exp(-lambda width^2 / 2) + floor) DCT(x)) + sigma noise, per sample.
BLUR = contract("blur_diffuse(Tensor x, Tensor width, Tensor? signal, float floor, Tensor? noise, Tensor? sigma) -> Tensor",
                outputs=lambda x, *_: _like(x), reference=reference.blur_diffuse, module=__name__,
                backends=(_cuda_blur(), triton.BLUR, cpu("blur_diffuse")), entries=("blur_diffuse_eager",))


def _wide(x):
    return x if x.dtype is torch.float64 else x.float()


def _gained(x, gain, dims):
    return MIX(x, gain, None, None, None, None, dims)


def _alike(op, dy, x):
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device:
        fail(op, f"dy wants {tuple(x.shape)} of {x.dtype} on {x.device}, as x, got {tuple(dy.shape)} of {dy.dtype} on {dy.device}")


def _mix_gradients(dy, x, gain, dims):
    _alike("frequency_mix_backward", dy, x)
    return _like(x), x.new_empty(x.shape, dtype=gain.dtype)


def _blur_gradients(dy, x, width, signal, floor):
    _alike("blur_diffuse_backward", dy, x)
    return _like(x), width.new_empty(width.shape), width.new_empty(width.shape)


def _run_mix_backward(args, outs):
    dy, x, gain, dims = args
    into("frequency_mix", outs[:1], dy, gain, None, None, None, None, dims)
    torch.mul(_wide(DCT(dy, dims, False)), DCT(x, dims, False), out=outs[1])


def _run_blur_backward(args, outs):
    dy, x, width, signal, floor = args
    into("blur_diffuse", outs[:1], dy, width, signal, floor, None, None)
    product = _wide(DCT(dy, 2, False)) * DCT(x, 2, False)
    for out, gradient in zip(outs[1:], reference.blur_gradients(product, width, signal, floor), strict=True):
        out.copy_(gradient)


# IDCT(gain DCT(dy)), and the gain's gradient: before it is summed to its shape, DCT(dy) DCT(x) in its dtype; a blur's in width and signal.
# On a GPU composed of the kernels above.
MIX_BACKWARD = contract("frequency_mix_backward(Tensor dy, Tensor x, Tensor gain, int dims) -> (Tensor, Tensor)", outputs=_mix_gradients,
                        reference=reference.frequency_mix_backward, backends=(on_triton(_run_mix_backward), cpu("frequency_mix_backward")),
                        module=__name__)
BLUR_BACKWARD = contract("blur_diffuse_backward(Tensor dy, Tensor x, Tensor width, Tensor? signal, float floor)"
                         " -> (Tensor, Tensor, Tensor)", outputs=_blur_gradients, reference=reference.blur_diffuse_backward,
                         backends=(on_triton(_run_blur_backward), cpu("blur_diffuse_backward")), module=__name__)


# The transform is orthogonal: its transpose is its inverse.
DCT.autograd(save=lambda ctx, args, outs: (),
             backward=lambda ctx, dy: (None if dy is None else DCT(dy, ctx.args[1], not ctx.args[2]), None, None),
             jvp=lambda ctx, dx, *_: DCT(dx, *ctx.args[1:]))


def _mix_backward(ctx, dy):
    if dy is None:
        return (None,) * 7
    (x, gain, eps, gain_eps, noise, gain_noise), dims, wants = ctx.saved_tensors, ctx.args[6], ctx.wants

    def gradients(u, gain, wanted):
        if wanted[1]:
            du, product = MIX_BACKWARD(dy, u, gain, dims)
            return du, product.sum_to_size(gain.shape)
        return _gained(dy, gain, dims) if wanted[0] else None, None

    du = _wide(DCT(dy, dims, False)) if wants[4] or wants[5] else None
    return (*gradients(x, gain, wants[:2]), *gradients(eps, gain_eps, wants[2:4]), (gain_noise * du).to(dy.dtype) if wants[4] else None,
            (noise * du).sum_to_size(gain_noise.shape) if wants[5] else None, None)


def _mix_jvp(ctx, dx, dgain, deps, dgain_eps, dnoise, dgain_noise, _):
    (x, gain, eps, gain_eps, noise, gain_noise), dims = ctx.saved_tensors, ctx.args[6]
    rows = ((x, gain, dx, dgain), (eps, gain_eps, deps, dgain_eps))
    parts = [_gained(a, b, dims) for u, g, du, dg in rows for a, b in ((du, g), (u, dg)) if a is not None and b is not None]
    pairs = ((gain_noise, dnoise), (dgain_noise, noise))
    parts += [DCT((a * b).to(x.dtype), dims, True) for a, b in pairs if a is not None and b is not None]
    return sum(parts[1:], parts[0])


MIX.autograd(save=lambda ctx, args, outs: args[:6], backward=_mix_backward, jvp=_mix_jvp)


def _blur_backward(ctx, dy):
    if dy is None:
        return (None,) * 6
    (x, width, signal, noise, sigma), floor, wants = ctx.saved_tensors, ctx.args[3], ctx.wants
    if wants[1] or wants[2]:
        dx, dwidth, dsignal = BLUR_BACKWARD(dy, x, width, signal, floor)
    else:
        dx, dwidth, dsignal = BLUR(dy, width, signal, floor, None, None) if wants[0] else None, None, None
    return (dx, dwidth, None if signal is None else dsignal, None, (sigma.view(-1, 1, 1, 1) * dy).to(dy.dtype) if wants[4] else None,
            (_wide(dy) * noise).sum((1, 2, 3)) if wants[5] else None)


def _blur_jvp(ctx, dx, dwidth, dsignal, _, dnoise, dsigma):
    (x, width, signal, noise, sigma), floor = ctx.saved_tensors, ctx.args[3]
    parts = [] if dx is None else [BLUR(dx, width, signal, floor, None, None)]
    parts += [] if dsignal is None else [BLUR(x, width, dsignal, floor, None, None)]
    if dwidth is not None:
        rows, columns, _ = reference.blur_factors(x, width, signal, floor)
        frequencies = [reference.frequencies(n, width).square() for n in x.shape[2:]]
        decay = rows.unsqueeze(2) * columns.unsqueeze(1) * (frequencies[0].unsqueeze(1) + frequencies[1])
        parts.append(_gained(x, (-(width * dwidth).view(-1, 1, 1) * decay).unsqueeze(1), 2))
    parts += [(a.view(-1, 1, 1, 1) * b).to(x.dtype) for a, b in ((sigma, dnoise), (dsigma, noise)) if a is not None and b is not None]
    return sum(parts[1:], parts[0])


BLUR.autograd(save=lambda ctx, args, outs: (*args[:3], *args[4:]), backward=_blur_backward, jvp=_blur_jvp)


def _lead(x, dim, rank):
    """The mapped axis first, ahead of `rank` axes: broadcasting then does the rest."""
    if x is None or dim is None:
        return x
    x = x.movedim(dim, 0)
    return x.view(x.shape[0], *(1,) * (rank + 1 - x.dim()), *x.shape[1:])


def _whole(x, dim, mapped):
    return x if x is None or dim is not None else x.unsqueeze(0).expand(mapped, *x.shape)


DCT.vmap(lambda info, in_dims, x, dims, inverse: (DCT(x.movedim(in_dims[0], 0), dims, inverse), 0))


def _mix_vmap(info, in_dims, *args):
    *tensors, dims = args
    rank = args[0].dim() - (in_dims[0] is not None)
    tensors = [_lead(x, d, rank) for x, d in zip(tensors, in_dims, strict=False)]
    for i in (0, 2, 4):
        tensors[i] = _whole(tensors[i], in_dims[i], info.batch_size)
    return MIX(*tensors, dims), 0


def _mix_backward_vmap(info, in_dims, dy, x, gain, dims):
    rank = dy.dim() - (in_dims[0] is not None)
    dy, x, gain = (_lead(u, d, rank) for u, d in zip((dy, x, gain), in_dims, strict=False))
    return MIX_BACKWARD(_whole(dy, in_dims[0], info.batch_size), _whole(x, in_dims[1], info.batch_size), gain, dims), (0, 0)


MIX.vmap(_mix_vmap)
MIX_BACKWARD.vmap(_mix_backward_vmap)
BLUR.vmap_batch()
BLUR_BACKWARD.vmap_batch()


def _axes(op, x, dims):
    if isinstance(dims, bool) or not isinstance(dims, int):
        raise TypeError(f"{op}: dims wants an int, got {dims!r}")
    if dims not in (1, 2):
        fail(op, f"dims wants 1 or 2, got {dims}")
    rank = tensor(op, "x", x).dim()
    if rank < dims:
        fail(op, f"x wants at least dims = {dims} dimensions, got {rank}: {tuple(x.shape)}")
    check_dims(op, x=(x, _layout(x)))
    return dims


def _layout(x):
    return " ".join(f"axis{i}" for i in range(x.dim()))


def _images(op, **named):
    check_dims(op, **{name: (tensor(op, name, x), "B C h w") for name, x in named.items()})


def _check_gain(op, name, gain, beside, x, dims):
    """The gain as MIX takes it, if it can be broadcast to x."""
    check_dims(op, **{beside: (x, _layout(x)), name: (tensor(op, name, gain), " ".join(f"{name}{i}" for i in range(gain.dim())))})
    short = x.dim() - gain.dim()
    if short < 0 or any(g not in (1, n) for g, n in zip(gain.shape, x.shape[short:], strict=True)):
        fail(op, f"{name} wants a shape that broadcasts to {tuple(x.shape)} of {beside}, got {tuple(gain.shape)}")
    gain = _wide(gain)
    gain = gain.view(*(1,) * (dims - gain.dim()), *gain.shape)
    return gain.expand(*gain.shape[: gain.dim() - dims], *x.shape[x.dim() - dims:])


def _check_scalars(op, x, **scalars):
    wanted = torch.float64 if x.dtype is torch.float64 else torch.float32
    for name, value in scalars.items():
        B = check_dims(op, **{name: (tensor(op, name, value), "B")})["B"]
        if B != x.shape[0]:
            fail(op, f"{name} has B = {B}, but x has B = {x.shape[0]}")
        if value.dtype is not wanted:
            fail(op, f"{name} wants {wanted} beside x of {x.dtype}, got {value.dtype}")
        if value.device != x.device:
            fail(op, f"{name} is on {value.device}, but x is on {x.device}")


def _check_floor(op, floor):
    if isinstance(floor, bool) or not isinstance(floor, int | float):
        raise TypeError(f"{op}: floor wants a float, got {floor!r}")


def _transform(op, x, dims, inverse):
    y = DCT.eager((x, dims, inverse)) if type(dims) is int else None
    return DCT(x, _axes(op, x, dims), inverse) if y is None else y


def dct(x, *, dims=2):
    """Orthonormal DCT-II along the last one or two axes: y_k = c_k sum_n x_n cos(pi (n + 1/2) k / N), c_0 = sqrt(1/N), c_k = sqrt(2/N).

    Shapes   x (..., N) with dims=1, (..., h, w) with dims=2, any strides, any lengths -> y as x, contiguous
    Dtypes   float32, float16, bfloat16, float64; computed in float32 (float64 in the reference)
    Grads    x; every order, by the inverse transform
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Plonka & Tasche 2005 (stable splitting into transforms of half the length); Yang & Narasimha 1985 (into coprime parts)
    """
    return _transform("dct", x, dims, False)


def idct(x, *, dims=2):
    """The inverse of `dct`, which is its transpose: idct(dct(x)) = x.

    Shapes   x (..., N) with dims=1, (..., h, w) with dims=2, any strides, any lengths -> y as x, contiguous
    Dtypes   float32, float16, bfloat16, float64; computed in float32 (float64 in the reference)
    Grads    x; every order, by the transform
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Plonka & Tasche 2005 (stable splitting into transforms of half the length); Yang & Narasimha 1985 (into coprime parts)
    """
    return _transform("idct", x, dims, True)


def frequency_gain(x, gain, *, dims=2):
    """y = IDCT(gain DCT(x)), along the last one or two axes.

    Shapes   x (..., N) with dims=1, (..., h, w) with dims=2, any strides; gain broadcast to x -> y as x, contiguous
    Dtypes   float32, float16, bfloat16, float64; both equal; computed in float32 (float64 in the reference)
    Grads    x, gain; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Rissanen et al. 2023, appendix A
    """
    y = MIX.eager((x, gain, None, None, None, None, dims)) if type(dims) is int else None
    if y is not None:
        return y
    dims = _axes("frequency_gain", x, dims)
    return _gained(x, _check_gain("frequency_gain", "gain", gain, "x", x, dims), dims)


def blur(x, width, *, floor=0.0):
    """The heat equation's blur: y = IDCT(g DCT(x)), g = (1 - floor) exp(-lambda width^2 / 2) + floor, lambda = pi^2 (i^2/h^2 + j^2/w^2).

    Shapes   x (B, C, h, w), any strides; width (B,) -> y as x, contiguous
    Dtypes   x float32, float16, bfloat16 with width float32; float64 with float64; computed in float32 (float64 in the reference)
    Units    width in pixels: the standard deviation of the Gaussian; edges reflect
    Grads    x, width; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Rissanen et al. 2023; floor: Hoogeboom & Salimans 2023
    """
    _check_floor("blur", floor)
    y = BLUR.eager((x, width, None, floor, None, None), required=(0, 1))
    if y is not None:
        return y
    _images("blur", x=x)
    _check_scalars("blur", x, width=width)
    return BLUR(x, width, None, floor, None, None)


def blur_diffuse(x, noise, signal, sigma, width, *, floor=1e-3):
    """z = signal blur(x, width, floor) + sigma noise: the forward process of a blurring diffusion.

    Shapes   x, noise (B, C, h, w), any strides; signal, sigma, width (B,) -> z as x, contiguous
    Dtypes   x, noise float32, float16, bfloat16 with the others float32; all float64; computed in float32 (float64 in the reference)
    Units    width in pixels; sigma in units of the noise
    Grads    all five; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Hoogeboom & Salimans 2023, section 4
    """
    _check_floor("blur_diffuse", floor)
    z = BLUR.eager((x, width, signal, floor, noise, sigma), required=(0, 1, 2, 4, 5))
    if z is not None:
        return z
    _images("blur_diffuse", x=x, noise=noise)
    _check_scalars("blur_diffuse", x, signal=signal, sigma=sigma, width=width)
    return BLUR(x, width, signal, floor, noise, sigma)


def blur_denoise(z, eps, noise, gain_z, gain_eps, gain_noise):
    """IDCT(gain_z DCT(z) + gain_eps DCT(eps) + gain_noise noise): one step of a blurring diffusion's sampler, noise drawn per frequency.

    Shapes   z, eps, noise (B, C, h, w), any strides; gains broadcast to z -> as z, contiguous
    Dtypes   float32, float16, bfloat16, float64; all equal; computed in float32 (float64 in the reference)
    Grads    all six; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Hoogeboom & Salimans 2023, appendix A
    """
    op = "blur_denoise"
    y = MIX.eager((z, gain_z, eps, gain_eps, noise, gain_noise, 2), required=range(6))
    if y is not None:
        return y
    _images(op, z=z, eps=eps, noise=noise)
    gain_z, gain_eps, gain_noise = (_check_gain(op, name, gain, "z", z, 2) for name, gain in
                                    (("gain_z", gain_z), ("gain_eps", gain_eps), ("gain_noise", gain_noise)))
    return MIX(z, gain_z, eps, gain_eps, noise, gain_noise, 2)
