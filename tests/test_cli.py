"""The command line as a user types it: what it prints, how it exits, what it imports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from normzoo import cli
from normzoo.ops import kernels

REPOSITORY = Path(__file__).resolve().parents[1]


def normzoo(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "normzoo.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240, check=False)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The same in this process: exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_help_imports_nothing_heavy():
    code = (
        "import sys, normzoo.cli\n"
        "try: normzoo.cli.main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'pandas', 'pytorch_lightning', 'wandb', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("list", "show", "check", "bench", "kernels", "run", "report", "status", "sync"):
        assert verb in done.stdout


def test_list(capsys):
    code, out, _ = call(capsys, "list", "*batch*")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert "b c s -> c" in rows["batch_norm"]
    assert "Ioffe & Szegedy" in rows["batch_norm"]
    assert "layer_norm" not in rows


def test_list_filters(capsys):
    code, out, _ = call(capsys, "list", "--trait", "causal", "not-stateful", "shift-invariant", "--year", "2016")
    names = {line.split()[0] for line in out.splitlines()[1:]}
    assert code == 0
    assert "layer_norm" in names
    assert not names & {"batch_norm", "instance_norm", "rms_norm"}


def test_show(capsys):
    code, out, _ = call(capsys, "show", "GroupNorm")
    assert code == 0
    parts = ["group_norm (gn)", "b (g c) s -> b g", "channel 3   B B B      D D D", "causal", "1803.08494", "sample.py"]
    for part in [*parts, "groups='auto'", r"\sqrt"]:
        assert part in out, part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "bach_norm"], "did you mean 'batch_norm'"),
        (["list", "zz*"], "no norm matches"),
        (["list", "--family", "bach"], "did you mean 'batch'"),
        (["list", "--trait", "causl"], "did you mean 'causal'"),
        (["check", "bach_norm"], "did you mean 'batch_norm'"),
        (["run"], "experiments/quickstart.py"),
        (["run", "no_such_study.py"], "no_such_study.py"),
        (["run", "--norms", "bach_norm", "--models", "cnn"], "did you mean 'batch_norm'"),
        (["run", "--norms", "group_norm(group=4)", "--models", "cnn"], "did you mean 'groups'"),
        (["run", "--norms", "batch_norm", "--models", "cn"], "did you mean 'cnn'"),
        (["run", "--norms", "batch_norm", "--models", "cnn", "--data", "digit"], "did you mean 'digits'"),
        (["run", "--norms", "batch_norm", "--models", "cnn", "--set", "epoch=1"], "did you mean 'epochs'"),
        (["run", "--norms", "batch_norm", "--models", "cnn", "--set", "epochs"], "setting=value"),
        (["run", "--norms", "batch_norm", "--models", "cnn", "--seeds", "0"], "at least one seed"),
        (["run", "study.py", "--seeds", "3"], "--seeds goes with"),
        (["run", "--norms", "instance_norm", "--data", "text", "--models", "transformer"], "predicts the next symbol"),
        (["bench"], "normzoo bench layer_norm rms_norm"),
        (["bench", "bach_norm"], "did you mean 'batch_norm'"),
        (["bench", "group_norm(group=4)"], "did you mean 'groups'"),
        (["bench", "layer_norm", "--shape", "64,"], "as in 64,64,32,32"),
        (["bench", "layer_norm", "--layout", "channel-last"], "did you mean 'channels-last'"),
        (["bench", "layer_norm", "--dtype", "bfloat61"], "did you mean 'bfloat16'"),
        (["bench", "layer_norm", "--direction", "backwards"], "did you mean 'backward'"),
        (["bench", "layer_norm", "--against", "torch.n"], "did you mean 'torch.nn'"),
        (["bench", "layer_norm", "--model", "lst"], "did you mean 'lstm'"),
        (["bench", "layer_norm", "--model", "lstm", "--shape", "4,8"], "--shape does not go with --model"),
        (["bench", "layer_norm", "--model", "lstm", "--plot", "a.png"], "--plot does not go with --model"),
        (["bench", "layer_norm", "--rounds", "0"], "must be positive"),
        (["bench", "layer_norm", "--suite"], "leave 'layer_norm' out"),
        (["bench", "--suite", "--out", "no_such_folder/speed.json"], "no_such_folder"),
        (["bench", "layer_norm", "--csv", "no_such_folder/rows.csv"], "another with --csv"),
        (["bench", "layer_norm", "--model", "lstm", "--csv", "no_such_folder/rows.csv"], "another with --csv"),
        (["bench", "layer_norm", "--plot", "no_such_folder/roof.png"], "another with --plot"),
        (["bench", "layer_norm", "--out", "speed.json"], "goes with --suite alone"),
        (["report", "nowhere"], "nowhere"),
        (["status", "nowhere"], "nowhere"),
        (["sync", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_answered_in_one_message(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, errors = call(capsys, *arguments)
    assert code == 2
    assert message in " ".join(errors.split())
    assert "Traceback" not in errors
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("result.json"))


@pytest.mark.parametrize(("typed", "meant"), [(["lst"], "list"), (["run", "--nroms", "a"], "--norms")])
def test_mistyped_verbs_and_options(capsys, typed, meant):
    code, out, errors = call(capsys, *typed)
    assert code == 2
    assert meant in out + errors


def test_bench_prints_a_table_for_each_case(capsys, tmp_path):
    rows, plot = tmp_path / "rows.csv", tmp_path / "plot.png"
    shapes = ("--shape", "8,16", "6,4,16", "--layout", "tokens", "--dtype", "float32", "bfloat16", "--rounds", "2")
    code, out, _ = call(
        capsys, "bench", "layer_norm", "instance_norm", *shapes, "--csv", str(rows), "--plot", str(plot)
    )
    assert code == 0
    for part in ("torch 2", "8x16 tokens float32", "6x4x16 tokens bfloat16", "floor", "formula", "x best other"):
        assert part in out, part
    assert out.count("one value per statistic") == 2, "a reason is said once for each case"
    header, *lines = rows.read_text().splitlines()
    assert header.startswith("norm,contender,shape")
    assert sum(line.startswith("layer_norm,torch.nn,6x4x16,tokens,float32,cpu,both,") for line in lines) == 1
    assert plot.stat().st_size > 1000


def test_bench_accuracy_and_models(capsys, tmp_path):
    code, out, _ = call(capsys, "bench", "rms_norm", "--shape", "32,8", "--accuracy")
    assert code == 0
    assert "weight gradient" in out
    code, out, _ = call(capsys, "bench", "rms_norm", "--model", "gru", "--steps", "2", "--hidden", "8", "--rounds", "1")
    assert code == 0
    assert "x torch.nn.GRU" in out
    small = ["--steps", "2", "--batch", "2", "--hidden", "4", "--rounds", "1", "--dtype", "float32", "float64"]
    code, out, _ = call(capsys, "bench", "rms_norm", "--model", "gru", *small, "--csv", str(tmp_path / "rows.csv"))
    assert code == 0
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert {line.split(",")[4] for line in lines[1:]} == {"float32", "float64"}


def test_bench_fails_when_nothing_could_be_measured(capsys, tmp_path):
    options = ("--shape", "6,8", "--rounds", "1", "--against", "formula")
    for extra in ((), ("--accuracy",)):
        code, out, _ = call(capsys, "bench", "group_norm(groups=5)", *options, *extra)
        assert code == 1
        assert "does not divide" in out
    code, _, _ = call(capsys, "bench", "group_norm(groups=5)", "layer_norm", *options)
    assert code == 0
    small = ("--steps", "2", "--hidden", "8", "--rounds", "1")
    code, _, _ = call(capsys, "bench", "group_norm(groups=5)", "--model", "gru", *small)
    assert code == 1
    (tmp_path / "fixed.py").write_text("from torch import nn\n\nclass Fixed(nn.Module):\n    def __init__(self): ...\n")
    code, _, errors = call(capsys, "bench", f"{tmp_path / 'fixed.py'}:Fixed", *options)
    assert code == 2
    assert "cannot be made from a width alone" in errors


@pytest.mark.parametrize("found_by", ["us", "torch"])
def test_bench_says_what_does_not_fit_and_keeps_what_it_has(capsys, tmp_path, monkeypatch, found_by):
    from normzoo.bench import command

    monkeypatch.setattr(command, "memory_bytes", lambda device: {"us": 10**9, "torch": 10**18}[found_by])
    rows = tmp_path / "rows.csv"
    keep = ("--against", "torch.nn", "--rounds", "1", "--csv", str(rows))
    code, out, errors = call(capsys, "bench", "layer_norm", *keep, "--shape", "6,8", "10000000,1000000")
    assert code == 2
    assert "10000000x1000000 channels-first float32 does not fit into memory" in errors
    assert "tensors of 40,000,000,000,000 bytes (37,252.9 GiB)" in errors
    assert "smaller --shape" in errors
    assert "6x8 channels-first float32" in out
    assert "layer_norm,torch.nn,6x8," in (before := rows.read_text())
    for large in (["--shape", "1000000000000,1000000000000"], ["--shape", "10000000,10000000", "--accuracy"]):
        code, _, errors = call(capsys, "bench", "layer_norm", *large, *keep)
        assert (code, "does not fit into memory" in errors) == (2, True)
    assert rows.read_text() == before, "nothing measured, nothing overwritten"
    code, _, errors = call(capsys, "bench", "layer_norm", "--model", "gru", "--batch", "1", "--steps", "1000000000000")
    assert code == 2
    assert "gru, 1000000000000 steps, batch 1, 128 units, float32 does not fit into memory" in errors
    assert "smaller --steps" in errors


def test_a_norm_that_runs_into_an_error_of_its_own_is_no_lack_of_memory(tmp_path, monkeypatch):
    from normzoo.bench import command

    def fails(*_):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(command, "measure_case", fails)
    with pytest.raises(RuntimeError, match="a mistake"):
        cli.main(["bench", "layer_norm", "--shape", "6,8"])


def test_kernels_build_says_that_it_takes_long(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def compile_(command, **_):
        (Path(command[3]) / "normzoo_cpu.so").touch()
        return types.SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(kernels, "_compiler", lambda: "c++")
    monkeypatch.setattr(kernels.subprocess, "run", compile_)
    code, out, errors = call(capsys, "kernels", "build")
    assert code == 0
    assert out.strip() == str(kernels.library())
    assert kernels.library().exists()
    assert "compiling its CPU kernels" in errors
    assert "a minute" in errors


def test_a_run_interrupted_before_its_folder_exists(capsys, tmp_path, monkeypatch):
    import normzoo.study

    summary = normzoo.study.Summary(tmp_path / "runs" / "early", 0, 0, 0, 1, 0, 0.0, signal.SIGINT)
    monkeypatch.setattr(normzoo.study, "run_study", lambda *_, **__: summary)
    command = ("run", "--norms", "group_norm(groups=2)", "--models", "mlp", "--in-process")
    monkeypatch.setattr(sys, "argv", ["bin/normzoo", *command])
    monkeypatch.setattr(cli.shutil, "which", lambda name: None)
    code, out, errors = call(capsys, *command)
    assert (code, out) == (130, "  bin/normzoo run --norms 'group_norm(groups=2)' --models mlp --in-process\n")
    assert "no study folder" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupted_run_says_how_to_go_on_and_no_more(tmp_path):
    options = ("--norms", "batch_norm", "rms_norm", "--models", "mlp", "--seeds", "50", "--no-wandb", "--workers", "1")
    command = [sys.executable, "-m", "normzoo.cli", "run", *options]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = iter(process.stdout.readline, "")
        assert next(line for line in said if line.startswith("[  1/100]"))
        process.send_signal(signal.SIGINT)
        rest = [line.rstrip("\n") for line in said if not line.startswith("[")]
    assert process.returncode == 130
    done = len(list(tmp_path.glob("runs/command-line/cells/*/result.json")))
    kept = f"interrupted: {done} of 100 cells are done, and kept in {tmp_path / 'runs' / 'command-line'}"
    assert rest[0] == f"{kept}; to go on, run it again"
    assert rest[1].endswith(" run " + " ".join(options))
    assert len(rest) == 2


def test_kernels_status_says_how_they_stand(capsys, monkeypatch):
    monkeypatch.setenv("NORMZOO_KERNELS", "0")
    code, out, _ = call(capsys, "kernels", "status")
    assert code == 0
    assert out.startswith("off: NORMZOO_KERNELS=0")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import torch\n\nclass Norm(torch.nn.Module)\n    pass\n", "line 3 raised SyntaxError: expected ':'"),
        ("import torch\n\ntorch.no_such_thing\n", "line 3 raised AttributeError: module 'torch' has no attribute"),
    ],
)
@pytest.mark.parametrize("verb", [("check",), ("show",), ("bench",), ("run", "--models", "mlp", "--norms")])
def test_a_broken_file_is_answered_by_its_own_lines(capsys, tmp_path, verb, text, told):
    file = tmp_path / "broken.py"
    file.write_text(text)
    code, _, errors = call(capsys, *verb, f"{file}:Norm")
    assert code == 2
    assert f"{file}, {told}" in errors
    assert text.splitlines()[2] in errors
    for foreign in ("Traceback", "cyclopts", "importlib", str(REPOSITORY)):
        assert foreign not in errors


def test_a_dry_run_says_what_cannot_be_built(capsys):
    command = ("run", "--dry-run", "--seeds", "2", "--models", "mlp", "transformer", "--norms")
    code, out, errors = call(capsys, *command, "batch_norm", "group_norm(groups=7)")
    assert code == 1
    assert len(out.splitlines()) == 8
    assert "4 cells will fail, as the model cannot be built" in errors
    assert "digits/transformer with group_norm(groups=7): groups=7 does not divide 48 channels" in errors
    code, out, errors = call(capsys, *command, "batch_norm", "group_norm(groups=4)")
    assert (code, len(out.splitlines()), errors) == (0, 8, "")
    refused = ("run", "--dry-run", "--data", "text", "--models", "transformer", "--norms", "instance_norm")
    code, out, errors = call(capsys, *refused)
    assert (code, out) == (2, "")
    assert "predicts the next symbol" in errors


def test_a_study_file_that_raises_names_the_line(capsys, tmp_path):
    study = tmp_path / "broken.py"
    study.write_text("import normzoo as nz\n\nnz.no_such_thing\n")
    code, _, errors = call(capsys, "run", str(study))
    assert code == 2
    assert "no_such_thing" in errors
    assert "line 3" in errors


def test_a_norm_of_ones_own_from_start_to_report(tmp_path):
    (tmp_path / "my_norms.py").write_text(
        textwrap.dedent("""
            import torch
            from torch import nn

            class PeakNorm(nn.Module):
                def __init__(self, num_features):
                    super().__init__()
                    self.weight = nn.Parameter(torch.ones(num_features))

                def forward(self, x):
                    y = x / (x.abs().amax(1, keepdim=True) + 1e-5)
                    return y * self.weight.view(1, -1, *[1] * (x.ndim - 2))
        """)
    )
    norms = ("--norms", "batch_norm", "my_norms.py:PeakNorm")
    command = ("run", *norms, "--models", "mlp", "--seeds", "2", "--set", "epochs=1", "--no-wandb")
    dry = normzoo(*command, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert len(dry.stdout.splitlines()) == 4
    assert not (tmp_path / "runs").exists()

    done = normzoo(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PeakNorm" in done.stdout
    folder = tmp_path / "runs" / "command-line"
    assert f"report: {folder / 'report' / 'report.md'}" in done.stdout
    assert (folder / "report" / "results.csv").is_file()
    rows = [json.loads(path.read_text()) for path in folder.glob("cells/*/result.json")]
    assert [row["status"] for row in rows] == ["done"] * 4

    again = normzoo(*command, cwd=tmp_path)
    assert again.returncode == 0
    assert "0 of 4 cells to run" in again.stdout
    status = normzoo("status", str(folder))
    assert "4 done" in status.stdout
