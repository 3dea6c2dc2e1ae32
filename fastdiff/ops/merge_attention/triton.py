"""Two partial attentions weighed against each other, and the gradient of that, in one pass over their rows."""

from ...core.backend import triton
from ...core.jit import OPTIONS, cdiv, jit, load_tile, power_of_two, rows, store_tile, tl
from ...core.softmax import place

LAUNCH = dict(elements=4096, num_warps=4)  # elements of one side in a program's tile; not tuned on a GPU yet


@jit
def _weights(lse_a_ptr, lse_b_ptr, lse_a_strides, lse_b_strides, i_b, i_h, o_m, M):
    """(w_a, w_b, lse) of a block of rows: w = exp(lse - top), normalised; top = max(lse_a, lse_b); 0, 0, -inf without a key."""
    m_m = o_m < M
    lse_a = tl.load(lse_a_ptr + i_b * lse_a_strides[0] + i_h * lse_a_strides[1] + o_m * lse_a_strides[2], mask=m_m, other=0.0)
    lse_b = tl.load(lse_b_ptr + i_b * lse_b_strides[0] + i_h * lse_b_strides[1] + o_m * lse_b_strides[2], mask=m_m, other=0.0)
    top = tl.maximum(lse_a, lse_b)
    top = tl.where(top == -float("inf"), 0.0, top)
    w_a, w_b = tl.exp(lse_a - top), tl.exp(lse_b - top)
    total = w_a + w_b
    lse = top + tl.log(total)
    total = tl.where(total == 0, 1.0, total)
    return w_a / total, w_b / total, lse


@jit
def _load(x_ptr, strides, i_b, i_h, start, M, ROWS: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):
    """A block of rows of a head, fp32."""
    return load_tile(x_ptr + i_b * strides[0] + i_h * strides[1], start, strides[2], M, ROWS, 0, WIDTH, E).to(tl.float32)


@jit
def _merge(a_ptr, lse_a_ptr, b_ptr, lse_b_ptr, out_ptr, lse_ptr, H, M, a_strides, lse_a_strides, b_strides, lse_b_strides,
           E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """out = w_a a + w_b b, lse = log(exp(lse_a) + exp(lse_b)), weights as in `_weights`.

    grid    B H cdiv(M, ROWS), row blocks innermost
    layout  a, b (B, H, M, E) with last stride 1; lse_a, lse_b (B, H, M) fp32, any strides; out, lse contiguous
    math    fp32, rounded once; weights 0 where neither side has a key
    needs   WIDTH a power of two, at least E
    """
    start, _, i_bh, i_b, i_h = place(M, 1, H, ROWS)
    o_m = start.to(tl.int64) + tl.arange(0, ROWS)
    w_a, w_b, lse = _weights(lse_a_ptr, lse_b_ptr, lse_a_strides, lse_b_strides, i_b, i_h, o_m, M)
    tl.store(lse_ptr + i_bh * M + o_m, lse, mask=o_m < M)
    a, b = _load(a_ptr, a_strides, i_b, i_h, start, M, ROWS, WIDTH, E), _load(b_ptr, b_strides, i_b, i_h, start, M, ROWS, WIDTH, E)
    out = w_a[:, None] * a + w_b[:, None] * b
    store_tile(out_ptr + i_bh * M * E, out, start, E, M, ROWS, 0, WIDTH, E)


@jit
def _gradients(dout_ptr, dlse_ptr, a_ptr, lse_a_ptr, b_ptr, lse_b_ptr, da_ptr, dlse_a_ptr, db_ptr, dlse_b_ptr, H, M, dout_strides,
               dlse_strides, a_strides, lse_a_strides, b_strides, lse_b_strides, E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """da = w_a dout, dlse_a = w_a (w_b g + dlse), g = sum_e dout (a - b); db, dlse_b with b for a and -g for g.

    grid    as in `_merge`
    layout  as in `_merge`; dout (B, H, M, E), last stride 1; dlse (B, H, M), any strides, or None; gradients contiguous
    math    fp32, rounded once
    needs   as in `_merge`
    """
    start, _, i_bh, i_b, i_h = place(M, 1, H, ROWS)
    start = start.to(tl.int64)  # in 32 bits registers spill on sm_80
    o_m = start + tl.arange(0, ROWS)
    w_a, w_b, _ = _weights(lse_a_ptr, lse_b_ptr, lse_a_strides, lse_b_strides, i_b, i_h, o_m, M)
    dout = _load(dout_ptr, dout_strides, i_b, i_h, start, M, ROWS, WIDTH, E)
    a, b = _load(a_ptr, a_strides, i_b, i_h, start, M, ROWS, WIDTH, E), _load(b_ptr, b_strides, i_b, i_h, start, M, ROWS, WIDTH, E)
    g = tl.sum(dout * (a - b), 1)
    dlse = tl.zeros([ROWS], tl.float32)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + i_b * dlse_strides[0] + i_h * dlse_strides[1] + o_m * dlse_strides[2], mask=o_m < M, other=0.0)
    tl.store(dlse_a_ptr + i_bh * M + o_m, w_a * (w_b * g + dlse), mask=o_m < M)
    tl.store(dlse_b_ptr + i_bh * M + o_m, w_b * (dlse - w_a * g), mask=o_m < M)
    store_tile(da_ptr + i_bh * M * E, w_a[:, None] * dout, start, E, M, ROWS, 0, WIDTH, E)
    store_tile(db_ptr + i_bh * M * E, w_b[:, None] * dout, start, E, M, ROWS, 0, WIDTH, E)


def _launch(kernel, x, *args):
    """Over blocks of the rows of x (B, H, M, E)."""
    B, H, M, E = x.shape
    if B * H * M:
        width = power_of_two(E)
        block = power_of_two(min(M, max(1, LAUNCH["elements"] // width)))
        kernel[(B * H * cdiv(M, block),)](*args, E=E, WIDTH=width, ROWS=block, num_warps=LAUNCH["num_warps"], **OPTIONS)


def _run(args, outs):
    out_a, lse_a, out_b, lse_b = args
    H, M = out_a.shape[1:3]
    a, b = rows(out_a), rows(out_b)
    _launch(_merge, a, a, lse_a, b, lse_b, *outs, H, M, a.stride()[:3], lse_a.stride(), b.stride()[:3], lse_b.stride())


def _run_backward(args, outs):
    dout, dlse, out_a, lse_a, out_b, lse_b = args
    H, M = out_a.shape[1:3]
    dout, a, b = rows(dout), rows(out_a), rows(out_b)
    _launch(_gradients, a, dout, dlse, a, lse_a, b, lse_b, *outs, H, M, dout.stride()[:3], (0,) * 3 if dlse is None else dlse.stride(),
            a.stride()[:3], lse_a.stride(), b.stride()[:3], lse_b.stride())


_PLAN = "one kernel over blocks of rows"
FORWARD = triton(_run, plan=lambda *_: _PLAN)
BACKWARD = triton(_run_backward, plan=lambda *_: _PLAN)
