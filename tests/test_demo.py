"""The demo with small stand-ins for the models and the benchmark."""

import builtins
import time

import pytest
import torch

from fastdiff import demo

COMPILE = torch.nn.Module.compile


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def small():
    model = Net()
    return model, (torch.randn(3, 8),), model.blocks


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: COMPILE(self, backend="eager"))
    monkeypatch.setattr(demo, "BUDGET", demo.Budget(pairs=3, least=0.0))
    monkeypatch.setattr(demo, "MODELS", {"a small net": small})
    monkeypatch.setattr(demo, "STEPS", 10)
    monkeypatch.setattr(demo, "SIDE", 24)
    monkeypatch.setattr(demo.suite, "main", lambda argv: 0)
    monkeypatch.setenv("COLUMNS", "200")


def rows(text):
    """run -> the texts of its cells."""
    cells = ([c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│"))
    return {c[1]: c[2:] for c in cells}


def test_three_runs(tmp_path, capsys):
    assert demo.main(["--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    table = rows(out)
    assert set(table) == {"plain", "accelerated", "compiled"}
    assert table["plain"][1] == "1.00"
    assert all(float(row[2]) < 1e-6 and float(row[3]) < 1e-6 for row in table.values())
    assert table["compiled"][4] and not table["plain"][4]
    assert "0 modules replaced" in out


def test_picture_and_exit_code_of_the_benchmark(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(demo.suite, "main", lambda argv: asked.append(argv) or 1)
    assert demo.main(["--output", str(tmp_path / "new")]) == 1
    assert (tmp_path / "new").is_dir()
    assert asked == [[*demo.OPS, "--quick", "--plot", str(tmp_path / "new" / "roofline.png")]]


def test_sheet(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    rows, worst = demo.sheet(24)
    assert [title for title, *_ in worst] == ["Gaussian", "blurring", "heat"] and all(0 < off <= limit < 0.03 for _, off, limit in worst)
    assert len(rows) == 6 and all(len(images) == demo.COLUMNS and x.shape == (1, 3, 24, 24) for _, images in rows for x in images)
    photograph = demo.photograph(24) / 2 + 0.5
    for (_, forward), (_, back) in zip(rows[::2], rows[1::2], strict=True):
        torch.testing.assert_close(forward[-1], back[-1])
        distances = [(x - photograph).square().mean().item() for x in back]
        assert distances == sorted(distances) and distances[-1] > 0.01
    demo.write_sheet(rows, tmp_path / "sheet.png")
    with image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (6 * 28 - 4, 6 * 38)
        tile = torch.frombuffer(bytearray(sheet.convert("RGB").crop((0, 14, 24, 38)).tobytes()), dtype=torch.uint8).view(24, 24, 3)
    assert (tile.permute(2, 0, 1) / 255 - photograph[0]).abs().mean() < 0.05


def test_a_process_that_does_not_come_back_is_told(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip("PIL.Image", reason="pillow is not installed")
    assert demo.main(["--output", str(tmp_path)]) == 0
    assert (tmp_path / "processes.png").is_file()
    sample = demo.InverseHeat.sample
    monkeypatch.setattr(demo.InverseHeat, "sample", lambda *a, **o: sample(*a, **o) + 1e-3)
    assert demo.main(["--output", str(tmp_path)]) == 1
    assert "heat 1.0e-03 (wanted: 1e-05)" in capsys.readouterr().out


def test_a_wrong_output_is_told(tmp_path, monkeypatch, capsys):
    accelerate = demo.accelerate

    def wrong(model, **options):
        model.blocks[0].linear.bias.data += 1e-3
        return accelerate(model, **options)

    monkeypatch.setattr(demo, "accelerate", wrong)
    assert demo.main(["--output", str(tmp_path)]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_compiler_that_fails_or_takes_long(tmp_path, monkeypatch, capsys):
    def broken(graph, _):
        raise RuntimeError("no C++ compiler")

    def endless(graph, _):
        while True:
            try:
                time.sleep(5)
            except demo.Expired:
                time.sleep(5)  # a compiler that swallows the first

    for backend, words in ((broken, "no C++ compiler"), (endless, "not compiled within 0.5 s")):
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self, backend=backend: COMPILE(self, backend=backend))
        torch.compiler.reset()
        start = time.perf_counter()
        assert demo.main(["--output", str(tmp_path), "--compile-limit", "0.5"]) == 0
        assert time.perf_counter() - start < 20
        assert words in rows(capsys.readouterr().out)["compiled"][4]


def test_missing_packages(tmp_path, monkeypatch, capsys):
    load = builtins.__import__

    def missing(name, *rest, **options):
        if name.partition(".")[0] in ("perceiver_pytorch", "sklearn"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return load(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(demo, "MODELS", {"a small net": small, "a Perceiver": demo.perceiver})
    assert demo.main(["--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "a Perceiver: not run, No module named 'perceiver_pytorch'" in out and "pip install" in out
    assert "accelerated" in out


def test_prepare(capsys):
    assert demo.main(["--prepare"]) == 0
    assert "a small net: compiled in" in capsys.readouterr().out


def test_arguments(capsys):
    for argv in (["--compile-limit", "0"], ["--compile-limit", "nan"]):
        with pytest.raises(SystemExit):
            demo.main(argv)
        assert "more than 0 seconds" in capsys.readouterr().err


def test_photograph():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    image = demo.photograph(32)
    assert image.shape == (1, 3, 32, 32) and -1 <= image.min() < -0.5 and 0.5 < image.max() <= 1


@pytest.mark.parametrize("build,package", [(demo.rin, "rin_pytorch"), (demo.perceiver, "perceiver_pytorch")])
def test_models(build, package):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    try:
        model, inputs, repeated = build()
    except ImportError as missing:
        pytest.skip(f"{package} is not installed: {missing}")
    assert type(model).__module__.startswith(package) and all(x.isfinite().all() for x in inputs) and len(repeated) > 0


def test_torchvision_operators_are_defined_once():
    demo.define_torchvision_operators()
    before = len(demo._LIBRARIES)
    demo.define_torchvision_operators()
    assert len(demo._LIBRARIES) == before <= 1
