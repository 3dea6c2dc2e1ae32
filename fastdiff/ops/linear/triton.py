"""A matrix product by tiles, each the work of one program, its terms added in one order whatever the sizes beside K."""

from ...core import device
from ...core.backend import triton
from ...core.jit import OPTIONS, cdiv, dot, jit, narrow, tl
from ...core.launch import pick

# By element size; chosen so that no kernel spills registers, not timed on a GPU yet.
LAUNCH = {
    2: ((0, None, dict(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=3)),),
    4: ((0, None, dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, num_warps=8, num_stages=2)),),
}


@jit
def _product(x_ptr, weight_ptr, bias_ptr, added_ptr, y_ptr, M, N, K, x_strides, weight_strides,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of y = x weight^T + bias + added.

    grid    cdiv(M, BLOCK_M) cdiv(N, BLOCK_N), row blocks innermost: neighbours read the same weights
    layout  x (M, K), weight (N, K), any strides; bias (N,) and added, y (M, N) contiguous; bias and added may be None
    math    fp32, from the first block of K to the last, rounded once
    needs   blocks that are powers of two of at least 16
    """
    blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0).to(tl.int64)
    o_m, o_n = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M), pid // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = (o_m < M)[:, None], (o_n < N)[None, :]
    x_ptr += o_m[:, None] * x_strides[0]
    weight_ptr += o_n[None, :] * weight_strides[0]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K).to(tl.int64)
        x = tl.load(x_ptr + o_k[None, :] * x_strides[1], mask=m_m & (o_k < K)[None, :], other=0.0)
        weight = tl.load(weight_ptr + o_k[:, None] * weight_strides[1], mask=m_n & (o_k < K)[:, None], other=0.0)
        acc = dot(x, weight, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    if added_ptr is not None:
        acc += tl.load(added_ptr + o_m[:, None] * N + o_n[None, :], mask=m_m & m_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + o_m[:, None] * N + o_n[None, :], narrow(acc, y_ptr.dtype.element_ty), mask=m_m & m_n)


def _run(args, outs):
    x, weight, *more = args
    bias, added = (None if a is None else a.contiguous() for a in more)
    (M, K), N = x.shape, weight.shape[0]
    chosen = pick(LAUNCH[x.element_size()], device.architecture(x.device), K)
    if M * N:
        grid = (cdiv(M, chosen["BLOCK_M"]) * cdiv(N, chosen["BLOCK_N"]),)
        _product[grid](x, weight, bias, added, outs[0], M, N, K, x.stride(), weight.stride(), **chosen, **OPTIONS)


FORWARD = triton(_run, plan=lambda *_: "tiles over whole rows, one order of addition")
