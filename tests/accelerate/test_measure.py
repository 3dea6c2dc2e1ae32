"""The report of a run before and after."""

import io

import torch
from rich.console import Console

import fastdiff
from fastdiff.accelerate.measure import difference


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
