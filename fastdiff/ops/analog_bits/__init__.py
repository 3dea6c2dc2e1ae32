"""Integers to analog bits along the channels, and back by sign."""

import torch

from ...core.backend import cpu
from ...core.check import DTYPES, dims, fail, option, tensor
from ...core.contract import contract
from . import reference, triton

_LAYOUTS = {3: "B C w", 4: "B C h w", 5: "B C t h w"}
_ORDERS = ("lsb", "msb")
_INTEGERS = (torch.uint8, torch.int32, torch.int64)


def _to_bits_outputs(x, bits, scale, order, dtype):
    if x.dtype not in _INTEGERS:
        fail("to_bits", f"x wants uint8, int32 or int64, got {x.dtype}")
    if x.layout is not torch.strided:
        fail("to_bits", f"x wants a strided (dense) tensor, got {x.layout}")
    return x.new_empty((x.shape[0], x.shape[1] * bits, *x.shape[2:]), dtype=dtype)


def _within(x, bits, *_):
    if (x.dtype is torch.uint8 and bits >= 8) or not x.numel():
        return
    if x.is_cuda:
        torch._assert_async(((x >= 0) & (x >> bits == 0)).all(), f"to_bits: x wants values in [0, 2^{bits})")
        return
    low, high = torch.aminmax(x)
    if low < 0 or high >> bits:
        fail("to_bits", f"x wants values in [0, 2^{bits}), got [{low}, {high}]")


def _from_bits_outputs(x, bits, order, dtype):
    dims("from_bits", x=(x, _LAYOUTS[x.dim()]))
    if x.shape[1] % bits:
        fail("from_bits", f"bits wants a divisor of the {x.shape[1]} channels of x, got {bits}")
    return x.new_empty((x.shape[0], x.shape[1] // bits, *x.shape[2:]), dtype=dtype)


TO_BITS = contract("to_bits(Tensor x, int bits, float scale, str order, ScalarType dtype) -> Tensor", outputs=_to_bits_outputs,
                   values=_within, reference=reference.to_bits, module=__name__,
                   backends=(triton.TO_BITS, cpu("to_bits", dtypes=None, refuse=triton.refuse)), entries=("to_bits_eager",))
FROM_BITS = contract("from_bits(Tensor x, int bits, str order, ScalarType dtype) -> Tensor", outputs=_from_bits_outputs,
                     reference=reference.from_bits, module=__name__,
                     backends=(triton.FROM_BITS, cpu("from_bits")), entries=("from_bits_eager",))


TO_BITS.vmap_batch()
FROM_BITS.vmap_batch()


def _options(op, x, bits, order):
    if tensor(op, "x", x).dim() not in _LAYOUTS:
        fail(op, f"x wants 3 to 5 dimensions (B, C, 1 to 3 of space), got {x.dim()}: {tuple(x.shape)}")
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{op}: bits wants an int, got {bits!r}")
    if not 1 <= bits <= 63:
        fail(op, f"bits wants a value in [1, 63], got {bits}")
    option(op, "order", order, _ORDERS)


def to_bits(x, bits=8, *, scale=1.0, order="lsb", dtype=torch.float32):
    """Analog bits of integers: y[:, bits c + i] = scale if bit i of x[:, c] is 1, else -scale.

    Shapes   x (B, C, *space), space 1-D to 3-D, any strides -> y (B, C bits, *space), contiguous
    Order    "lsb": i counts from the least significant bit (pix2seq); "msb": from the most significant of `bits` (bit-diffusion)
    Dtypes   x uint8, int32, int64 with values in [0, 2^bits), bits up to 63; y of `dtype`: float32, float16, bfloat16, float64
    Grads    none: integers have none
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Chen, Zhang & Hinton 2023, section 2.1
    """
    op = "to_bits"
    _options(op, x, bits, order)
    if isinstance(scale, bool) or not isinstance(scale, int | float | torch.SymFloat):
        raise TypeError(f"{op}: scale wants a float, got {scale!r}")
    if dtype not in DTYPES:
        fail(op, f"dtype wants float32, bfloat16, float16 or float64, got {dtype!r}")
    args = (x, bits, scale, order, dtype)
    y = TO_BITS.eager(args)
    return TO_BITS(*args) if y is None else y


def from_bits(x, bits=8, *, order="lsb", dtype=None):
    """Integers from analog bits, the inverse of `to_bits`: y[:, c] = sum over i of 2^i where x[:, bits c + i] > 0, else 0.

    Shapes   x (B, C bits, *space), space 1-D to 3-D, any strides -> y (B, C, *space), contiguous
    Order    as in `to_bits`
    Dtypes   x float32, float16, bfloat16, float64, 0 and NaN count as bit 0; y of `dtype`: uint8, int32 or int64, unless given the
             first of them that holds `bits` bits
    Grads    none: integers have none
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Chen, Zhang & Hinton 2023, section 2.1
    """
    op = "from_bits"
    _options(op, x, bits, order)
    if dtype is None:
        dtype = torch.uint8 if bits <= 8 else torch.int32 if bits <= 31 else torch.int64
    elif dtype not in _INTEGERS or torch.iinfo(dtype).max < 2**bits - 1:
        fail(op, f"dtype wants uint8, int32 or int64, and {bits} bits in it, got {dtype!r}")
    args = (x, bits, order, dtype)
    y = FROM_BITS.eager(args)
    return FROM_BITS(*args) if y is None else y
