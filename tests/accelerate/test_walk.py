"""What `accelerate` keeps and `restore` gives back."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastdiff


@pytest.fixture(params=["rin", "perceiver"])
def case(request):
    return request.getfixturevalue(request.param)


def test_keeps_everything_but_the_class(case):
    model, inputs = case
    modules, classes = list(model.modules()), [type(m) for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []
    model.train()
    plain = model.eval()(*inputs)
    model.train()
    victims = [m for m in modules if type(m).__name__ in ("Attend", "Attention")]
    victims[0].register_forward_hook(lambda *_: calls.append(1))
    report = fastdiff.accelerate(model, show=False)
    assert report.replaced and report.error_forward is None
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(isinstance(m, c) for m, c in zip(modules, classes, strict=True)), "isinstance still holds"
    assert all(m.training for m in modules)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not calls
    model.load_state_dict(state)
    fast = model.eval()(*inputs)
    assert calls
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    assert fastdiff.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(*inputs), plain)


def test_copies_stay_accelerated(case):
    model, inputs = case
    plain = model(*inputs)
    fastdiff.accelerate(model, show=False)
    fast = model(*inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(*inputs), fast)
        assert torch.equal(fastdiff.restore(other)(*inputs), plain)
    assert torch.equal(model(*inputs), fast), "restoring a copy leaves the model"


def test_pickle_in_a_new_process(perceiver, tmp_path):
    model, inputs = perceiver
    fastdiff.accelerate(model, show=False)
    torch.save((model, inputs, model(*inputs)), tmp_path / "model.pt")
    code = ("import sys, torch; model, inputs, out = torch.load(sys.argv[1], weights_only=False); assert torch.equal(model(*inputs), out); "
            "from fastdiff.accelerate.rules import Replaced; assert any(isinstance(m, Replaced) for m in model.modules())")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


def test_twice(case):
    model, inputs = case
    first = fastdiff.accelerate(model, show=False)
    fast = model(*inputs)
    second = fastdiff.accelerate(model, show=False)
    assert not second.replaced
    assert [row.name for row in second.kept if row.reason == "already replaced"] == [row.name for row in first.replaced]
    assert torch.equal(model(*inputs), fast)


def test_nothing_to_replace(capsys):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    before = [type(m) for m in model.modules()]
    report = fastdiff.accelerate(model, torch.randn(5, 3))
    assert [type(m) for m in model.modules()] == before
    assert not report.replaced and report.error_forward == 0.0
    assert [(row.name, row.kind, row.reason) for row in report.kept] == [
        ("2 modules", "torch.nn.modules.linear.Linear", "no rule"), ("1 module", "torch.nn.modules.activation.ReLU", "no rule")]
    assert "Nothing was replaced" in capsys.readouterr().out


def test_the_model_itself(perceiver_pytorch):
    attention = perceiver_pytorch.perceiver_pytorch.Attention(8, heads=2, dim_head=4)
    assert fastdiff.accelerate(attention, show=False).replaced[0].name == "(the model)"
    assert type(fastdiff.restore(attention)) is perceiver_pytorch.perceiver_pytorch.Attention


def test_refusals():
    with pytest.raises(TypeError, match=r"model wants a torch\.nn\.Module, got int"):
        fastdiff.accelerate(3)
    with pytest.raises(TypeError, match="example wants a tensor, a tuple or a dict of inputs, got str"):
        fastdiff.accelerate(torch.nn.ReLU(), "x")
    with pytest.raises(TypeError, match=r"model wants a torch\.nn\.Module, got NoneType"):
        fastdiff.restore(None)


def test_a_failing_example_leaves_the_model(perceiver):
    model, _ = perceiver
    classes = [type(m) for m in model.modules()]
    model.train()
    with pytest.raises(RuntimeError):
        fastdiff.accelerate(model, torch.randn(2, 9, 10, 5))
    assert [type(m) for m in model.modules()] == classes
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


class Unseen(torch.nn.Module):
    """What the generic rules know: a norm before SiLU, and attention."""

    def __init__(self):
        super().__init__()
        self.block = torch.nn.Sequential(torch.nn.GroupNorm(2, 8), torch.nn.SiLU(), torch.nn.Conv1d(8, 8, 1))
        self.attend = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        y = self.block(x).transpose(1, 2)
        return self.attend(y, y, y, need_weights=False)[0]


@pytest.fixture(params=["rin", "perceiver", "unseen"])
def any_case(request):
    return (Unseen().eval(), (torch.randn(3, 8, 9),)) if request.param == "unseen" else request.getfixturevalue(request.param)


def traces(model):
    """What may be left behind: classes, attributes, hooks, modes."""
    return [(type(m), dict(vars(m)), {n: dict(v) for n, v in vars(m).items() if isinstance(v, dict)}) for m in model.modules()]


def test_restore_leaves_nothing(any_case):
    model, inputs = any_case
    before, state, plain = traces(model), {k: v.clone() for k, v in model.state_dict().items()}, model(*inputs)
    report = fastdiff.accelerate(model, inputs, show=False)
    assert report.replaced and report.error_forward < 1e-5 and report.error_backward < 1e-4
    changed = [m for m in model.modules() if type(m).__mro__[1] is not torch.nn.Module]
    assert len(changed) >= len(report.replaced)
    fastdiff.restore(model)
    after = traces(model)
    assert [a[0] for a in after] == [b[0] for b in before]
    assert [[(n, id(v)) for n, v in a[1].items()] for a in after] == [[(n, id(v)) for n, v in b[1].items()] for b in before]
    assert [{n: [*v] for n, v in a[2].items()} for a in after] == [{n: [*v] for n, v in b[2].items()} for b in before]
    assert list(model.state_dict()) == list(state) and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(model(*inputs), plain)


def test_compiled_before():
    """torch.compile sees the classes change, both ways."""
    model, x = Unseen().eval(), torch.randn(3, 8, 9)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    plain = compiled(x)
    assert fastdiff.accelerate(compiled, show=False).replaced
    torch.testing.assert_close(compiled(x), plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(compiled(x), model(x))
    fastdiff.restore(compiled)
    assert torch.equal(compiled(x), plain)
    torch.compiler.reset()


@pytest.mark.parametrize("any_case", ["perceiver", "unseen"], indirect=True)
def test_no_graph_break_is_added(any_case):
    """In training; other tests compile whole models of each package in eval mode."""
    model, inputs = any_case
    model.train()

    def breaks():
        torch.compiler.reset()
        return torch._dynamo.explain(model)(*inputs).graph_break_count

    plain = breaks()
    assert fastdiff.accelerate(model, show=False).replaced
    assert breaks() <= plain
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_checkpoints(any_case, reentrant):
    model, inputs = any_case
    inputs = [x.requires_grad_() for x in inputs]
    expected = torch.autograd.grad(model.train()(*inputs).square().sum(), [*model.parameters()], allow_unused=True)
    fastdiff.accelerate(model, show=False)
    checkpoint(model, *inputs, use_reentrant=reentrant).square().sum().backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-4)


def test_dtype_and_device_go_along(any_case):
    """Moved after it was accelerated, a model computes there."""
    model, inputs = any_case
    fastdiff.accelerate(model, show=False)
    if isinstance(model, Unseen):
        exact, half = copy.deepcopy(model).double()(inputs[0].double()), model.to(torch.bfloat16)(inputs[0].bfloat16())
        assert exact.dtype == torch.float64 and half.dtype == torch.bfloat16
        assert (half - exact).abs().max() < 0.05 * exact.abs().max()
    meta = copy.deepcopy(model).to("meta")
    assert meta(*(x.to("meta", p.dtype) for x, p in zip(inputs, [next(model.parameters())] * 2, strict=False))).device.type == "meta"
