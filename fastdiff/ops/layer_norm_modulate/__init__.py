"""The boundaries of a DiT block: layer norm with shift and scale, residual with gate, and both in one pass."""

import torch

from ...core.backend import cpu
from ...core.check import beside, dims, number
from ...core.contract import contract
from . import reference, triton

_PER = ("B D", "B N D")  # modulation per sample or per token


def _check(op, x, y, **others):
    sizes = dims(op, x=(x, "B N D"), y=(y, "B N D"))
    layouts = dict.fromkeys(("gate", "shift", "scale"), _PER) | dict.fromkeys(("weight", "bias"), ("D",))
    beside(op, x, sizes, **{name: (given, *layouts[name]) for name, given in others.items()})
    return x.new_empty(x.shape)


def _norm_outputs(x, shift, scale, weight, bias, eps):
    return _check("layer_norm_modulate", x, None, shift=shift, scale=scale, weight=weight, bias=bias)


def _gate_outputs(x, y, gate):
    return _check("gate_residual", x, y, gate=gate)


def _both_outputs(x, y, gate, shift, scale, weight, bias, eps):
    out = _check("gate_residual_norm_modulate", x, y, gate=gate, shift=shift, scale=scale, weight=weight, bias=bias)
    return out, torch.empty_like(out)


def _gate_backward_outputs(dout, y, gate):
    op = "gate_residual_backward"
    _check(op, y, None, gate=gate)
    dims(op, y=(y, "B N D"), dout=(dout, "B N D"))
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _norm_backward_outputs(dh, dout, x, y, gate, shift, scale, weight, bias, eps, wants):
    op = "layer_norm_modulate_backward"
    dx = _check(op, x, y, gate=gate, shift=shift, scale=scale, weight=weight, bias=bias)
    dims(op, x=(x, "B N D"), dh=(dh, "B N D"), dout=(dout, "B N D"))
    return dx, *(t.new_empty(t.shape) if want else x.new_empty(0)
                 for t, want in zip((y, gate, shift, scale, weight, bias), wants[1:], strict=True))


NORM = contract("layer_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps) -> Tensor",
                outputs=_norm_outputs, reference=reference.layer_norm_modulate,
                backends=(triton.NORM, cpu("layer_norm_modulate")), module=__name__, entries=("layer_norm_modulate_eager",))
GATE = contract("gate_residual(Tensor x, Tensor y, Tensor gate) -> Tensor", outputs=_gate_outputs, reference=reference.gate_residual,
                backends=(triton.GATE, cpu("gate_residual")), module=__name__, entries=("gate_residual_eager",))
BOTH = contract("gate_residual_norm_modulate(Tensor x, Tensor y, Tensor gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, "
                "float eps) -> (Tensor, Tensor)", outputs=_both_outputs, reference=reference.gate_residual_norm_modulate,
                backends=(triton.BOTH, cpu("gate_residual_norm_modulate")), module=__name__,
                entries=("gate_residual_norm_modulate_eager",))
GATE_BACKWARD = contract("gate_residual_backward(Tensor dout, Tensor y, Tensor gate) -> (Tensor, Tensor)", outputs=_gate_backward_outputs,
                         reference=reference.gate_residual_backward,
                backends=(triton.GATE_BACKWARD, cpu("gate_residual_backward")), module=__name__)
# Of `layer_norm_modulate` (y and gate None) and, with x + gate y for x, of `gate_residual_norm_modulate`. wants: of x, y, gate, shift, ...
NORM_BACKWARD = contract(
    "layer_norm_modulate_backward(Tensor dh, Tensor? dout, Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, "
    "Tensor? weight, Tensor? bias, float eps, bool[] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    outputs=_norm_backward_outputs, reference=reference.layer_norm_modulate_backward,
                backends=(triton.NORM_BACKWARD, cpu("layer_norm_modulate_backward")), module=__name__)


def _kept(grads, wants):
    return tuple(g if want else None for g, want in zip(grads, wants, strict=True))


def _through_norm(dh, dout, x, y, gate, modulation, eps, wants):
    """NORM_BACKWARD's gradients, None for those not wanted; dshift per token is dh itself."""
    own = wants[3] and modulation[0].dim() == 3
    grads = NORM_BACKWARD(dh, dout, x, y, gate, *modulation, eps, [*wants[:3], wants[3] and not own, *wants[4:]])
    dx, dy, dgate, dshift, *rest = _kept(grads, wants)
    return dx, dy, dgate, dh.to(modulation[0].dtype) if own else dshift, *rest


def _norm_backward(ctx, dh):
    if dh is None:
        return (None,) * 6
    x, *modulation = ctx.saved_tensors
    dx, _, _, *grads = _through_norm(dh, None, x, None, None, modulation, ctx.args[5], [ctx.wants[0], False, False, *ctx.wants[1:5]])
    return dx, *grads, None


def _gate_backward(ctx, dout):
    if dout is None:
        return (None,) * 3
    grads = GATE_BACKWARD(dout, *ctx.saved_tensors) if any(ctx.wants[1:]) else (None, None)
    return _kept((dout, *grads), ctx.wants)


def _both_backward(ctx, dout, dh):
    out, y, gate, *modulation = ctx.saved_tensors
    if dh is None:
        return *((None,) * 3 if dout is None else _kept((dout, *GATE_BACKWARD(dout, y, gate)), ctx.wants[:3])), *(None,) * 5
    return *_through_norm(dh, dout, out, y, gate, modulation, ctx.args[7], list(ctx.wants[:7])), None


NORM.autograd(save=lambda ctx, args, outs: args[:5], backward=_norm_backward)
GATE.autograd(save=lambda ctx, args, outs: args[1:], backward=_gate_backward)
BOTH.autograd(save=lambda ctx, args, outs: (outs[0], *args[1:7]), backward=_both_backward)


NORM.vmap_batch((3, 4))
GATE.vmap_batch()
BOTH.vmap_batch((5, 6))
GATE_BACKWARD.vmap_batch()
NORM_BACKWARD.vmap_batch((7, 8), lambda *args: any(args[10][-2:]))


def layer_norm_modulate(x, shift=None, scale=None, weight=None, bias=None, *, eps=1e-6):
    """y = LN(x) (1 + scale) + shift, LN(x) = (x - mean) / sqrt(var + eps) * weight + bias over the last axis; None leaves a part out.

    Shapes   x (B, N, D); shift, scale (B, D) or (B, N, D), any strides (chunks of one projection are not copied); weight, bias (D,)
             -> y (B, N, D), contiguous
    Dtypes   x float32, float16, bfloat16, float64; the others x's or float32; y x's; computed in float32 (float64 in the reference)
    Grads    all five; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Peebles & Xie 2023, section 3.2
    """
    args = (x, shift, scale, weight, bias, number("layer_norm_modulate", "eps", eps, least=0))
    y = NORM.eager(args, optional=args[1:5])
    return NORM(*args) if y is None else y


def gate_residual(x, y, gate):
    """x + gate * y, gate per sample or per token.

    Shapes   x, y (B, N, D); gate (B, D) or (B, N, D), any strides (a chunk of one projection is not copied) -> (B, N, D), contiguous
    Dtypes   x, y float32, float16, bfloat16, float64; gate x's or float32; the result x's; computed in float32 (float64 in the reference)
    Grads    all three; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Peebles & Xie 2023, section 3.2 (adaLN-Zero)
    """
    out = GATE.eager((x, y, gate))
    return GATE(x, y, gate) if out is None else out


def gate_residual_norm_modulate(x, y, gate, shift=None, scale=None, weight=None, bias=None, *, eps=1e-6):
    """The boundary between two sublayers: (out, h), out = x + gate y, h = LN(out) (1 + scale) + shift, as in `layer_norm_modulate`.

    Shapes   x, y (B, N, D); gate, shift, scale (B, D) or (B, N, D), any strides; weight, bias (D,) -> out, h (B, N, D), contiguous
    Dtypes   x, y float32, float16, bfloat16, float64; the others x's or float32; out, h x's; computed in float32 (float64 in the
             reference), the norm of out as rounded
    Grads    all seven; every order
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Peebles & Xie 2023, section 3.2 (adaLN-Zero)
    """
    args = (x, y, gate, shift, scale, weight, bias, number("gate_residual_norm_modulate", "eps", eps, least=0))
    both = BOTH.eager(args, optional=args[3:7])
    return BOTH(*args) if both is None or both[0] is None else both
