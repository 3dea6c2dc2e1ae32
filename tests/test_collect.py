"""benchmarks/collect.py: what enters a results file, and that README's tables are made of it."""

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def collect():
    spec = importlib.util.spec_from_file_location("collect", Path(__file__).parents[1] / "benchmarks" / "collect.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_results(collect):
    """README's tables and the rows beside the results file hold what the file holds."""
    document = json.loads(collect.RESULTS.read_text())
    assert collect.README.read_text() == collect.readme(collect.README.read_text(), document["records"])
    assert collect.RESULTS.with_suffix(".md").read_text() == collect.rows(document)


def test_a_new_document_takes_the_place_of_an_older_run(collect, tmp_path):
    record = dict(op="an op", case="a", dtype="float32", device="cpu", threads=2, backend="cpu", peers_ms={"eager": 2.0}, best_peer="eager",
                  ours_ms=1.0, ratio=2.0, ratio_low=2.0, ratio_high=2.0, of_floor=None, peak_bytes=1, peer_peak_bytes=2, error=0.0,
                  error_limit=1.0)
    made = dict(machine=dict(processor="a", cores=1, isa="b"), versions={"torch": "1"}, ceilings={"copy_GBs": 1.0}, command="first")
    old = made | dict(ceilings=[made["ceilings"]], records=[record | {"pass": "forward"}, record | {"pass": "both"}])
    new = made | dict(records=[record | {"pass": "both", "ratio": 4.0}], versions={"triton": "2"}, command="second")
    files = tmp_path / "old.json", tmp_path / "new.json"
    for file, document in zip(files, (old, new), strict=True):
        file.write_text(json.dumps(document))
    assert collect.main([str(files[1]), "--into", str(files[0])]) == 0
    document = json.loads(files[0].read_text())
    assert document["command"] == "first ; second" and document["ceilings"] == [made["ceilings"]] * 2
    assert document["versions"] == {"torch": "1", "triton": "2"}
    assert [(r["pass"], r["ratio"]) for r in document["records"]] == [("forward", 2.0), ("both", 4.0)]
    assert "| `an op`, 1 shape | - | 2.00 | - | 4.00 | - | - |" in collect.ops(document["records"])
    assert "second" in (tmp_path / "old.md").read_text()
