"""Attention over a grid by blocks of queries and columns; programs share the rows, and partial results are added in order."""

import torch

from ...core import device
from ...core.backend import triton
from ...core.jit import OPTIONS, cdiv, jit, power_of_two, tl
from ...core.launch import pick, shares
from ...core.softmax import exp, log_sum_exp

LARGEST = 16

# By kernel: rows of (least architecture, largest number of channels, settings). A thread has one query and BLOCK_W columns ("rows"), or
# one pixel and BLOCK_M queries at a time ("planes"), and all its sums in registers; not timed on a GPU yet.
LAUNCH = {
    "rows": ((0, 4, dict(BLOCK_W=16)), (0, None, dict(BLOCK_W=8))),
    "planes": ((0, 4, dict(BLOCK_M=8, BLOCK_N=128, num_warps=4)), (0, None, dict(BLOCK_M=4, BLOCK_N=128, num_warps=4))),
}
MERGE = dict(BLOCK_M=32, num_warps=4)


@jit
def _vectors(x_ptr, step, offsets, mask, K: tl.constexpr):
    """K tensors, `step` elements apart in memory."""
    x = ()
    for k in tl.static_range(K):
        x += (tl.load(x_ptr + k * step + offsets, mask=mask, other=0.0),)
    return x


@jit
def _score(row, column, position, u, pixels, K: tl.constexpr):
    """(row + column) position + sum_k u[k] pixels[k], of tensors that broadcast to each other."""
    s = (column + row) * position
    for k in tl.static_range(K):
        s += u[k] * pixels[k]
    return s


@jit
def _place(Q, M, W, splits, per, R, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """(sample and head, share, column block, its columns, the queries' numbers among all Q and mask, first row, end of the rows).

    On the grid B H splits cdiv(W, BLOCK_W) cdiv(M, BLOCK_M), query blocks innermost.
    """
    blocks, sides = tl.cdiv(M, BLOCK_M), tl.cdiv(W, BLOCK_W)
    pid = tl.program_id(0).to(tl.int64)
    i_w, i_s, i_bh = pid // blocks % sides, pid // blocks // sides % splits, pid // blocks // sides // splits
    o_m = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    begin = (i_s * per).to(tl.int32)
    return i_bh, i_s, i_w, o_w, i_bh * M + o_m, o_m < M, begin, tl.minimum(begin + per, R)


@jit
def _forward(u_ptr, rows_ptr, columns_ptr, planes_ptr, tops_ptr, totals_ptr, sums_ptr, row_tops_ptr, row_sums_ptr, column_sums_ptr, Q, H, M,
             R, W, splits, per, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """What `_merge` makes the results of, for a block of queries, a block of columns and the rows [per i_s, per (i_s + 1)).

    grid    B H splits cdiv(W, BLOCK_W) cdiv(M, BLOCK_M), query blocks innermost: neighbours read the same pixels
    layout  u (B, H, M, K), rows (B, H, M, R), columns (B, H, M, W), planes (B, K + 1, R, W) contiguous; results (parts of its loop, numbers
            of a query, Q) contiguous, Q = B H M: tops, totals, sums of splits x column blocks parts, row_tops, row_sums of column blocks,
            column_sums of splits. Tiles are (BLOCK_W, BLOCK_M): a thread has all the columns of a query, and adds them up alone
    math    running maximum and sums, fp32; a row's sum is relative to the maximum that it is stored with
    needs   K <= LARGEST
    """
    i_bh, i_s, i_w, o_w, o_q, m_q, begin, end = _place(Q, M, W, splits, per, R, BLOCK_M, BLOCK_W)
    m_w = o_w < W
    m_tile = m_w & m_q
    planes_ptr += i_bh // H * (K + 1) * R * W
    plane = tl.cast(R, tl.int64) * W
    u = _vectors(u_ptr, 1, o_q * K, m_q, K)
    columns = tl.load(columns_ptr + o_q * W + o_w, mask=m_tile, other=0.0)
    column_sums = tl.zeros([BLOCK_W, BLOCK_M], tl.float32)
    top = tl.full([1, BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([1, BLOCK_M], tl.float32)
    sums = ()
    for _ in tl.static_range(K):
        sums += (tl.zeros([1, BLOCK_M], tl.float32),)
    for y in range(begin, end):
        o_pixel = tl.cast(y, tl.int64) * W + o_w
        pixels = _vectors(planes_ptr, plane, o_pixel, m_w, K)
        position = tl.load(planes_ptr + K * plane + o_pixel, mask=m_w, other=0.0)
        row = tl.load(rows_ptr + o_q * R + y, mask=m_q, other=0.0)
        s = tl.where(m_w, _score(row, columns, position, u, pixels, K), -float("inf"))
        new = tl.maximum(top, tl.max(s, 0, keep_dims=True))
        fade, p = exp(top - new, True), exp(s - new, True)
        top = new
        weight = p * position
        column_sums = column_sums * fade + weight
        total = total * fade + tl.sum(p, 0, keep_dims=True)
        more = ()
        for k in tl.static_range(K):
            more += (sums[k] * fade + tl.sum(p * pixels[k], 0, keep_dims=True),)
        sums = more
        o_row = (i_w * R + y) * Q + o_q
        tl.store(row_tops_ptr + o_row, top, mask=m_q)
        tl.store(row_sums_ptr + o_row, tl.sum(weight, 0, keep_dims=True), mask=m_q)

    part = i_s * tl.cdiv(W, BLOCK_W) + i_w
    tl.store(tops_ptr + part * Q + o_q, top, mask=m_q)
    tl.store(totals_ptr + part * Q + o_q, total, mask=m_q)
    for k in tl.static_range(K):
        tl.store(sums_ptr + (part * K + k) * Q + o_q, sums[k], mask=m_q)
    tl.store(column_sums_ptr + (i_s * W + o_w) * Q + o_q, column_sums, mask=m_tile)


@jit
def _normalise(tops_ptr, totals_ptr, base_ptr, scale_ptr, lse_ptr, low_ptr, parts, Q, BLOCK: tl.constexpr):
    """base = max over parts of tops, scale = 1 / sum of exp(tops - base) totals, lse = base - log(scale) as two floats.

    grid    cdiv(Q, BLOCK)
    layout  tops, totals (parts, Q), the rest (Q,), contiguous
    math    fp32, the logarithm added in fp64; 0 and -inf without a pixel
    needs   BLOCK a power of two
    """
    o_q = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_q = o_q < Q
    base = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(parts):
        i_part = tl.cast(i, tl.int64) * Q
        top = tl.load(tops_ptr + i_part + o_q, mask=m_q, other=0.0)
        new = tl.maximum(base, top)
        total = total * exp(base - new, True) + tl.load(totals_ptr + i_part + o_q, mask=m_q, other=1.0) * exp(top - new, True)
        base = new
    lse, low = log_sum_exp(base, total, True)
    tl.store(base_ptr + o_q, base, mask=m_q)
    tl.store(scale_ptr + o_q, 1.0 / tl.where(total == 0, 1.0, total), mask=m_q)
    tl.store(lse_ptr + o_q, lse, mask=m_q)
    tl.store(low_ptr + o_q, low, mask=m_q)


@jit
def _merge(parts_ptr, y_ptr, tops_ptr, base_ptr, scale_ptr, rest_ptr, result_ptr, parts, Q, N, top_strides, EACH: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y[q, n] = sum_i parts[i, n, q], first to last; with tops weighted by exp(tops - base) scale, with a rest less rest result.

    grid    cdiv(N, BLOCK_N) cdiv(Q, BLOCK_M), query blocks innermost
    layout  parts (parts, N, Q), y, result (Q, N), base, scale, rest (Q,) contiguous; EACH numbers n share a top, at
            i top_strides[0] + n // EACH top_strides[1] + q
    math    fp32; rest result is rounded before it is taken off, so that what is equal leaves 0
    needs   no fusion of multiply and add
    """
    blocks = tl.cdiv(Q, BLOCK_M)
    pid = tl.program_id(0).to(tl.int64)
    o_q = (pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    o_n = (pid // blocks * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    m_q, m_y = o_q < Q, (o_q < Q) & (o_n < N)
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if tops_ptr is not None:
        base = tl.load(base_ptr + o_q, mask=m_q, other=0.0)
    for i in range(parts):
        i_part = tl.cast(i, tl.int64)
        part = tl.load(parts_ptr + (i_part * N + o_n) * Q + o_q, mask=m_y, other=0.0)
        if tops_ptr is not None:
            top = tl.load(tops_ptr + i_part * top_strides[0] + o_n // EACH * top_strides[1] + o_q, mask=m_y, other=0.0)
            part = part * exp(top - base, True)
        y += part
    if tops_ptr is not None:
        y = y * tl.load(scale_ptr + o_q, mask=m_q, other=0.0)
    if rest_ptr is not None:
        y = y - tl.load(rest_ptr + o_q, mask=m_q, other=0.0) * tl.load(result_ptr + o_q * N + o_n, mask=m_y, other=0.0)
    tl.store(y_ptr + o_q * N + o_n, y, mask=m_y)


@jit
def _query_gradients(u_ptr, rows_ptr, columns_ptr, planes_ptr, dsums_ptr, drow_sums_ptr, dcolumn_sums_ptr, lse_ptr, low_ptr, delta_ptr,
                     rests_ptr, du_ptr, drows_ptr, dcolumns_ptr, Q, H, M, R, W, splits, per, K: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_W: tl.constexpr):
    """What `_merge` makes the gradients of u, rows and columns of, for the programs of `_forward`.

    grid    as in `_forward`
    layout  as in `_forward`: gradients of results (B, H, M, ...); rests and du as its totals and sums, drows and dcolumns as its row_sums
            and column_sums
    math    P = exp(S - lse), dS = P (dP - delta), dP as S with the results' gradients for u, rows, columns; du = sum dS pixels, drows and
            dcolumns the sums of dS position; rests = sum dS, which the rounding of delta leaves
    needs   as in `_forward`
    """
    i_bh, i_s, i_w, o_w, o_q, m_q, begin, end = _place(Q, M, W, splits, per, R, BLOCK_M, BLOCK_W)
    m_w = o_w < W
    m_tile = m_w & m_q
    planes_ptr += i_bh // H * (K + 1) * R * W
    plane = tl.cast(R, tl.int64) * W
    u, dsums = _vectors(u_ptr, 1, o_q * K, m_q, K), _vectors(dsums_ptr, 1, o_q * K, m_q, K)
    columns = tl.load(columns_ptr + o_q * W + o_w, mask=m_tile, other=0.0)
    dcolumn_sums = tl.load(dcolumn_sums_ptr + o_q * W + o_w, mask=m_tile, other=0.0)
    lse, low = tl.load(lse_ptr + o_q, mask=m_q, other=float("inf")), tl.load(low_ptr + o_q, mask=m_q, other=0.0)
    delta = tl.load(delta_ptr + o_q, mask=m_q, other=0.0)
    dcolumns = tl.zeros([BLOCK_W, BLOCK_M], tl.float32)
    rest = tl.zeros([1, BLOCK_M], tl.float32)
    du = ()
    for _ in tl.static_range(K):
        du += (tl.zeros([1, BLOCK_M], tl.float32),)
    for y in range(begin, end):
        o_pixel = tl.cast(y, tl.int64) * W + o_w
        pixels = _vectors(planes_ptr, plane, o_pixel, m_w, K)
        position = tl.load(planes_ptr + K * plane + o_pixel, mask=m_w, other=0.0)
        row = tl.load(rows_ptr + o_q * R + y, mask=m_q, other=0.0)
        drow_sum = tl.load(drow_sums_ptr + o_q * R + y, mask=m_q, other=0.0)
        p = exp((_score(row, columns, position, u, pixels, K) - lse) - low, True)
        ds = tl.where(m_w, p * (_score(drow_sum, dcolumn_sums, position, dsums, pixels, K) - delta), 0.0)
        rest += tl.sum(ds, 0, keep_dims=True)
        more = ()
        for k in tl.static_range(K):
            more += (du[k] + tl.sum(ds * pixels[k], 0, keep_dims=True),)
        du = more
        ds = ds * position
        dcolumns += ds
        tl.store(drows_ptr + (i_w * R + y) * Q + o_q, tl.sum(ds, 0, keep_dims=True), mask=m_q)

    part = i_s * tl.cdiv(W, BLOCK_W) + i_w
    tl.store(rests_ptr + part * Q + o_q, rest, mask=m_q)
    for k in tl.static_range(K):
        tl.store(du_ptr + (part * K + k) * Q + o_q, du[k], mask=m_q)
    tl.store(dcolumns_ptr + (i_s * W + o_w) * Q + o_q, dcolumns, mask=m_tile)


@jit
def _plane_gradients(u_ptr, rows_ptr, columns_ptr, planes_ptr, dsums_ptr, drow_sums_ptr, dcolumn_sums_ptr, lse_ptr, low_ptr, delta_ptr,
                     dplanes_ptr, B, HM, R, W, splits, per, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dplanes of a block of pixels from the queries [per i_s, per (i_s + 1)) of the HM of its sample.

    grid    B splits cdiv(R W, BLOCK_N), pixel blocks innermost: neighbours read the same queries
    layout  as in `_query_gradients`; dplanes (splits, B, K + 1, R W) contiguous. Tiles are (BLOCK_M, BLOCK_N): a thread has one pixel
    math    as in `_query_gradients`: sum over queries of dS u + P dsums, and for the last plane of dS (row + column) + P (drow + dcolumn)
    needs   per % BLOCK_M = 0; delta with what its rounding left, so that the dS of a query add up to 0
    """
    N = tl.cast(R, tl.int64) * W
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    i_s, i_b = pid // blocks % splits, pid // blocks // splits
    o_n = (pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    m_n = o_n < N
    o_row, o_w = o_n // W, o_n % W
    i_plane = i_b * (K + 1) * N
    pixels = _vectors(planes_ptr + i_plane, N, o_n, m_n, K)
    position = tl.load(planes_ptr + i_plane + K * N + o_n, mask=m_n, other=0.0)
    dposition = tl.zeros([1, BLOCK_N], tl.float32)
    dpixels = ()
    for _ in tl.static_range(K):
        dpixels += (tl.zeros([1, BLOCK_N], tl.float32),)
    begin = (i_s * per).to(tl.int32)
    for i_m in range(begin, tl.minimum(begin + per, HM), BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)[:, None]
        m_m = o_m < HM
        m_tile = m_m & m_n
        o_q = i_b * HM + o_m
        u, dsums = _vectors(u_ptr, 1, o_q * K, m_m, K), _vectors(dsums_ptr, 1, o_q * K, m_m, K)
        row, drow_sum = (tl.load(rows_ptr + o_q * R + o_row, mask=m_tile, other=0.0),
                         tl.load(drow_sums_ptr + o_q * R + o_row, mask=m_tile, other=0.0))
        column, dcolumn_sum = (tl.load(columns_ptr + o_q * W + o_w, mask=m_tile, other=0.0),
                               tl.load(dcolumn_sums_ptr + o_q * W + o_w, mask=m_tile, other=0.0))
        lse, low = tl.load(lse_ptr + o_q, mask=m_m, other=float("inf")), tl.load(low_ptr + o_q, mask=m_m, other=0.0)
        delta = tl.load(delta_ptr + o_q, mask=m_m, other=0.0)
        p = exp((_score(row, column, position, u, pixels, K) - lse) - low, True)
        ds = p * (_score(drow_sum, dcolumn_sum, position, dsums, pixels, K) - delta)
        dposition += tl.sum(ds * (column + row) + p * (dcolumn_sum + drow_sum), 0, keep_dims=True)
        more = ()
        for k in tl.static_range(K):
            more += (dpixels[k] + tl.sum(ds * u[k] + p * dsums[k], 0, keep_dims=True),)
        dpixels = more

    dplanes_ptr += (i_s * B + i_b) * (K + 1) * N
    for k in tl.static_range(K):
        tl.store(dplanes_ptr + k * N + o_n, dpixels[k], mask=m_n)
    tl.store(dplanes_ptr + K * N + o_n, dposition, mask=m_n)


def _blocks(u, rows, columns):
    """Settings of the kernels that go over rows, the number of column blocks, and how programs share the rows."""
    B, H, M, K = u.shape
    architecture = device.architecture(u.device)
    block = min(128, power_of_two(M, least=32))
    chosen = dict(pick(LAUNCH["rows"], architecture, K), BLOCK_M=block, num_warps=block // 32)
    sides = cdiv(columns.shape[3], chosen["BLOCK_W"])
    return chosen, sides, *shares(architecture, B * H * cdiv(M, block) * sides, rows.shape[3], 1)


def _add(y, parts, *, tops=None, strides=(0, 0), each=1, base=None, scale=None, rest=None, result=None):
    """y (..., N) from parts (parts, N, Q), by `_merge`."""
    count, N, Q = parts.shape
    block = min(32, power_of_two(N))
    if N:
        _merge[(cdiv(N, block) * cdiv(Q, MERGE["BLOCK_M"]),)](
            parts, y, tops, base, scale, rest, result, count, Q, N, strides, EACH=each, BLOCK_N=block, **MERGE,
            **OPTIONS | dict(enable_fp_fusion=False))


def _run_forward(args, outs):
    u, rows, columns, planes = (x.contiguous() for x in args)
    sums, row_sums, column_sums, lse, low = outs
    (B, H, M, K), R, W, Q = u.shape, rows.shape[3], columns.shape[3], lse.numel()
    if not Q:
        return
    chosen, sides, splits, per = _blocks(u, rows, columns)
    parts = splits * sides
    tops, totals, sum_parts, row_tops, row_parts, column_parts = (
        u.new_empty(shape) for shape in ((parts, Q), (parts, Q), (parts, K, Q), (sides, R, Q), (sides, R, Q), (splits, W, Q)))
    if parts:
        _forward[(B * H * cdiv(M, chosen["BLOCK_M"]) * parts,)](u, rows, columns, planes, tops, totals, sum_parts, row_tops, row_parts,
                                                                column_parts, Q, H, M, R, W, splits, per, K=K, **chosen, **OPTIONS)
    base, scale = u.new_empty(Q), u.new_empty(Q)
    _normalise[(cdiv(Q, 128),)](tops, totals, base, scale, lse, low, parts, Q, BLOCK=128, num_warps=4, **OPTIONS)
    weights = dict(base=base, scale=scale)
    _add(sums, sum_parts, tops=tops, strides=(Q, 0), **weights)
    _add(row_sums, row_parts, tops=row_tops, strides=(R * Q, Q), **weights)
    _add(column_sums, column_parts, tops=tops, strides=(sides * Q, Q), each=chosen["BLOCK_W"], **weights)


def _run_backward(args, outs):
    douts, inputs, results, planes_grad = args[:3], args[3:7], args[7:12], args[12]
    du, drows, dcolumns, dplanes = outs
    dsums, drow_sums, dcolumn_sums, u, rows, columns, planes, sums, row_sums, column_sums, lse, low = (
        x.contiguous() for x in (*douts, *inputs, *results))
    (B, H, M, K), R, W, Q = u.shape, rows.shape[3], columns.shape[3], lse.numel()
    if not Q:
        dplanes.zero_()
        return
    delta = sum((d * y).sum(-1) for d, y in ((dsums, sums), (drow_sums, row_sums), (dcolumn_sums, column_sums)))
    tensors = (u, rows, columns, planes, dsums, drow_sums, dcolumn_sums, lse, low)
    chosen, sides, splits, per = _blocks(u, rows, columns)
    parts = splits * sides
    rests, du_parts, drow_parts, dcolumn_parts = (
        u.new_empty(shape) for shape in ((parts, 1, Q), (parts, K, Q), (sides, R, Q), (splits, W, Q)))
    if parts:
        _query_gradients[(B * H * cdiv(M, chosen["BLOCK_M"]) * parts,)](
            *tensors, delta, rests, du_parts, drow_parts, dcolumn_parts, Q, H, M, R, W, splits, per, K=K, **chosen, **OPTIONS)
    rest = torch.empty_like(lse)
    _add(rest, rests)
    for y, y_parts, result in ((du, du_parts, sums), (drows, drow_parts, row_sums), (dcolumns, dcolumn_parts, column_sums)):
        _add(y, y_parts, rest=rest, result=result)
    if planes_grad and dplanes.numel():
        settings = pick(LAUNCH["planes"], device.architecture(u.device), K)
        tiles = B * cdiv(R * W, settings["BLOCK_N"])
        splits, per = shares(device.architecture(u.device), tiles, H * M, settings["BLOCK_M"])
        made = dplanes if splits == 1 else dplanes.new_empty((splits, *dplanes.shape))
        _plane_gradients[(tiles * splits,)](*tensors, delta + rest, made, B, H * M, R, W, splits, per, K=K, **settings, **OPTIONS)
        if splits > 1:
            torch.sum(made, 0, out=dplanes)


def _refuse(u):
    if u.dtype != torch.float32:
        return f"computes in float32, and {u.dtype} was asked for"
    return None if 1 <= u.shape[3] <= LARGEST else f"takes 1 to {LARGEST} channels, got {u.shape[3]}"


def _plan(u, rows, columns, planes):
    chosen, sides, splits, per = _blocks(u, rows, columns)
    return (f"positions factored into {rows.shape[3]} rows and {columns.shape[3]} columns; blocks of {chosen['BLOCK_M']} queries and "
            f"{chosen['BLOCK_W']} columns ({sides} of these); {splits} programs share the rows, {per} each, and merge in order")


FORWARD = triton(_run_forward, dtypes=None, refuse=lambda u, *_: _refuse(u), plan=_plan)
BACKWARD = triton(_run_backward, dtypes=None, refuse=lambda dsums, *_: _refuse(dsums))
