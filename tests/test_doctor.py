"""`python -m fastdiff doctor`."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.__main__ import main
from fastdiff.accelerate import measure

MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, channels=32):
        super().__init__()
        self.block = nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU())
        self.out = nn.Conv2d(channels, channels, 3)

    def forward(self, x):
        return self.out(self.block(x))

def small():
    return Model(), torch.randn(2, 32, 24, 24)

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, tokens, x):
        return self.table(tokens).sum() + x

plain = Text()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    name = f"doctors_{tmp_path.name}".replace("-", "_")
    Path(tmp_path / f"{name}.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setattr(measure, "not_worth", lambda forward, step: False)  # at these sizes it would be luck
    yield name
    sys.modules.pop(name, None)


def test_table(here, capfd):
    assert main(["doctor", f"{here}:Model", "--input", "4x32x40x40", "--threads", "1"]) == 0
    out, err = capfd.readouterr()
    out = " ".join(out.split())
    assert not err and "step before" in out
    assert "torch.nn.modules.container.Sequential" in out and "the whole model" in out
    assert "are products with weights and convolutions" in out and "times as fast" in out


def test_json_with_the_factorys_example(here, capsys):
    assert main(["doctor", f"{here}:small", "--json", "--dtype", "bfloat16", "--threads", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["share_dense"] < 1 and report["time_before"] > 0 and report["memory_before"] >= 2 * 2 * 32 * 22 * 22
    assert report["error_forward"] < 0.02
    assert next(row["name"] for row in (*report["replaced"], *report["kept"])) == "block"


def test_nothing_to_replace(here, capsys):
    assert main(["doctor", f"{here}:plain", "--input", "2x3:int64", "--input", "5"]) == 0
    assert "Nothing was replaced" in capsys.readouterr().out


def test_without_an_example(here, capsys):
    assert main(["doctor", f"{here}:Model"]) == 0
    out = capsys.readouterr().out
    assert "nothing was run" in out and "ms before" not in out


@pytest.mark.parametrize(("arguments", "said"), [
    (["nowhere_at_all:x"], "No module named"), (["{}"], "wants MODULE:FACTORY"), (["{}:torch.randn"], "TypeError"),
    (["{}:nn.Conv"], "has no attribute"), (["{}:MODEL"], "no attribute"), (["{}:torch.get_num_threads"], "torch.nn.Module"),
    (["{}:Model", "--input", "2x5x8x8"], "RuntimeError")])
def test_faults(here, capsys, arguments, said):
    threads = torch.get_num_threads()
    assert main(["doctor", *(a.format(here) for a in arguments)]) == 2
    assert said in capsys.readouterr().err
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("shape", ["2y3", "0x3", "2x3:int65", "-1"])
def test_shapes_that_are_none(here, capsys, shape):
    with pytest.raises(SystemExit):
        main(["doctor", f"{here}:Model", f"--input={shape}"])
    assert "wants a shape such as 2x3x32x32" in capsys.readouterr().err
