"""bench: what a record holds, its arithmetic, and that a wrong result or an impossible time is never one."""

import json
import sys
import types

import pytest
import torch

import fastdiff
from fastdiff.bench import inputs, memory, overhead, report, roofline, suite, timer
from fastdiff.core.backend import Backend
from fastdiff.core.case import Array, Case, Dim, Integers
from fastdiff.core.contract import REGISTRY, contract, public

RECORD = ["op", "case", "dtype", "pass", "device", "threads", "backend", "shape", "ours_ms", "peers_ms", "best_peer", "ratio", "ratio_low",
          "ratio_high", "floor_ms", "of_floor", "peak_bytes", "peer_peak_bytes", "error", "error_limit"]
ROW = "1x3x16x128x128 p2,4,4"


@pytest.fixture
def ceilings(monkeypatch):
    """High enough for any machine, and measured in no time."""
    known = roofline.Ceilings("cpu", torch.get_num_threads(), 1e6, {"float32": 1e9, "bfloat16": 1e9})
    monkeypatch.setattr(roofline, "MEASURED", {("cpu", known.threads): known})
    monkeypatch.setattr(roofline.Ceilings, "measure", lambda self, dtypes, seconds=0: self)
    return known


def _scale(value):
    """A backend that multiplies by `value`."""
    return Backend("cpu", ("cpu",), lambda args, outs: outs[0].copy_(args[0] * value))


@pytest.fixture
def double(monkeypatch, request):
    """An op that should double its input, computed as `request.param` times it."""
    module = types.ModuleType("fake_double")
    module.cases = types.ModuleType("fake_double.cases")
    module.cases.CASES = {"double": Case(
        dims={"N": Dim(0, 64)}, arguments=lambda N: {"x": Array((N, 8))}, flops=lambda x: x.shape[0] * 8,
        bytes=lambda size, x: 2 * size * x.shape[0] * 8, batched=("x",), linear=True, bench={"64": {"N": 64}})}
    monkeypatch.setitem(sys.modules, "fake_double", module)
    monkeypatch.setitem(sys.modules, "fake_double.cases", module.cases)
    # torch keeps a schema for the life of the process, so that every test defines a name of its own.
    made = contract(f"double_for_{request.node.originalname}(Tensor x) -> Tensor", outputs=lambda x: x.new_empty(x.shape),
                    reference=lambda x: x * 2, backends=(_scale(request.param),), module="fake_double")
    def double(x):
        return made(x)

    module.double = double
    yield
    del REGISTRY[made.name]


def test_ratio_arithmetic():
    keys = timer.compare({"ours": [0.001, 0.002, 0.004], "slow": [0.009, 0.009, 0.009], "fast": [0.002, 0.002, 0.004]})
    assert keys["ours_ms"] == pytest.approx(2) and keys["peers_ms"] == pytest.approx({"slow": 9, "fast": 2})
    assert keys["best_peer"] == "fast" and keys["ratio"] == pytest.approx(1)
    # Pairs are 2, 1, 1.
    assert keys["ratio_low"] == pytest.approx(1) and keys["ratio_high"] == pytest.approx(1.6)


def test_without_a_peer_there_is_no_ratio():
    assert timer.compare({"ours": [0.002]}) == {"ours_ms": 2.0, "peers_ms": {}, "best_peer": None, "ratio": None, "ratio_low": None,
                                                "ratio_high": None}


def test_interleaving():
    """Every round times every call once, in rotated order, on ever new inputs, for exactly the clock's difference."""
    now, order, seen = [0.0], [], []

    def call(name, seconds):
        def run(i):
            order.append(name)
            seen.append(i)
            now[0] += seconds

        return run

    samples = timer.interleave({"a": call("a", 1.0), "b": call("b", 2.0), "c": call("c", 4.0)}, timer.Budget(3, 0, 99), lambda: now[0])
    assert samples == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}
    assert "".join(order) == "abcbcacab" and seen == list(range(9))


@pytest.mark.parametrize("seconds, rounds", [(0.001, 500), (0.05, 30), (0.5, 6), (2.0, 5)])
def test_budget(seconds, rounds):
    """30 pairs over half a second, or 3 seconds and 5 pairs."""
    now = [0.0]

    def run(i):
        now[0] += seconds

    assert len(timer.interleave({"ours": run}, timer.Budget(), lambda: now[0])["ours"]) == pytest.approx(rounds, abs=1)


def test_floor_is_the_higher_of_two():
    c = roofline.Ceilings("cpu", 1, 10.0, {"float32": 100.0, "bfloat16": 50.0})
    assert c.floor_ms(flops=1e9, bytes_=1e6, dtype="float32") == pytest.approx(10)
    assert c.floor_ms(flops=1e6, bytes_=1e9, dtype="float32") == pytest.approx(100)
    assert c.floor_ms(flops=1e6, bytes_=1e9, dtype="float32", copy_GBs=20.0) == pytest.approx(50)
    assert c.floor_ms(flops=1e9, bytes_=0, dtype="bfloat16") == pytest.approx(10), "bfloat16 can be widened where torch is slow in it"


def test_above_the_roofline_is_refused():
    record = {"ours_ms": 1.0, "floor_ms": 1.2, "of_floor": 1.2}
    assert "above the roofline" in roofline.above(record)
    assert roofline.above(record | {"of_floor": 1.04}) is None


def test_an_impossible_time_is_a_failure(monkeypatch, ceilings):
    ceilings.copy_GBs = 1e-3
    monkeypatch.setattr(roofline, "copy_GBs", lambda *args, **kwargs: 1e-3)
    outcome = suite.run(["patchify"], cases=ROW, quick=True, against=["eager"])
    assert not outcome.document["records"] and "above the roofline" in outcome.failures[0]["reason"]


def test_seconds(monkeypatch, ceilings):
    """Of several ops the first rows come first, and what is left out is said."""
    options = dict(quick=True, against=["eager"])
    outcome = suite.run(["patchify", "unpatchify"], seconds=1e-9, **options)
    assert not outcome.document["records"] and outcome.notes[-1] == "4 of 4 rows left out: 1e-09 s had passed"

    def measure(*_):
        raise suite.Wrong("not measured")

    monkeypatch.setattr(suite, "measure", measure)
    order = lambda **more: [failure["op"] for failure in suite.run(["patchify", "unpatchify"], **options, **more).failures]
    assert order(seconds=600) == ["patchify", "unpatchify"] * 2 and order() == sorted(order())


def test_ceilings_are_measured():
    assert roofline.copy_GBs(1 << 20, "cpu", copies=2, seconds=0.01) > 0
    assert roofline.gemm_GFs("float32", "cpu", 0.005) > 0
    assert roofline.last_level_cache() >= 1 << 16


def test_record(ceilings):
    outcome = suite.run(["patchify"], passes=["forward", "both"], dtypes=["bfloat16"], cases=ROW, quick=True)
    assert not outcome.failures
    forward, both = json.loads(json.dumps(outcome.document))["records"]
    for record in (forward, both):
        assert list(record) == RECORD
        assert record["ratio"] == pytest.approx(record["peers_ms"][record["best_peer"]] / record["ours_ms"])
        assert record["best_peer"] == min(record["peers_ms"], key=record["peers_ms"].get)
        assert record["of_floor"] == pytest.approx(record["floor_ms"] / record["ours_ms"])
        assert record["error"] <= record["error_limit"]
        assert "eager" in record["peers_ms"] and not any("shuffle" in name for name in record["peers_ms"])
    assert both["floor_ms"] == pytest.approx(2 * forward["floor_ms"], rel=0.5)
    assert set(outcome.document) == {"machine", "versions", "command", "ceilings", "records"}
    assert forward["threads"] == torch.get_num_threads() and forward["shape"]["patch"] == [2, 4, 4]


@pytest.mark.parametrize("double", [2.0], indirect=True)
def test_an_op_without_peers_meets_its_reference(double, ceilings):
    outcome = suite.run(["double"], quick=True)
    assert list(outcome.document["records"][0]["peers_ms"]) == ["eager"] and not outcome.failures


@pytest.mark.parametrize("double", [2.01], indirect=True)
def test_a_wrong_result_is_never_timed(double, ceilings, tmp_path, capsys):
    file = tmp_path / "run.json"
    assert suite.main(["double", "--quick", "--json", str(file)]) == 1
    document = json.loads(file.read_text())
    assert document["records"] == [] and "output 0 is off by" in document["failures"][0]["reason"]
    assert "FAILED double, 64" in capsys.readouterr().out


@pytest.mark.parametrize("double", [2.0], indirect=True)
def test_a_peer_that_computes_something_else(double, ceilings, tmp_path):
    file = tmp_path / "peers.py"
    file.write_text("PEERS = {'double': {'triple': type('Peer', (), {'default': True, 'refuse': None,\n"
                    "    '__call__': lambda self, x: x * 3})()}}\nMISSING, VERSIONS = {'magic': 'no module named magic'}, {}\n")
    outcome = suite.run(["double"], quick=True, peers=file)
    assert "peer triple is off by" in outcome.failures[0]["reason"] and "magic is missing" in outcome.notes[0]


def test_without_a_file_of_peers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "__file__", str(tmp_path / "site-packages" / "fastdiff" / "bench" / "suite.py"))
    module, sentence = suite.find_peers()
    assert module is None and "the only peer is eager" in sentence
    with pytest.raises(FileNotFoundError, match="no file"):
        suite.find_peers(tmp_path / "none.py")


@pytest.mark.parametrize("op", sorted(public()))
def test_peers_agree_with_the_reference(op):
    """Every peer that needs no building, on small sizes, each option of the case at a time."""
    module, _ = suite.find_peers()
    function, case = public()[op]
    function = case.taking(function)
    small = {name: min(d.high, 4) for name, d in case.dims.items() if isinstance(d, Dim)}
    tried = 0
    for option in [{}, *({name: value} for name, d in case.dims.items() if not isinstance(d, Dim) for value in d.values)]:
        arguments = inputs.make(case.arguments(**case.sizes(**small | option)), "float32", "cpu")
        arguments |= {k: x.clamp(min=1) for k, x in arguments.items() if isinstance(x, torch.Tensor) and not x.is_floating_point()}
        call = inputs.Call(arguments)
        with fastdiff.use_backend("reference"):
            exact = call.by_parts(function, case, torch.float64)
        for name, peer in module.PEERS[op].items() if all(y.numel() for y in exact) else ():
            if not name.startswith(("compile", "sdpa-flash")) and (peer.refuse is None or peer.refuse(**arguments) is None):
                suite.same(name, call(peer), exact, "float32")
                tried += 1
    assert tried


def test_reference_by_parts_is_the_whole():
    function, case = public()["attention"]
    made = inputs.make(case.arguments(**case.sizes(B=2, H=3, M=5, N=7, E=4, lengths=True)), "float32", "cpu", grad=True)
    call = inputs.Call(made, (torch.randn(2, 3, 5, 4),))
    with fastdiff.use_backend("reference"):
        whole, parts = call(function), call.by_parts(function, case)
    assert call.parts(case) == 6 and len(parts) == 4
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_inputs():
    specs = {"x": Array((3, 4)), "l": Array((3,), dtype="float32"), "n": Integers((50,), 2, 4), "option": "a"}
    made = inputs.make(specs, "bfloat16", "cpu", grad=True)
    assert made["x"].dtype == torch.bfloat16 and made["l"].dtype == torch.float32 and made["option"] == "a"
    assert made["x"].requires_grad and not made["n"].requires_grad and set(made["n"].tolist()) == {2, 3, 4}
    assert made["x"].count_nonzero() == 12


def test_peak_memory():
    """20 MB at the peak of a call that returns 4 MB; where the kernel cannot tell, None."""
    def call():
        torch.ones(4_000_000)
        return torch.ones(1_000_000)

    found, result = memory.peak(call, "cpu")
    assert result.numel() == 1_000_000
    assert found is None or 12e6 < found < 40e6


def _record(ratio, low, high, **other):
    return {"op": "a", "case": "b", "dtype": "float32", "pass": "forward", "device": "cpu", "threads": 1, "ratio": ratio, "ratio_low": low,
            "ratio_high": high} | other


@pytest.mark.parametrize("old, change", [(_record(1, 0.9, 1.1), "faster"), (_record(4, 3.5, 4.5), "slower"), (_record(2, 1.5, 2.5), "same"),
                                         (_record(None, None, None), "not comparable"),
                                         (_record(1, 0.9, 1.1, threads=2), "not comparable")])
def test_baseline(old, change):
    (row,) = report.against([_record(2, 1.9, 2.1)], {"records": [old]})
    assert row[2:] == (2, change) and row[0] == ("a", "b", "float32", "forward", "cpu", 1)


def test_mean_ratio_is_geometric():
    assert report.mean_ratio([{"ratio": 4.0}, {"ratio": 1.0}, {"ratio": None}]) == pytest.approx(2)


def test_tiny_arguments_have_16_elements():
    for function, case in public().values():
        arguments = overhead.tiny(case)
        assert 16 <= max(torch.Size(a.shape).numel() for a in overhead.arrays(arguments)) <= 20, function
    rows = overhead.measure({"patchify": public()["patchify"]}, chunk=2, budget=timer.Budget(2, 0, 1))
    assert [set(row) for row in rows] == [{"op", "backend", "ours_us", "sdpa_us", "ratio"}]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    record = _record(2.0, 1.9, 2.1, ours_ms=1.0, peers_ms={"eager": 2.0}, best_peer="eager")
    made = [suite.Result(record, 1e9, 1e6, 0.0), suite.Result(record | {"best_peer": None}, 0, 1e6, 0.0)]
    roofline.plot(made, roofline.Ceilings("cpu", 1, 10.0, {"float32": 100.0}), tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


def test_explain(monkeypatch):
    monkeypatch.setattr(roofline, "MEASURED", {})
    q, k = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 32, 16)
    with fastdiff.use_backend("reference"):
        found = fastdiff.explain(fastdiff.ops.attention, q, k, k)
    assert found.op == "attention" and found.backend == "reference" and found.flops == 4 * 2 * 8 * 32 * 16 and found.floor is None
    assert found.bytes == 4 * (2 * q.numel() + 2 * k.numel())
    assert any(name == "cpu" for name, _ in found.refusals)
    assert all(text in str(found) for text in ("backend  reference", "refused  cpu"))
    assert found.floor_ms(roofline.Ceilings("cpu", 1, 1.0, {"float32": 1e9})) == pytest.approx(found.bytes / 1e6)
    monkeypatch.setattr(roofline, "MEASURED", {("cpu", torch.get_num_threads()): roofline.Ceilings("cpu", 1, 1.0, {"float32": 1e9})})
    assert found.floor == pytest.approx(found.bytes / 1e6)


def test_explain_computes_nothing_and_refuses_as_the_call_does():
    x = torch.randn(1, 1, 4, 4)
    assert fastdiff.explain("patchify", x, 2, order="cpq").bytes == 2 * 4 * 16
    with pytest.raises(ValueError, match="patchify: patch wants divisors"):
        fastdiff.explain("patchify", x, 3)
    with pytest.raises(ValueError, match="explain: op wants one of add_noise"):
        fastdiff.explain("sum", x)
    with pytest.raises(ValueError, match="explain: op wants one of"):
        fastdiff.explain(torch.sum, x)


def test_explain_a_call_that_wants_a_derivative():
    out, lse = torch.randn(1, 1, 2, 4, requires_grad=True), torch.randn(1, 1, 2)
    found = fastdiff.explain("merge_attention", out, lse, out, lse)
    if REGISTRY["merge_attention"].composite:
        assert found.backend == "reference" and any("a derivative is wanted" in why for name, why in found.refusals)
    else:
        assert found.backend
