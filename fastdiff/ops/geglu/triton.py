"""a gelu(b) and its gradient, in one pass over the elements."""

from ...core.backend import triton
from ...core.jit import OPTIONS, cdiv, jit, narrow, tl

LAUNCH = dict(BLOCK=1024, num_warps=4)  # not tuned on a GPU yet


@jit
def _share(x, TANH: tl.constexpr):
    """The share of x that gelu lets through: the normal distribution, or its approximation by sigmoid(2 v) = (1 + tanh v) / 2."""
    if TANH:
        return 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@jit
def _slope(x, share, TANH: tl.constexpr):
    """d share / dx."""
    if TANH:
        return share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        return 0.3989422804014327 * tl.exp(-0.5 * x * x)


@jit
def _place(stride, F, BLOCK: tl.constexpr):
    """(offsets in x's first half, offsets in y, mask) of a program's block of a row."""
    blocks = tl.cdiv(F, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    i_n, o_f = pid // blocks, pid % blocks * BLOCK + tl.arange(0, BLOCK)
    return i_n * stride + o_f, i_n * F + o_f, o_f < F


@jit
def _geglu(x_ptr, y_ptr, stride, F, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """y = a gelu(b).

    grid    rows cdiv(F, BLOCK), blocks of a row innermost
    layout  x (rows, 2 F) of this stride, last stride 1; y (rows, F) contiguous
    math    fp32, rounded once
    needs   nothing
    """
    o_x, o_y, m = _place(stride, F, BLOCK)
    a = tl.load(x_ptr + o_x, mask=m, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + o_x + F, mask=m, other=0.0).to(tl.float32)
    tl.store(y_ptr + o_y, narrow(a * (b * _share(b, TANH)), y_ptr.dtype.element_ty), mask=m)


@jit
def _gradient(dy_ptr, x_ptr, dx_ptr, stride, F, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """da = dy gelu(b), db = dy a gelu'(b).

    grid    as in `_geglu`
    layout  as in `_geglu`; dy (rows, F) and dx (rows, 2 F) contiguous
    math    fp32, rounded once
    needs   nothing
    """
    o_x, o_y, m = _place(stride, F, BLOCK)
    a = tl.load(x_ptr + o_x, mask=m, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + o_x + F, mask=m, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + o_y, mask=m, other=0.0).to(tl.float32)
    share = _share(b, TANH)
    o_dx, _, _ = _place(2 * F, F, BLOCK)
    tl.store(dx_ptr + o_dx, narrow(dy * (b * share), dx_ptr.dtype.element_ty), mask=m)
    tl.store(dx_ptr + o_dx + F, narrow(dy * a * (share + b * _slope(b, share, TANH)), dx_ptr.dtype.element_ty), mask=m)


def _launch(kernel, x, approximate, *tensors):
    """tensors: the kernel's, with None in x's place."""
    F = x.shape[-1] // 2
    if x.numel():
        x = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous().view(-1, 2 * F)
        kernel[(x.shape[0] * cdiv(F, LAUNCH["BLOCK"]),)](*(x if t is None else t for t in tensors), x.stride(0), F, approximate == "tanh",
                                                         **LAUNCH, **OPTIONS)


def _run(args, outs):
    _launch(_geglu, *args, None, outs[0])


def _run_backward(args, outs):
    dy, x, approximate = args
    _launch(_gradient, x, approximate, dy.contiguous(), None, outs[0])


FORWARD = triton(_run, plan=lambda *_: "one kernel over blocks of rows")
BACKWARD = triton(_run_backward, plan=lambda *_: "one kernel over blocks of rows")
