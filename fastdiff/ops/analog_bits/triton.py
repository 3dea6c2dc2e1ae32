"""Integers to analog bits and back: each program takes a piece of a plane of integers, and that piece of its planes of bits."""

from math import prod

from ...core.backend import FLOATS, triton
from ...core.jit import OPTIONS, cdiv, jit, narrow, tl

LAUNCH = dict(BLOCK=512, num_warps=4)  # not tuned on a GPU yet


@jit
def _place(size, BLOCK: tl.constexpr):
    """(plane of integers, its elements that this program takes, their mask, the size in int64)."""
    pid = tl.program_id(0).to(tl.int64)
    pieces = tl.cdiv(size, BLOCK)
    o_x = pid % pieces * BLOCK + tl.arange(0, BLOCK)
    return pid // pieces, o_x, o_x < size, tl.cast(size, tl.int64)


@jit
def _to_bits(x_ptr, y_ptr, scale, C, size, x_strides, BITS: tl.constexpr, MSB: tl.constexpr, BLOCK: tl.constexpr):
    """y[b, c, i] = scale if bit i of x[b, c] is 1, else -scale.

    grid    B C cdiv(size, BLOCK), pieces of a plane innermost
    layout  x (B, C, size) integers, any strides; y (B, C, BITS, size) dense; bit i counts from the most significant if MSB
    math    none
    needs   nothing
    """
    plane, o_x, m_x, size = _place(size, BLOCK)
    x = tl.load(x_ptr + plane // C * x_strides[0] + plane % C * x_strides[1] + o_x * x_strides[2], mask=m_x, other=0).to(tl.int64)
    high = narrow(tl.cast(scale, tl.float32), y_ptr.dtype.element_ty)
    low = narrow(-tl.cast(scale, tl.float32), y_ptr.dtype.element_ty)
    y_ptr += plane * BITS * size
    for i in tl.static_range(BITS):
        bit = BITS - 1 - i if MSB else i
        tl.store(y_ptr + i * size + o_x, tl.where((x >> bit) & 1 == 1, high, low), mask=m_x)


@jit
def _from_bits(x_ptr, y_ptr, size, BITS: tl.constexpr, MSB: tl.constexpr, BLOCK: tl.constexpr):
    """y[b, c] = sum over i of 2^i where x[b, c, i] > 0.

    grid    as in `_to_bits`
    layout  x (B, C, BITS, size), y (B, C, size), dense; bit i counts from the most significant if MSB
    math    int64
    needs   nothing
    """
    plane, o_x, m_x, size = _place(size, BLOCK)
    x_ptr += plane * BITS * size
    y = tl.zeros([BLOCK], tl.int64)
    for i in tl.static_range(BITS):
        bit = BITS - 1 - i if MSB else i
        x = tl.load(x_ptr + i * size + o_x, mask=m_x, other=0.0).to(tl.float32)
        y += (x > 0).to(tl.int64) << bit
    tl.store(y_ptr + plane * size + o_x, y.to(y_ptr.dtype.element_ty), mask=m_x)


def _grid(x):
    return x.shape[0] * x.shape[1] * cdiv(prod(x.shape[2:]), LAUNCH["BLOCK"])


def _run_to_bits(args, outs):
    (x, bits, scale, order, _), (y,) = args, outs
    if y.numel():
        flat = x.flatten(2)
        _to_bits[(_grid(x),)](flat, y, float(scale), x.shape[1], flat.shape[2], flat.stride(), bits, order == "msb", **LAUNCH, **OPTIONS)


def _run_from_bits(args, outs):
    (x, bits, order, _), (y,) = args, outs
    if y.numel():
        _from_bits[(_grid(y),)](x.contiguous(), y, prod(y.shape[2:]), bits, order == "msb", **LAUNCH, **OPTIONS)


def refuse(x, bits, scale, order, dtype):
    return None if dtype in FLOATS else f"makes {', '.join(str(d).removeprefix('torch.') for d in FLOATS)}, got {dtype}"


_PLAN = "one kernel over pieces of planes"
TO_BITS = triton(_run_to_bits, dtypes=None, refuse=refuse, plan=lambda *_: _PLAN)
FROM_BITS = triton(_run_from_bits, plan=lambda *_: _PLAN)
