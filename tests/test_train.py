"""python -m fastdiff train: runs that go on to the bit, checkpoints that say when they are damaged, images from folders."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("safetensors", reason="safetensors is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from fastdiff import __main__ as cli
from fastdiff import checkpoint
from fastdiff.core.backend import use_backend
from fastdiff.presets import PRESETS
from fastdiff.train import Data, Judge, Run, digits, folder, write_grid

SMALL = ["--batch", "4", "--samples", "2", "--seed", "3"]


@pytest.fixture(scope="module")
def trained():
    return digits()[0]


def small(name, data, **options):
    return Run(name, data, **dict(batch=4, seed=3) | options)


def same(a, b):
    """Whether two runs are equal to the bit, and go on equally."""
    for x, y in ((a.model, b.model), (a.ema, b.ema)):
        for (name, p), q in zip(x.state_dict().items(), y.state_dict().values(), strict=True):
            assert torch.equal(p, q), name
    states = [run.optimizer.state_dict()["state"] for run in (a, b)]
    assert states[0].keys() == states[1].keys()
    for i, mine in states[0].items():
        assert all(torch.equal(mine[k], states[1][i][k]) for k in mine | states[1][i]), i
    assert a.losses == b.losses
    assert torch.equal(a.order, b.order) and torch.equal(a.generator.get_state(), b.generator.get_state())


@pytest.mark.parametrize("name", PRESETS)
def test_resumes_to_the_bit(name, trained, tmp_path):
    data = Data(trained.images[:10], trained.labels[:10], 16, 10)  # two steps an epoch: the break is within the second
    whole, first = small(name, data), small(name, data)
    for _ in range(5):
        whole.advance()
    for _ in range(3):
        first.advance()
    first.save(tmp_path / "c")
    torch.manual_seed(17)  # the global generator has no part in it
    second = small(name, data)
    second.load(tmp_path / "c")
    same(first, second)
    for _ in range(2):
        second.advance()
    same(whole, second)
    assert len(set(whole.losses)) == 5
    assert any(not torch.equal(p, q) for p, q in zip(whole.model.parameters(), whole.ema.parameters(), strict=True))


@pytest.mark.parametrize("name", PRESETS)
def test_the_reference_follows_the_same_curve(name, trained):
    runs = small(name, trained), small(name, trained)
    for _ in range(6):
        runs[0].advance()
        with use_backend("reference"):
            runs[1].advance()
    torch.testing.assert_close(torch.tensor(runs[0].losses), torch.tensor(runs[1].losses), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_learns_and_samples(name, trained):
    """A few images are learned: the loss falls, and samples are integers of the range, equal for one seed."""
    run = Run(name, Data(trained.images[:4], trained.labels[:4], 16, 10), batch=4)
    for _ in range(30):
        run.advance()
    assert sum(run.losses[-10:]) < 0.9 * sum(run.losses[:10])
    run.preset.sampled = 3
    a, labels = run.sample(3, 1.5, 0)
    assert a.shape == (3, 1, 8, 8) and a.dtype is torch.uint8 and a.max() <= 16 and labels.tolist() == [0, 1, 2]
    assert torch.equal(a, run.sample(3, 1.5, 0)[0]) and not torch.equal(a, run.sample(3, 1.5, 1)[0])


def test_round_trip(tmp_path):
    path = tmp_path / "c"
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(2.0), "d": torch.randn(4, 6).T, "e": torch.empty(0)}
    checkpoint.write(path, tensors, {"x": [1, "two"]})
    read, settings = checkpoint.read(path)
    assert settings == {"x": [1, "two"]} and set(read) == set(tensors)
    assert all(torch.equal(x, read[k]) and x.dtype is read[k].dtype for k, x in tensors.items())
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_damage_is_named(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.write(path, {"a": torch.randn(50)}, {"x": 1})
    data = path.read_bytes()
    for at in (0, 9, len(data) // 2, len(data) - 1):  # the header's length, the header, the numbers
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1:])
        with pytest.raises(ValueError, match=r"c\.safetensors"):
            checkpoint.read(path)
    for length in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"c\.safetensors is damaged"):
            checkpoint.read(path)
    from safetensors.torch import save_file

    save_file({"a": torch.randn(3)}, path)
    with pytest.raises(ValueError, match=r"c\.safetensors has no settings"):
        checkpoint.read(path)


def test_a_failed_write_leaves_the_last(tmp_path, monkeypatch):
    path = tmp_path / "c"
    checkpoint.write(path, {"a": torch.zeros(3)}, 1)

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError):
        checkpoint.write(path, {"a": torch.ones(3)}, 2)
    assert checkpoint.read(path)[1] == 1


def test_a_damaged_checkpoint_stops_the_command(tmp_path, capsys):
    argv = ["train", "patched-unet", *SMALL, "--steps", "2", "--output", str(tmp_path)]
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"nonsense")
    assert cli.main(argv) == 1
    assert f"{path} is damaged" in capsys.readouterr().out.replace("\n", "")
    assert path.read_bytes() == b"nonsense"


def test_another_run_is_refused(trained, tmp_path):
    run = small("patched-unet", trained)
    run.advance()
    run.save(tmp_path / "c")
    with pytest.raises(ValueError, match="c is of another run: seed 3, not 4"):
        small("patched-unet", trained, seed=4).load(tmp_path / "c")


def command(output, steps, *options):
    return [sys.executable, "-m", "fastdiff", "train", "blurring", *SMALL, "--steps", str(steps), "--every", "2", "--output",
            str(output), *options]


def losses(path):
    return checkpoint.read(path)[0]["losses"]


def test_killed_and_resumed(request, tmp_path):
    """kill -9 at random moments, saving among them: every start finds a good checkpoint, and all ends as in an unbroken run."""
    kills = 20 if request.config.getoption("--deep") else 2
    steps = 16 * kills
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, broken, chance = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    subprocess.run(command(whole, steps), env=environment, check=True, capture_output=True)
    path, reached = broken / "checkpoint.safetensors", 0
    stamp = lambda: path.stat().st_mtime_ns if path.exists() else 0
    for _ in range(kills):
        process = subprocess.Popen(command(broken, steps), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(chance.randint(1, 4)):  # so many checkpoints of two steps, and a moment
            seen = stamp()
            while stamp() == seen and process.poll() is None:
                time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.06))
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert reached < len(losses(path)) < steps
        reached = len(losses(path))
    subprocess.run(command(broken, steps), env=environment, check=True, capture_output=True)
    a, b = (checkpoint.read(folder / "checkpoint.safetensors")[0] for folder in (whole, broken))
    assert len(a["losses"]) == steps and a.keys() == b.keys()
    for name, x in a.items():
        assert torch.equal(x, b[name]), name
    assert (whole / "samples.png").read_bytes() == (broken / "samples.png").read_bytes()


def pictures(root, names, size=(12, 9)):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size[1], size[0], 3), 40 * i, np.uint8)).save(path)


def test_folder_of_images(tmp_path, capsys):
    images = tmp_path / "images"
    pictures(images, ["cat/a.png", "cat/b.jpg", "dog/deep/c.PNG", "dog/d.bmp"])
    (images / "dog" / "notes.txt").write_text("not an image")
    data = folder(images, 8)
    assert data.images.shape == (4, 3, 8, 8) and data.images.dtype is torch.uint8 and data.most == 255
    assert data.labels.tolist() == [0, 0, 1, 1] and data.classes == 2
    assert (data.images[0] == 0).all() and (data.images[2] == 120).all()
    pictures(images, ["loose.png"])
    assert folder(images, 8).labels is None
    output = tmp_path / "out"
    for name in PRESETS:
        argv = ["train", name, "--data", str(images), "--size", "8", "--steps", "1", "--batch", "2", "--samples", "1", "--output"]
        assert cli.main([*argv, str(output / name)]) == 0
        assert Image.open(output / name / "samples.png").size == (32 * 10 + 2 * 9, 32)
    assert "0 classes" in capsys.readouterr().out


def test_a_folder_without_images(tmp_path, capsys):
    assert cli.main(["train", "rin", "--data", str(tmp_path), "--output", str(tmp_path / "o")]) == 1
    assert "wants a folder with images" in capsys.readouterr().out
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png does not open"):
        folder(tmp_path, 8)


def test_middle_square(tmp_path):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12] = 200
    Image.fromarray(image).save(tmp_path / "a.png")
    assert (folder(tmp_path, 8).images == 200).all()


@pytest.mark.parametrize("argv, words", [
    (["nope"], "invalid choice"), ([], "PRESET"), (["rin", "--steps", "0"], "at least 1"), (["rin", "--batch", "x"], "invalid"),
    (["rin", "--rate", "-1"], "above 0"), (["rin", "--size", "24"], "power of two"), (["rin", "--data", "/nope"], "wants a folder"),
    (["rin", "--backend", "nope"], "invalid choice")])
def test_refuses(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *argv])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_batch_that_is_too_large(capsys, tmp_path):
    assert cli.main(["train", "rin", "--batch", "1298", "--output", str(tmp_path)]) == 1
    assert "--batch wants at most the 1297 images" in capsys.readouterr().out


def test_ctrl_c_keeps_a_checkpoint(tmp_path):
    process = subprocess.Popen(command(tmp_path, 100000, "--every", "100000"), stdout=subprocess.PIPE, text=True)
    assert "parameters" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from there" in out
    assert len(losses(tmp_path / "checkpoint.safetensors")) >= 1


def test_judge(trained):
    """Real digits are recognised, the same pixels in another order are not."""
    _, held_out = digits()
    judge = Judge(trained)
    real, right = judge(held_out.images, held_out.labels)
    mixed = held_out.images.flatten(1)[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))].view_as(held_out.images)
    assert right > 0.9 and real >= right and judge(mixed, held_out.labels)[0] < 0.05


def test_grid(tmp_path):
    write_grid(torch.full((12, 1, 8, 8), 16, dtype=torch.uint8), 16, tmp_path / "g.png", columns=5)
    image = Image.open(tmp_path / "g.png")
    assert image.size == (5 * 34 - 2, 3 * 34 - 2) and image.getpixel((0, 0)) == (255, 255, 255)
