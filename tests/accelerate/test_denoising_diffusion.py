"""The rules of denoising-diffusion-pytorch against its own modules and model."""

import copy
import importlib

import pytest
import torch
from test_rules import compared

import fastdiff
from fastdiff.demo import define_torchvision_operators


@pytest.fixture
def package():
    """Its U-Net's module."""
    pytest.importorskip("ema_pytorch", reason="denoising-diffusion-pytorch's imports are not installed")
    define_torchvision_operators()
    return pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch",
                               reason="denoising-diffusion-pytorch is not installed")


class Conditioned(torch.nn.Module):
    """A Block that takes its scale and shift as two arguments."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, scale, shift):
        return self.block(x, (scale, shift))


@pytest.mark.parametrize("part", ["denoising_diffusion_pytorch", "classifier_free_guidance"])
def test_block(package, part):
    block = importlib.import_module(f"denoising_diffusion_pytorch.{part}").Block(6, 8)
    torch.nn.init.normal_(block.norm.g)
    compared(block, (torch.randn(2, 6, 5, 4),))
    compared(Conditioned(block), (torch.randn(2, 6, 5, 4), torch.randn(2, 8, 1, 1), torch.randn(2, 8, 1, 1)))


def test_block_along_a_line(package):
    compared(importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d").Block(6, 8), (torch.randn(2, 6, 5),))


def test_norm_at_nothing(package):
    """A pixel of zeros is 0, and its gradient is finite, of the size of theirs."""
    norm = package.RMSNorm(4)
    outs = []
    for m in (copy.deepcopy(norm), norm):
        x = torch.zeros(1, 4, 2, 1).index_fill_(2, torch.tensor(1), 1e-3).requires_grad_()
        if m is norm:
            assert fastdiff.accelerate(m, show=False).replaced
        y = m(x)
        outs.append((y, *torch.autograd.grad(y.sum(), x)))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_attend(package, scale):
    compared(package.Attend(scale=scale), tuple(torch.randn(2, 3, 6, 4) for _ in range(3)))


def test_unet(package):
    model = package.Unet(8, dim_mults=(1, 2), attn_dim_head=4, attn_heads=2).eval()
    keys, inputs = list(model.state_dict()), (torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]))
    plain = model(*inputs)
    compared(model, inputs)
    report = fastdiff.accelerate(model, show=False)
    assert {row.kind.rpartition(".")[2] for row in report.replaced} == {"Block", "RMSNorm", "Attend"}
    assert {row.reason for row in report.kept if "LinearAttention" in row.kind} == {
        "linear attention: it has no softmax over scores of queries and keys"}
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(torch.compile(model.mid_block1, backend="eager", fullgraph=True)(torch.ones(1, 16, 4, 4), torch.ones(1, 32)),
                               model.mid_block1(torch.ones(1, 16, 4, 4), torch.ones(1, 32)))
    with torch.autocast("cpu", torch.bfloat16):
        fast = model(*inputs)
        dtype = fastdiff.restore(model)(*inputs).dtype
    assert fast.dtype == dtype
    assert torch.equal(model(*inputs), plain)


def test_dropout_and_hooks(package):
    block, x = package.Block(6, 8, dropout=0.5), torch.randn(2, 6, 5, 4)
    fastdiff.accelerate(block, show=False)
    assert (block.train()(x) == 0).float().mean() > 0.3 and (block.eval()(x) == 0).sum() == 0
    seen = []
    block.norm.register_forward_hook(lambda *_: seen.append(1))
    block(x)
    assert seen
