"""Triton, or a stand-in with which kernel files import where it is missing; and the tile operations that the kernels share."""

import math
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl

    jit, WHY_NOT = triton.jit, None
    INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
except ImportError as _error:
    jit, WHY_NOT = (lambda kernel: kernel), f"triton cannot be imported: {_error}"
    INTERPRET, tl = False, SimpleNamespace(constexpr=lambda value: value)
IEEE = tl.constexpr("ieee")  # as a default: Triton 3.6 takes a plain string there for no constant

# What a launch passes beside the kernel's own settings: the default of this one changes between releases of Triton.
OPTIONS = dict(enable_fp_fusion=True)
_INTERPRETER = threading.RLock()  # the interpreter keeps its place in the grid in a global


def on_device(x):
    """Context in which kernels launch on the device of x."""
    if x.is_cuda:
        return torch.cuda.device(x.device)
    return _INTERPRETER if INTERPRET else nullcontext()


def cdiv(a, b):
    return -(-a // b)


def power_of_two(n, *, least=1):
    """The least power of two that is at least n."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def unit_of(*strides):
    """The largest of 16, 8, 4, 2 and 1 that divides all of these strides."""
    return math.gcd(16, *strides)


def rows(x):
    """x, or a copy of it if its last axis is not contiguous in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def padded(width, dtype):
    """width, rounded up to whole loads of 16 bytes."""
    whole = 16 // dtype.itemsize
    return cdiv(width, whole) * whole


def aligned(x):
    """x, if each of its rows starts on 16 bytes and is whole loads of 16 bytes; else a copy, padded with zeros to `padded` columns.

    Loads of single elements would cost more than the copy does, and an address register each.
    """
    width, whole = x.shape[-1], 16 // x.element_size()
    if x.stride(-1) == 1 and width % whole == 0 and not any(s % whole for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, padded(width, x.dtype) - width)).contiguous()


@jit
def dot(a, b, acc, PRECISION: tl.constexpr = IEEE):
    """acc + a b, accumulated in fp32; fp32 operands are not rounded to tf32, but may be split into two of them (PRECISION "tf32x3").

    Kernels count on one order of addition whatever the tile's shape. The interpreter's has none (and no bf16): there the product is
    computed in fp64 and rounded.
    """
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)).to(tl.float32)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 x in DTYPE, rounded to nearest even (the interpreter's own cast to bf16 truncates)."""
    if INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@jit
def load_tile(x_ptr, start, stride, end, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr,
              UNIT: tl.constexpr = 1):
    """(ROWS, WIDTH) of a (rows, E) matrix from row `start`, column FIRST; zero from row `end` and column E on.

    The rows lie UNIT * stride elements apart: Triton sees no divisor of an argument but 16, so UNIT tells it of 8, 4 or 2, for wide loads.
    """
    stride = tl.cast(stride, tl.int64) * UNIT
    o_row, o_e = tl.arange(0, ROWS), FIRST + tl.arange(0, WIDTH)
    x_ptr += tl.cast(start, tl.int64) * stride
    m_x = (o_row < end - start)[:, None]
    if FIRST + WIDTH > E:
        m_x = m_x & (o_e < E)[None, :]
    return tl.load(x_ptr + (o_row.to(tl.int64)[:, None] * stride + o_e[None, :]), mask=m_x, other=0.0)


@jit
def store_tile(y_ptr, y, start, stride, end, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr,
               UNIT: tl.constexpr = 1):
    """Writes what `load_tile` with these arguments reads, rounded to the memory's dtype."""
    stride = tl.cast(stride, tl.int64) * UNIT
    o_row, o_e = tl.arange(0, ROWS), FIRST + tl.arange(0, WIDTH)
    y_ptr += tl.cast(start, tl.int64) * stride
    m_y = (o_row < end - start)[:, None] & (o_e < E)[None, :]
    tl.store(y_ptr + (o_row.to(tl.int64)[:, None] * stride + o_e[None, :]), narrow(y, y_ptr.dtype.element_ty), mask=m_y)
