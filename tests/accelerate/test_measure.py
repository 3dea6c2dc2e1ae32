"""The report of a run before and after."""

import io

import pytest
import torch
from rich.console import Console

import fastdiff
from fastdiff.accelerate import measure
from fastdiff.accelerate.measure import difference
from fastdiff.accelerate.rules import Replaced, traced

NOT_WORTH = measure.not_worth


def test_figures(rin, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    model, inputs = rin
    model.train()
    state = torch.random.get_rng_state()
    report = fastdiff.accelerate(model, example=inputs)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert len(report.replaced) == 8
    for row in (report, *report.replaced):
        assert 0 <= row.error_forward < 1e-4 and 0 <= row.error_backward < 1e-4
        assert 0 < row.time_before and 0 < row.time_after and 0 < row.memory_before and 0 < row.memory_after
        assert row.time_before < row.step_before and row.time_after < row.step_after
    assert sum(row.time_before for row in report.replaced) < 2 * report.time_before
    out = capsys.readouterr().out
    assert "the whole model" in out and "left alone" in out


def test_example_kinds(perceiver):
    model, (x,) = perceiver
    for example in (x, (x,), {"data": x}, {"data": x, "mask": torch.rand(2, 9, 10) < 0.5}):
        report = fastdiff.accelerate(model, example, show=False)
        assert report.error_forward < 1e-4 and report.replaced[0].time_after > 0
        fastdiff.restore(model)


def test_errors_are_each_module_on_the_same_input(perceiver_pytorch, monkeypatch):
    from fastdiff.accelerate.rules import perceiver_pytorch as rules

    model = perceiver_pytorch.PerceiverIO(depth=2, dim=16, queries_dim=20, logits_dim=5, num_latents=12, latent_dim=24, latent_heads=3,
                                          latent_dim_head=8, cross_dim_head=16)
    inputs = {"data": torch.randn(2, 90, 16), "queries": torch.randn(2, 7, 20)}
    attention = rules.attention
    monkeypatch.setattr(rules, "attention", lambda q, k, v, **o: attention(q, k, v, **o) + (0.5 if k.shape[2] == 90 else 0.0))
    report = fastdiff.accelerate(model, inputs, show=False)
    wrong = [row.error_forward > 1e-2 for row in report.replaced]
    assert wrong == [row.name == "cross_attend_block.cross_attn.fn" for row in report.replaced]
    assert report.error_forward > 1e-2


def test_a_module_that_holds_others(perceiver, monkeypatch):
    """The read of the whole model is compared too, though it does not call the layers it holds."""
    from fastdiff.accelerate.rules import perceiver_pytorch as rules

    model, (x,) = perceiver
    read = rules.fourier_cross_attend
    monkeypatch.setattr(rules, "fourier_cross_attend", lambda *a, **o: read(*a, **o) + torch.randn(24))
    report = fastdiff.accelerate(model, x, show=False)
    assert [row.error_forward > 1e-2 for row in report.replaced] == [row.name == "(the model)" for row in report.replaced]
    assert all(row.time_after > 0 for row in report.replaced)


def test_a_module_that_does_not_run(perceiver_pytorch):
    kind = perceiver_pytorch.perceiver_pytorch.Attention
    model = kind(8, heads=2, dim_head=4)
    model.spare = kind(8, heads=2, dim_head=4)
    report = fastdiff.accelerate(model, torch.randn(1, 3, 8), show=False)
    assert report.replaced[1].name == "spare" and report.replaced[1].time_before is None
    file = io.StringIO()
    report.print(Console(file=file, width=200))
    assert "not run" in file.getvalue()


def test_difference():
    a = {"x": torch.tensor([1.0, -4.0]), "n": torch.tensor([3]), "y": [torch.zeros(0)]}
    b = {"x": torch.tensor([1.0, -3.0]), "n": torch.tensor([9]), "y": [torch.zeros(0)]}
    assert difference(a, b) == (1.0, 0.25)
    assert difference(a, a) == (0.0, 0.0)


def test_not_faster_is_left_alone(monkeypatch, capsys):
    """Each by its own times: the one is kept as it was, the other replaced."""
    monkeypatch.setattr(measure, "not_worth", NOT_WORTH)
    op = traced.group_norm_modulate
    slow = lambda x, *a, **o: ([op(x, *a, **o) for _ in range(30 * (x.shape[1] == 8))], op(x, *a, **o))[1]
    monkeypatch.setattr(traced, "group_norm_modulate", slow)
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.GroupNorm(2, 8), torch.nn.SiLU(), torch.nn.Conv1d(8, 16, 1)),
                                torch.nn.Sequential(torch.nn.GroupNorm(2, 16), torch.nn.SiLU()))
    report = fastdiff.accelerate(model, torch.randn(8, 8, 2048))
    assert [row.name for row in report.replaced] in ([], ["1"])
    assert not isinstance(model[0], Replaced) and isinstance(model[1], Replaced) == bool(report.replaced)
    assert "not faster at the example's sizes" in next(row.reason for row in report.kept if row.name == "0")
    assert report.share_dense > 0
    assert "not faster" in capsys.readouterr().out


def test_nothing_faster_leaves_the_model_untouched(rin, monkeypatch):
    monkeypatch.setattr(measure, "not_worth", lambda forward, step: True)
    model, inputs = rin
    classes, plain = [type(m) for m in model.modules()], model(*inputs)
    report = fastdiff.accelerate(model, inputs, show=False)
    assert not report.replaced and [type(m) for m in model.modules()] == classes
    assert torch.equal(model(*inputs), plain) and report.error_forward == 0.0 == report.error_backward


def test_not_faster():
    not_faster = measure.not_faster
    assert not_faster([1.0, 2.0, 3.0], [1.0, 2.0, 9.0]) and not_faster([1.0, 2.0], [0.99, 1.99])
    assert not not_faster([1.0, 2.0, 3.0], [0.9, 2.5, 3.0]) and not not_faster([1.0, 2.0, 3.0], [1.1, 1.9, 3.0])


def test_not_worth():
    same, faster, slower = ([1.0, 1.0], [1.0, 1.0]), ([1.0, 1.0], [0.9, 0.9]), ([1.0, 1.0], [1.1, 1.1])
    assert not NOT_WORTH(faster, None) and NOT_WORTH(same, None)
    assert not NOT_WORTH(faster, same) and not NOT_WORTH(same, faster)
    assert NOT_WORTH(same, same) and NOT_WORTH(faster, slower) and NOT_WORTH(slower, faster)


@pytest.mark.parametrize("training", [False, True])
def test_a_slower_backward_counts_in_training(monkeypatch, training):
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            for _ in range(50):
                dx.exp()
            return dx

    op = traced.group_norm_modulate
    monkeypatch.setattr(traced, "group_norm_modulate", lambda *a, **o: Slow.apply(op(*a, **o)))
    model, x = torch.nn.Sequential(torch.nn.GroupNorm(2, 8), torch.nn.SiLU()).train(training), torch.randn(8, 8, 2048)
    monkeypatch.setattr(measure, "not_worth", lambda forward, step: NOT_WORTH(([1.0], [0.9]), step))
    report = fastdiff.accelerate(model, x, show=False)
    assert bool(report.replaced) != training and (report.step_before is not None) == training
    assert not training or "with backward" in report.kept[0].reason
    model.requires_grad_(False)
    assert fastdiff.accelerate(fastdiff.restore(model), x, show=False).replaced, "frozen: it has no training step"


def test_wrong_gradients_are_seen(monkeypatch):
    class Doubles(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return 2 * dx

    op = traced.group_norm_modulate
    monkeypatch.setattr(traced, "group_norm_modulate", lambda *a, **o: Doubles.apply(op(*a, **o)))
    model = torch.nn.Sequential(torch.nn.GroupNorm(2, 8), torch.nn.SiLU())
    report = fastdiff.accelerate(model, torch.randn(2, 8, 9), show=False)
    assert report.error_forward < 1e-6 and 0.9 < report.error_backward < 1.1
    assert 0.9 < report.replaced[0].error_backward < 1.1


def test_memory(monkeypatch):
    """A GroupNorm with SiLU after it makes two tensors (and the norm's statistics), the op one."""
    model, x = torch.nn.Sequential(torch.nn.GroupNorm(2, 8), torch.nn.SiLU()), torch.randn(4, 8, 1000)
    report = fastdiff.accelerate(model, x, show=False)
    size = 4 * x.numel()
    for row in (report, report.replaced[0]):
        assert 2 * size <= row.memory_before < 2.2 * size and size <= row.memory_after < 1.2 * size
