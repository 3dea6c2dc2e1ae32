"""Orthonormal cosine transforms of images, gains on their frequencies, and the steps of a blurring diffusion made of these."""

import math

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


DCT = contract("dct(Tensor x, int dims, bool inverse) -> Tensor", outputs=lambda x, *_: _like(x), reference=reference.dct,
               backends=(_cuda("dct", lambda args: args[0]), triton.DCT, cpu("dct")), module=__name__,
               entries=("dct_eager",))
# IDCT(gain DCT(x) + gain_eps DCT(eps) + gain_noise noise); gains in float32 (float64 beside float64), broadcast to x, whole along its axes.
MIX = contract("frequency_mix(Tensor x, Tensor gain, Tensor? eps, Tensor? gain_eps, Tensor? noise, Tensor? gain_noise, int dims) -> Tensor",
               outputs=lambda x, *_: _like(x), reference=reference.frequency_mix, module=__name__,
               backends=(_cuda("frequency_mix", lambda args: args[-1]), triton.MIX, cpu("frequency_mix")), entries=("frequency_mix_eager",))
# IDCT((rows columns^T + base) DCT(x)) + sigma noise, per sample; rows (B, h), columns (B, w), base and sigma (B,) as the gains above.
SEPARABLE = contract("separable_gain(Tensor x, Tensor rows, Tensor columns, Tensor base, Tensor? noise, Tensor? sigma) -> Tensor",
                     outputs=lambda x, *_: _like(x), reference=reference.separable_gain,
                     backends=(_cuda("separable_gain", lambda args: 2), triton.SEPARABLE, cpu("separable_gain")), module=__name__,
                     entries=("blur_eager",))


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


def _separable_gradients(dy, x, rows, columns, base):
    _alike("separable_gain_backward", dy, x)
    return _like(x), *(torch.empty_like(g, memory_format=torch.contiguous_format) for g in (rows, columns, base))


def _run_mix_backward(args, outs):
    dy, x, gain, dims = args
    into("frequency_mix", outs[:1], dy, gain, None, None, None, None, dims)
    torch.mul(_wide(DCT(dy, dims, False)), DCT(x, dims, False), out=outs[1])


def _run_separable_backward(args, outs):
    dy, x, rows, columns, base = args
    into("separable_gain", outs[:1], dy, rows, columns, base, None, None)
    dgain = (_wide(DCT(dy, 2, False)) * DCT(x, 2, False)).sum(1)
    torch.sum(dgain * columns.unsqueeze(1), 2, out=outs[1])
    torch.sum(dgain * rows.unsqueeze(2), 1, out=outs[2])
    torch.sum(dgain, (1, 2), out=outs[3])


# IDCT(gain DCT(dy)), and DCT(dy) DCT(x) in the gain's dtype; of a separable gain its sums. On a GPU composed of the kernels above.
MIX_BACKWARD = contract("frequency_mix_backward(Tensor dy, Tensor x, Tensor gain, int dims) -> (Tensor, Tensor)", outputs=_mix_gradients,
                        reference=reference.frequency_mix_backward, backends=(on_triton(_run_mix_backward), cpu("frequency_mix_backward")),
                        module=__name__)
SEPARABLE_BACKWARD = contract("separable_gain_backward(Tensor dy, Tensor x, Tensor rows, Tensor columns, Tensor base)"
                              " -> (Tensor, Tensor, Tensor, Tensor)", outputs=_separable_gradients, module=__name__,
                              reference=reference.separable_gain_backward,
                              backends=(on_triton(_run_separable_backward), cpu("separable_gain_backward")))


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


def _separable_backward(ctx, dy):
    if dy is None:
        return (None,) * 6
    (x, rows, columns, base, noise, sigma), wants = ctx.saved_tensors, ctx.wants
    if any(wants[1:4]):
        grads = SEPARABLE_BACKWARD(dy, x, rows, columns, base)
    else:
        grads = SEPARABLE(dy, rows, columns, base, None, None) if wants[0] else None, None, None, None
    return (*grads, (sigma.view(-1, 1, 1, 1) * dy).to(dy.dtype) if wants[4] else None,
            (_wide(dy) * noise).sum((1, 2, 3)) if wants[5] else None)


def _separable_jvp(ctx, dx, drows, dcolumns, dbase, dnoise, dsigma):
    x, rows, columns, base, noise, sigma = ctx.saved_tensors
    outer = ((drows, columns), (rows, dcolumns))
    dgains = [a.unsqueeze(2) * b.unsqueeze(1) for a, b in outer if a is not None and b is not None]
    dgains += [] if dbase is None else [dbase.view(-1, 1, 1).expand(-1, x.shape[2], x.shape[3])]
    parts = [] if dx is None else [SEPARABLE(dx, rows, columns, base, None, None)]
    parts += [_gained(x, sum(dgains[1:], dgains[0]).unsqueeze(1), 2)] if dgains else []
    parts += [(a.view(-1, 1, 1, 1) * b).to(x.dtype) for a, b in ((sigma, dnoise), (dsigma, noise)) if a is not None and b is not None]
    return sum(parts[1:], parts[0])


SEPARABLE.autograd(save=lambda ctx, args, outs: args, backward=_separable_backward, jvp=_separable_jvp)


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
SEPARABLE.vmap_batch()
SEPARABLE_BACKWARD.vmap_batch()


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


def _blurred(x, width, signal, floor, noise, sigma):
    """SEPARABLE with the gain signal ((1 - floor) exp(-lambda width^2 / 2) + floor)."""
    time = (width.square() / -2).unsqueeze(1)
    decay = [torch.exp((torch.arange(n, device=x.device).to(width.dtype) * (math.pi / max(n, 1))).square() * time) for n in x.shape[2:]]
    base = torch.full_like(width, floor)
    rows = (1 - floor) * decay[0]
    if signal is not None:
        rows, base = signal.unsqueeze(1) * rows, signal * floor
    return SEPARABLE(x, rows, decay[1], base, noise, sigma)


def _transform(op, x, dims, inverse):
    y = DCT.eager((x, dims, inverse)) if type(dims) is int else None
    return DCT(x, _axes(op, x, dims), inverse) if y is None else y


def dct(x, *, dims=2):
    """Orthonormal DCT-II along the last one or two axes: y_k = c_k sum_n x_n cos(pi (n + 1/2) k / N), c_0 = sqrt(1/N), c_k = sqrt(2/N).

    Shapes   x (..., N) with dims=1, (..., h, w) with dims=2, any strides, any lengths -> y as x, contiguous
    Dtypes   float32, float16, bfloat16, float64; computed in float32 (float64 in the reference)
    Grads    x; every order, by the inverse transform
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Plonka & Tasche 2005 (stable splitting into transforms of half the length)
    """
    return _transform("dct", x, dims, False)


def idct(x, *, dims=2):
    """The inverse of `dct`, which is its transpose: idct(dct(x)) = x.

    Shapes   x (..., N) with dims=1, (..., h, w) with dims=2, any strides, any lengths -> y as x, contiguous
    Dtypes   float32, float16, bfloat16, float64; computed in float32 (float64 in the reference)
    Grads    x; every order, by the transform
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Plonka & Tasche 2005 (stable splitting into transforms of half the length)
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
    y = SEPARABLE.eager((x, width, None, floor, None, None), required=(0, 1))
    if y is not None:
        return y
    _images("blur", x=x)
    _check_scalars("blur", x, width=width)
    return _blurred(x, width, None, floor, None, None)


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
    z = SEPARABLE.eager((x, width, signal, floor, noise, sigma), required=(0, 1, 2, 4, 5))
    if z is not None:
        return z
    _images("blur_diffuse", x=x, noise=noise)
    _check_scalars("blur_diffuse", x, signal=signal, sigma=sigma, width=width)
    return _blurred(x, width, signal, floor, noise, sigma)


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
