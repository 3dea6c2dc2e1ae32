"""Softmax over parts of a loop in Triton kernels: what a part is in registers, how it leaves, and the merging of parts in order."""

from .jit import OPTIONS, cdiv, jit, load_tile, narrow, power_of_two, store_tile, tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOW = tl.constexpr(2048.0)  # float16 then has as many digits for what rounding leaves over as for the rounded
MERGE = dict(elements=1024, num_warps=4)


@jit
def place(rows, splits, H, BLOCK: tl.constexpr):
    """(first row, share, head, its batch, its number there) of a program on the grid B H splits cdiv(rows, BLOCK), blocks innermost."""
    blocks = tl.cdiv(rows, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    i_bh = pid // blocks // splits
    return (pid % blocks * BLOCK).to(tl.int32), pid // blocks % splits, i_bh, i_bh // H, i_bh % H


@jit
def exp(x, NATURAL: tl.constexpr):
    """exp of a difference of logits."""
    if NATURAL:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@jit
def two_floats(x):
    """fp64 x as the sum of two fp32: x rounded, and what rounding left over (0 beside inf and NaN)."""
    high = x.to(tl.float32)
    return high, tl.where(tl.abs(high) < float("inf"), (x - high.to(tl.float64)).to(tl.float32), 0.0)


@jit
def log_sum_exp(top, total, NATURAL: tl.constexpr):
    """Natural log-sum-exp, as two floats, of the greatest logit and the sum of exponentials relative to it."""
    top, log = top.to(tl.float64), tl.log2(total).to(tl.float64)
    if NATURAL:
        return two_floats(top + log * LN2)
    else:
        return two_floats((top + log) * LN2)


@jit
def store_low(low_ptr, y, i_bh, start, M, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):
    """LOW times what rounding y to the memory's dtype leaves over, into contiguous (B, H, M, E), if there is any; 0 where y overflows."""
    if low_ptr is not None:
        low = (y - narrow(y, low_ptr.dtype.element_ty).to(tl.float32)) * LOW
        store_tile(low_ptr + i_bh * M * E, tl.where(tl.abs(low) < float("inf"), low, 0.0), start, E, M, ROWS, FIRST, WIDTH, E)


@jit
def merge(parts_ptr, tops_ptr, totals_ptr, out_ptr, out_low_ptr, lse_ptr, low_ptr, B, H, M, splits, out_strides, NATURAL: tl.constexpr,
          E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """out = sum_s w_s part_s / total, total = sum_s w_s total_s, w_s = exp(top_s - top), first split to last; lse = top + log(total).

    grid    B H cdiv(M, ROWS), row blocks innermost
    layout  parts (splits, B, H, M, E), tops, totals (splits, B, H, M), out_low (B, H, M, E) or None, lse, low (B, H, M)
            contiguous; out (B, H, M, E), last stride 1
    math    fp32, rounded once; 0 and -inf where no split has a key
    needs   WIDTH a power of two, at least E
    """
    start, _, i_bh, i_b, i_h = place(M, 1, H, ROWS)
    o_m = start + tl.arange(0, ROWS)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for i_s in range(splits):
        i_row = (tl.cast(i_s, tl.int64) * B * H + i_bh) * M
        part_top = tl.load(tops_ptr + i_row + o_m, mask=o_m < M, other=-float("inf"))
        new = tl.maximum(top, part_top)
        shift = tl.where(new == -float("inf"), 0.0, new)
        fade, weight = exp(top - shift, NATURAL), exp(part_top - shift, NATURAL)
        total = total * fade + tl.load(totals_ptr + i_row + o_m, mask=o_m < M, other=0.0) * weight
        acc = acc * fade[:, None] + load_tile(parts_ptr + i_row * E, start, E, M, ROWS, 0, WIDTH, E) * weight[:, None]
        top = new
    lse, low = log_sum_exp(top, total, NATURAL)
    tl.store(lse_ptr + i_bh * M + o_m, lse, mask=o_m < M)
    tl.store(low_ptr + i_bh * M + o_m, low, mask=o_m < M)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    store_tile(out_ptr + i_b * out_strides[0] + i_h * out_strides[1], acc, start, out_strides[2], M, ROWS, 0, WIDTH, E)
    store_low(out_low_ptr, acc, i_bh, start, M, ROWS, 0, WIDTH, E)


@jit
def add(parts_ptr, y_ptr, B, H, M, splits, y_strides, E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """y = the parts added from the first to the last.

    grid    B H cdiv(M, ROWS), row blocks innermost
    layout  parts (splits, B, H, M, E) contiguous; y (B, H, M, E), last stride 1
    math    fp32, rounded once
    needs   WIDTH a power of two, at least E
    """
    start, _, i_bh, i_b, i_h = place(M, 1, H, ROWS)
    start = start.to(tl.int64)  # in 32 bits registers spill on sm_80
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for i_s in range(splits):
        i_row = (tl.cast(i_s, tl.int64) * B * H + i_bh) * M
        acc += load_tile(parts_ptr + i_row * E, start, E, M, ROWS, 0, WIDTH, E)
    store_tile(y_ptr + i_b * y_strides[0] + i_h * y_strides[1], acc, start, y_strides[2], M, ROWS, 0, WIDTH, E)


def by_rows(kernel, y, *args):
    """Launches a kernel over blocks of the rows of y (B, H, M, E)."""
    B, H, M, E = y.shape
    width = power_of_two(E)
    block = power_of_two(min(M, max(1, MERGE["elements"] // width)))
    kernel[(B * H * cdiv(M, block),)](*args, E=E, WIDTH=width, ROWS=block, num_warps=MERGE["num_warps"], **OPTIONS)
