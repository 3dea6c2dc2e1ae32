"""fastdiff.sdpa(): what it redirects, and what it leaves to PyTorch."""

import contextlib
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdiff
from fastdiff.accelerate import redirect

ORIGINAL = F.scaled_dot_product_attention


@pytest.fixture
def calls(monkeypatch):
    """The (q shape, keywords) of every call that reached our op."""
    seen = []
    attention = redirect.attention

    def noted(q, k, v, **options):
        seen.append((tuple(q.shape), options))
        return attention(q, k, v, **options)

    monkeypatch.setattr(redirect, "attention", noted)
    return seen


def qkv(*lead, M=5, N=7, E=4, dtype=torch.float32, grad=False):
    torch.manual_seed(0)
    return [torch.randn(*lead, S, E, dtype=dtype, requires_grad=grad) for S in (M, N, N)]


def agree(q, k, v, *args, **options):
    """The same values and gradients inside and outside, in each argument that wants one."""
    inputs = [x for x in (q, k, v, *args, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    plain = F.scaled_dot_product_attention(q, k, v, *args, **options)
    with fastdiff.sdpa():
        out = F.scaled_dot_product_attention(q, k, v, *args, **options)
    assert F.scaled_dot_product_attention is ORIGINAL
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if out.dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out, plain, **tolerance)
    if inputs:
        dout = torch.randn_like(plain)
        for a, b in zip(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(plain, inputs, dout), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (2, 2, 1, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(5, 7), (7, 5), (6, 6), (1, 4), (4, 1)], ids=str)
def test_dimensions_and_causality(calls, lead, causal, sizes):
    M, N = sizes
    agree(*qkv(*lead, M=M, N=N, grad=True), is_causal=causal)
    assert len(calls) == 1 and len(calls[0][0]) == 4


@pytest.mark.parametrize("lead,shape", [
    ((), (5, 7)), ((3,), (5, 7)), ((3,), (3, 1, 7)), ((2, 3), (5, 7)), ((2, 3), (1, 7)), ((2, 3), (3, 5, 7)), ((2, 3), (2, 1, 1, 7)),
    ((2, 3), (2, 3, 5, 7)), ((2, 1, 3), (2, 1, 1, 5, 7)), ((2, 2, 3), (2, 1, 5, 7))], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(calls, lead, shape, kind):
    torch.manual_seed(1)
    mask = torch.rand(shape) < 0.5 if kind == "bool" else torch.randn(shape, requires_grad=True)
    agree(*qkv(*lead, grad=True), attn_mask=mask)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_without_keys(calls, kind):
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    agree(*qkv(2, 3), mask if kind == "bool" else torch.zeros(5, 7).masked_fill(~mask, -torch.inf))
    assert len(calls) == 1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lead", [(), (2,), (2, 2)], ids=str)
def test_grouped_heads(calls, lead, causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(*lead, 6, 5, 4), torch.randn(*lead, 2, 5, 4), torch.randn(*lead, 3 if causal else 2, 5, 4)
    if causal:
        v = v[..., :2, :, :]
    agree(q, k, v, is_causal=causal, enable_gqa=True)
    assert calls


def test_options(calls):
    agree(*qkv(2, 3), scale=0.3)
    agree(*qkv(2, 3), None, 0.0, False)
    agree(*qkv(2, 3, dtype=torch.bfloat16))
    agree(*qkv(2, 3, dtype=torch.float16))
    with torch.autocast("cpu", torch.bfloat16):
        agree(*qkv(2, 3))
    assert calls[0][1]["scale"] == 0.3 and len(calls) == 5


def test_left_to_pytorch(calls):
    q, k, v = qkv(2, 3)
    with fastdiff.sdpa():
        torch.manual_seed(0)
        dropped = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(dropped, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    agree(q.double(), k.double(), v.double())
    agree(q, k, v[..., :3])
    agree(q, k[:1], v[:1])
    agree(q, k, v, torch.zeros(5, 7), is_causal=True)
    agree(q.bfloat16(), k.bfloat16(), v.bfloat16(), torch.zeros(5, 7))
    subclass = type("Mine", (torch.Tensor,), {})
    agree(q.as_subclass(subclass), k, v)
    assert not calls


@pytest.mark.parametrize("arguments,options", [
    (qkv(2, 3), {"attn_mask": torch.zeros(5, 5), "is_causal": False}),
    ((torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 4)), {}), ((None, None, None), {}), ((1, 2, 3), {}),
    ([torch.zeros(2, 2, 2, 2, dtype=torch.int64)] * 3, {})])
def test_faults_are_pytorchs(arguments, options):
    outcomes = []
    for block in (contextlib.nullcontext(), fastdiff.sdpa()):
        with block, pytest.raises(Exception) as caught:
            F.scaled_dot_product_attention(*arguments, **options)
        outcomes.append((caught.type, str(caught.value)))
    assert outcomes[0] == outcomes[1]
    assert F.scaled_dot_product_attention is ORIGINAL


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_layer(calls, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    x, padding = torch.randn(3, 6, 16), torch.arange(6) >= torch.tensor([6, 4, 1])[:, None]
    causal = {"src_mask": nn.Transformer.generate_square_subsequent_mask(6), "is_causal": True}
    for options in ({}, {"src_key_padding_mask": padding}, causal):
        plain = layer(x, **options)
        with fastdiff.sdpa():
            out = layer(x, **options)
        torch.testing.assert_close(out, plain)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), layer.parameters()), torch.autograd.grad(plain.sum(), layer.parameters()),
                                   rtol=1e-3, atol=1e-4)
    assert len(calls) == 3


def test_names_imported_elsewhere(calls, monkeypatch):
    module = types.ModuleType("someones_model")
    module.attend = ORIGINAL
    module.other = len
    monkeypatch.setitem(sys.modules, "someones_model", module)
    with fastdiff.sdpa():
        module.attend(*qkv(2, 3))
    assert len(calls) == 1 and module.attend is ORIGINAL and module.other is len


def test_nesting_and_exceptions(calls):
    with pytest.raises(KeyError), fastdiff.sdpa():
        with pytest.raises(ZeroDivisionError), fastdiff.sdpa():
            raise ZeroDivisionError
        F.scaled_dot_product_attention(*qkv(2, 3))
        raise KeyError
    assert len(calls) == 1
    F.scaled_dot_product_attention(*qkv(2, 3))
    assert len(calls) == 1 and F.scaled_dot_product_attention is ORIGINAL and not redirect._NAMES


def test_somebody_elses_patch_comes_back(monkeypatch):
    def patch(*args, **options):
        return "patched"

    monkeypatch.setattr(F, "scaled_dot_product_attention", patch)
    with fastdiff.sdpa():
        assert F.scaled_dot_product_attention(*qkv(2, 3)).shape == (2, 3, 5, 4)
    assert F.scaled_dot_product_attention is patch


def test_threads(calls):
    """A thread outside sees PyTorch's function while another is inside, whoever leaves first."""
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def inside():
        with fastdiff.sdpa():
            entered.set()
            leave.wait(10)
        left.set()

    thread = threading.Thread(target=inside)
    thread.start()
    assert entered.wait(10)
    F.scaled_dot_product_attention(*qkv(2, 3))
    assert not calls
    with fastdiff.sdpa():
        leave.set()
        assert left.wait(10)
        F.scaled_dot_product_attention(*qkv(2, 3))
    thread.join()
    assert len(calls) == 1 and F.scaled_dot_product_attention is ORIGINAL


def test_many_threads():
    failures = []

    def work():
        try:
            for _ in range(20):
                with fastdiff.sdpa():
                    F.scaled_dot_product_attention(*qkv(1, 1))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and F.scaled_dot_product_attention is ORIGINAL and redirect._BLOCKS == 0


def test_compile_inside():
    """Compiled code follows the block it is called in, whichever came first."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    run = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True) + 1, backend=backend, fullgraph=True)
    arguments = qkv(2, 3)
    plain = run(*arguments)
    with fastdiff.sdpa():
        torch.testing.assert_close(run(*arguments), plain)
    assert torch.equal(run(*arguments), plain)
    assert ["fastdiff" in code for code in graphs] == [False, True]
    torch._dynamo.reset()
    with fastdiff.sdpa():
        run(*arguments)
    assert torch.equal(run(*arguments), plain)
    assert ["fastdiff" in code for code in graphs[2:]] == [True, False]


def test_transforms():
    q, k, v = qkv(2, 3)
    with fastdiff.sdpa():
        mapped = torch.func.vmap(F.scaled_dot_product_attention)(q, k, v)
        _, tangent = torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, k, v), (q,), (torch.ones_like(q),))
    torch.testing.assert_close(mapped, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(tangent, torch.func.jvp(lambda q: torch.softmax(q @ k.mT / 2, -1) @ v, (q,), (torch.ones_like(q),))[1])
