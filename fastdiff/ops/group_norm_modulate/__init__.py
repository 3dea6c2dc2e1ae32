"""The norms of an ADM U-Net: group norm with weight and bias, scale and shift per sample, and SiLU, in one pass."""

import torch

from ...core.backend import cpu
from ...core.check import beside, dims, fail, flag, integers, number, tensor
from ...core.contract import contract
from . import reference, triton

_LAYOUTS = {1: "B C w", 2: "B C h w", 3: "B C t h w"}


def _like(x):
    """Uninitialised, in x's memory format: channels last if x is, else contiguous."""
    last = x.movedim(1, -1)
    if not x.is_contiguous() and last.is_contiguous():
        return x.new_empty(last.shape).movedim(-1, 1)
    return x.new_empty(x.shape)


def _check(op, x, groups, weight, bias, scale, shift, **beside_x):
    layout = _LAYOUTS[x.dim() - 2]
    sizes = dims(op, x=(x, layout), **{name: (t, layout) for name, t in beside_x.items()})
    beside(op, x, sizes, weight=(weight, "C"), bias=(bias, "C"), scale=(scale, "B C"), shift=(shift, "B C"))
    if sizes["C"] % groups:
        fail(op, f"groups wants a divisor of C = {sizes['C']}, got {groups}")


def _outputs(x, groups, weight, bias, scale, shift, eps, silu):
    _check("group_norm_modulate", x, groups, weight, bias, scale, shift)
    return _like(x), x.new_empty((x.shape[0], groups, 3), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _backward_outputs(dy, x, statistics, groups, weight, bias, scale, shift, eps, silu, wants):
    _check("group_norm_modulate_backward", x, groups, weight, bias, scale, shift, dy=dy)
    return _like(x), *(t.new_empty(t.shape) if want else x.new_empty(0)
                       for t, want in zip((weight, bias, scale, shift), wants[1:], strict=True))


FORWARD = contract(
    "group_norm_modulate(Tensor x, SymInt groups, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, bool silu) "
    "-> (Tensor, Tensor)", outputs=_outputs, reference=reference.group_norm_modulate,
    backends=(triton.FORWARD, cpu("group_norm_modulate")), module=__name__, entries=("group_norm_modulate_eager",))
BACKWARD = contract(
    "group_norm_modulate_backward(Tensor dy, Tensor x, Tensor statistics, SymInt groups, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, float eps, bool silu, bool[] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    outputs=_backward_outputs, reference=reference.group_norm_modulate_backward,
    backends=(triton.BACKWARD, cpu("group_norm_modulate_backward")), module=__name__)


def _save(ctx, args, outs):
    ctx.mark_non_differentiable(outs[1])
    return args[0], outs[1], *args[2:6]


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 8
    x, statistics, *modulation = ctx.saved_tensors
    wants = [ctx.wants[0], *ctx.wants[2:6]]
    grads = BACKWARD(dy, x, statistics, ctx.args[1], *modulation, *ctx.args[6:], wants)
    dx, *rest = (g if want else None for g, want in zip(grads, wants, strict=True))
    return dx, None, *rest, None, None


FORWARD.autograd(save=_save, backward=_backward)


FORWARD.vmap_batch((2, 3))
BACKWARD.vmap_batch((4, 5), lambda *args: any(args[10][1:3]))


def group_norm_modulate(x, groups, weight, bias, scale=None, shift=None, *, eps=1e-5, silu=True):
    """y = silu(GN(x) (1 + scale) + shift), GN(x) = (x - mean) / sqrt(var + eps) * weight + bias over a sample's groups of channels.

    Shapes   x (B, C, *space), space 1-D to 3-D, contiguous or channels last (others are copied); weight, bias (C,) or None; scale, shift
             (B, C), any strides, or None; groups divides C -> y as x, in its memory format
    Silu     silu(u) = u / (1 + exp(-u)); silu=False leaves it out
    Dtypes   x float32, float16, bfloat16, float64; the others x's or float32; y x's; computed in float32 (float64 in the reference)
    Grads    x, weight, bias, scale, shift; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Wu & He 2018; Dhariwal & Nichol 2021, section 3.1 (AdaGN)
    """
    op = "group_norm_modulate"
    if tensor(op, "x", x).dim() - 2 not in _LAYOUTS:
        fail(op, f"x wants 3 to 5 dimensions (B, C, 1 to 3 of space), got {x.dim()}: {tuple(x.shape)}")
    (groups,) = integers(op, "groups", groups, 1)
    args = (x, groups, weight, bias, scale, shift, number(op, "eps", eps, least=0), flag(op, "silu", silu))
    y = FORWARD.eager(args, optional=args[2:6])
    return FORWARD(*args)[0] if y is None else y
