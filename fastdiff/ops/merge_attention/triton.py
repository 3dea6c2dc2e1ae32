"""Two partial attentions weighed against each other, in one pass over their rows."""

from ...core.backend import triton
from ...core.jit import OPTIONS, cdiv, jit, load_tile, power_of_two, rows, store_tile, tl

LAUNCH = dict(elements=4096, num_warps=4)  # elements of one side in a program's tile; not tuned on a GPU yet


@jit
def _merge(a_ptr, lse_a_ptr, b_ptr, lse_b_ptr, out_ptr, lse_ptr, H, M, a_strides, lse_a_strides, b_strides, lse_b_strides,
           E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """out = (w_a a + w_b b) / (w_a + w_b), lse = top + log(w_a + w_b), with w = exp(lse - top), top = max(lse_a, lse_b).

    grid    B H cdiv(M, ROWS), row blocks innermost
    layout  a, b (B, H, M, E) with last stride 1; lse_a, lse_b (B, H, M) fp32, any strides; out, lse contiguous
    math    fp32, rounded once; weights 0 where neither side has a key
    needs   WIDTH a power of two, at least E
    """
    blocks = tl.cdiv(M, ROWS)
    pid = tl.program_id(0).to(tl.int64)
    start, i_bh = pid % blocks * ROWS, pid // blocks
    i_b, i_h = i_bh // H, i_bh % H
    o_m = start + tl.arange(0, ROWS)
    m_m = o_m < M
    lse_a = tl.load(lse_a_ptr + i_b * lse_a_strides[0] + i_h * lse_a_strides[1] + o_m * lse_a_strides[2], mask=m_m, other=0.0)
    lse_b = tl.load(lse_b_ptr + i_b * lse_b_strides[0] + i_h * lse_b_strides[1] + o_m * lse_b_strides[2], mask=m_m, other=0.0)
    top = tl.maximum(lse_a, lse_b)
    top = tl.where(top == -float("inf"), 0.0, top)
    w_a, w_b = tl.exp(lse_a - top), tl.exp(lse_b - top)
    total = w_a + w_b
    tl.store(lse_ptr + i_bh * M + o_m, top + tl.log(total), mask=m_m)
    total = tl.where(total == 0, 1.0, total)
    a = load_tile(a_ptr + i_b * a_strides[0] + i_h * a_strides[1], start, a_strides[2], M, ROWS, 0, WIDTH, E).to(tl.float32)
    b = load_tile(b_ptr + i_b * b_strides[0] + i_h * b_strides[1], start, b_strides[2], M, ROWS, 0, WIDTH, E).to(tl.float32)
    out = (w_a / total)[:, None] * a + (w_b / total)[:, None] * b
    store_tile(out_ptr + i_bh * M * E, out, start, E, M, ROWS, 0, WIDTH, E)


def _run(args, outs):
    out_a, lse_a, out_b, lse_b = args
    out, lse = outs
    B, H, M, E = out_a.shape
    if not B * H * M:
        return
    a, b, width = rows(out_a), rows(out_b), power_of_two(E)
    block = power_of_two(min(M, max(1, LAUNCH["elements"] // width)))
    _merge[(B * H * cdiv(M, block),)](
        a, lse_a, b, lse_b, out, lse, H, M, a.stride()[:3], lse_a.stride(), b.stride()[:3], lse_b.stride(), E=E, WIDTH=width, ROWS=block,
        num_warps=LAUNCH["num_warps"], **OPTIONS)


FORWARD = triton(_run, plan=lambda *_: "one kernel over blocks of rows")
