import pytest
import torch


@pytest.fixture
def rin_attention(rin_pytorch):
    return rin_pytorch.rin_pytorch.Attention


@pytest.fixture
def config(transformers_perceiver):
    return transformers_perceiver.PerceiverConfig(num_latents=6, d_latents=24, num_self_attends_per_block=1, num_self_attention_heads=3,
                                                  num_cross_attention_heads=1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def same():
    """Holds two modules to the same outputs and gradients, in float64 and float32.

    parameters: {name in mine: the other's gradient of it, as a function of the other module}; they are all that mine trains.
    """

    def check(load, theirs, call, inputs, parameters):
        with torch.no_grad():
            for p in theirs.parameters():
                p.normal_(0.0, 0.5)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            theirs.to(dtype)
            mine = load(theirs)
            sides = []
            for function in (mine, lambda *x: call(theirs, *x)):
                given = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
                out = function(*given)
                (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum().backward()
                sides.append([out, *(x.grad for x in given)])
            grads = {name: p.grad for name, p in mine.named_parameters() if p.requires_grad}
            assert set(grads) == set(parameters)
            pairs = [*zip(*sides, strict=True), *((grads[name], of(theirs)) for name, of in parameters.items())]
            # Of the largest: a gradient that is 0, as a key bias's, comes out of sums as large as the others.
            size = max(1.0, *(want.abs().max().item() for _, want in pairs))
            for got, want in pairs:
                torch.testing.assert_close(got, want, rtol=0, atol=tolerance * size)
            theirs.zero_grad()

    return check
