"""python -m fastdiff: each command as a stranger types it."""

import json
import os
import subprocess
import sys

import pytest

from fastdiff import __main__ as cli
from fastdiff import info
from fastdiff.core.contract import public


def run(*argv, **kwargs):
    return subprocess.run([sys.executable, "-m", "fastdiff", *argv], capture_output=True, text=True, timeout=300, **kwargs)


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in cli.COMMANDS)


@pytest.mark.parametrize("argv", [[], ["nope"]])
def test_unknown_command(argv, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert not captured.out and all(f"  {command} " in captured.err for command in cli.COMMANDS)
    assert not argv or "unknown command 'nope'" in captured.err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "bench", ("a_library_that_nobody_has:main", "", "bench"))
    assert cli.main(["bench"]) == 2
    assert "pip install 'fastdiff-kernels[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "bench", "verify", "demo", "train"])
def test_each_command_has_help(command):
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m fastdiff {command}" in done.stdout


def test_info():
    done = run("info")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("fastdiff", "torch", "ISA", "GPU", "native cpu", "native cuda"))
    done = run("info", env=os.environ | {"FASTDIFF_NATIVE": "0"})
    assert done.returncode == 0, done.stderr
    assert "switched off by FASTDIFF_NATIVE=0" in done.stdout and "-> unset FASTDIFF_NATIVE" in done.stdout


@pytest.mark.parametrize("library, why, words", [
    ("cpu", "switched off by FASTDIFF_NATIVE=0", "unset"),
    ("cpu", "libfastdiff_cpu.so did not load: undefined symbol", "rebuild against this torch"),
    ("cpu", "c++ failed: error", "install g++"), ("cuda", "built, not loaded: torch sees no CUDA device", "GPU")])
def test_advice(library, why, words):
    assert words in info.advice(library, why)


def test_no_advice_twice():
    assert info.advice("cpu", "not built: run `pip install --no-build-isolation -e .`") is None


def test_bench(tmp_path):
    first, second, picture = (str(tmp_path / name) for name in ("first.json", "second.json", "roof.png"))
    op, (_, case) = max(public().items())
    argv = ["bench", op, "--quick", "--case", list(case.bench)[-1], "--threads", "1", "--against", "eager"]
    done = run(*argv, "--json", first, "--plot", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "first.json").read_text())
    assert set(document) == {"machine", "versions", "command", "ceilings", "records"} and len(document["records"]) == 1
    assert document["command"].startswith(f"python -m fastdiff bench {op} --quick")
    assert document["ceilings"]["copy_GBs"] > 0 and document["ceilings"]["gemm_GFs"]["float32"] > 0
    assert (tmp_path / "roof.png").stat().st_size > 1000
    done = run(*argv, "--json", second, "--baseline", first, "--markdown")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"| {op} |" in done.stdout and "old ratio" in done.stdout


@pytest.mark.parametrize("argv, words", [
    (["nope"], "unknown op nope"), (["--case", "nope"], "fits none of"), (["--against", "nope"], "no peer nope"),
    (["--threads", "0"], "at least 1"), (["--dtype", "int8"], "float32"), (["--peers", "nope.py"], "no file nope.py"),
    (["--baseline", "nope.json"], "not the --json file")])
def test_bench_refuses(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *argv])
    assert stop.value.code == 2 and words in capsys.readouterr().err
