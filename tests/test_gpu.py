"""benchmarks/gpu.py without a GPU: a step that fails or hangs is seen, and the table is short."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", Path(__file__).parents[1] / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_steps(gpu, tmp_path):
    steps = gpu.Steps(tmp_path / "log", minutes=1)
    assert steps.run("passes", [sys.executable, "-c", "print('3 passed')"], 30, "passed")
    assert not steps.run("fails", [sys.executable, "-c", "import sys; print('1 failed, 2 passed'); sys.exit(1)"], 30, "passed")
    assert not steps.run("hangs", [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 2, "begun")
    states = [(state.split(" ")[0], words) for _, state, _, words in steps.rows]
    assert states == [("ok", "3 passed"), ("FAILED", "1 failed, 2 passed"), ("STOPPED", "begun")]
    assert all(word in (tmp_path / "log").read_text() for word in ("3 passed", "1 failed", "begun"))


def test_summary(gpu, tmp_path):
    record = {"op": "geglu", "dtype": "bfloat16", "pass": "forward", "of_floor": 0.25}
    failure = {"op": "geglu", "case": "small", "dtype": "float32", "pass": "both", "reason": "off by 1"}
    (tmp_path / "x.json").write_text(json.dumps({"records": [record | {"ratio": 4.0}, record | {"ratio": 1.0, "of_floor": 1.0}],
                                                 "failures": [failure]}))
    steps = gpu.Steps(tmp_path / "log", minutes=1)
    steps.skip("memcheck", "no compute-sanitizer")
    lines = gpu.summary(steps, tmp_path / "x").splitlines()
    assert "not run: no compute-sanitizer" in lines[0] and lines[-1] == "FAILED geglu, small, float32, both: off by 1"
    assert lines[-2].split() == ["geglu", "2.00", "/", "0.50", "1.00"]


def test_a_gpu_is_needed(gpu, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
