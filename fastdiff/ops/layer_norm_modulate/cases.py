"""Sizes, inputs, work and benchmark shapes of layer_norm_modulate, gate_residual and gate_residual_norm_modulate."""

from math import prod

from ...core.case import Array, Case, Dim, OneOf

_PER = OneOf("sample", "token", None)
_NORM = dict(shift=_PER, scale=_PER, affine=OneOf("", "weight bias", "weight", "bias"), eps=OneOf(1e-6, 1e-5, 0.1))
_SIZES = dict(B=Dim(0, 3), N=Dim(0, 130), D=Dim(0, 300), wide=OneOf(False, True))
_BENCH = {
    "DiT-XL/2 256px": dict(B=32, N=256, D=1152), "DiT-XL/2 512px": dict(B=8, N=1024, D=1152),
    "DiT-XL/2 512px B1": dict(B=1, N=1024, D=1152), "RIN latents B8": dict(B=8, N=256, D=1024),
    "DiT-XL/2 256px per token": dict(B=8, N=256, D=1152),
}


def _modulation(B, N, D, per, wide):
    return per and Array((B, D) if per == "sample" else (B, N, D), dtype="float32" if wide else None, either=True)


def _norm(B, N, D, shift, scale, affine, wide, eps):
    part = lambda name: Array((D,), dtype="float32" if wide else None, either=True) if name in affine.split() else None
    return dict(shift=_modulation(B, N, D, shift, wide), scale=_modulation(B, N, D, scale, wide), weight=part("weight"), bias=part("bias"),
                eps=eps)


def _layer_norm_modulate(B, N, D, **dims):
    return dict(x=Array((B, N, D)), **_norm(B, N, D, **dims))


def _gate_residual(B, N, D, gate, wide):
    return dict(x=Array((B, N, D)), y=Array((B, N, D)), gate=_modulation(B, N, D, gate, wide))


def _gate_residual_norm_modulate(B, N, D, gate, wide, **dims):
    return _gate_residual(B, N, D, gate, wide) | _norm(B, N, D, wide=wide, **dims)


def _bytes(outputs):
    """Everything read once, `outputs` arrays like x written."""
    def count(size, x, **others):
        width = lambda a: 4 if a.dtype == "float32" else size
        return outputs * size * prod(x.shape) + sum(width(a) * prod(a.shape) for a in (x, *others.values()) if isinstance(a, Array))

    return count


def _case(arguments, outputs, batched, **dims):
    own = {name: "token" for name in ("shift", "scale", "gate") if name in dims}
    bench = {name: row | own if "per token" in name else row for name, row in _BENCH.items()}
    return Case(dims=_SIZES | dims, arguments=arguments, bytes=_bytes(outputs), batched=batched, bench=bench)


CASES = {
    "layer_norm_modulate": _case(_layer_norm_modulate, 1, ("x", "shift", "scale"), **_NORM),
    "gate_residual": _case(_gate_residual, 1, ("x", "y", "gate"), gate=OneOf("sample", "token")),
    "gate_residual_norm_modulate": _case(_gate_residual_norm_modulate, 2, ("x", "y", "gate", "shift", "scale"),
                                         gate=OneOf("sample", "token"), **_NORM)}
