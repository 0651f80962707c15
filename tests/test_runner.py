from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

import normzoo as nz
from normzoo import registry
from normzoo.errors import NormzooError
from normzoo.study import Study, Summary, grid, load_study_file, run_study, runner, store

SMALL = grid(epochs=1, train_samples=128, log_every=1)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and forks")


def tiny(name: str = "tiny", **changes: Any) -> Study:
    usual = {"norms": ["batch_norm", "rms_norm"], "tasks": ["digits/mlp"], "seeds": range(2), "settings": SMALL}
    return Study(name, **usual | changes)


def run(study: Study, out: Path, **options) -> Summary:
    return run_study(study, out, **{"workers": 2, "track": False, "progress": False} | options)


def rows_of(directory: Path) -> dict[str, dict]:
    return {row["id"]: row for row in store.load_results(directory)}


def table(directory: Path) -> bytes:
    """What a report is made of, without what differs from run to run: times."""
    timed = ("seconds", "step_ms", "peak_memory_mb", "started", "finished", "attempt")
    rows = [{key: value for key, value in row.items() if key not in timed} for row in rows_of(directory).values()]
    return json.dumps(rows, sort_keys=True).encode()


def curves(directory: Path) -> dict[str, list[dict]]:
    cells = store.load_study(directory)["cells"]
    return {each: [row | {"seconds": 0} for row in store.load_metrics(directory, each)] for each in cells}


def write(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def own_registry(monkeypatch):
    """What a study file registers is forgotten with the test."""
    registry.list_norms()
    for name in ("_norms", "_names", "_files"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A study of six cells, run to its end."""
    summary = run(tiny(seeds=range(3)), tmp_path_factory.mktemp("uninterrupted"))
    assert (summary.done, summary.exit_code) == (6, 0)
    return summary.directory


# ------------------------------------------------------------------------------------------------------ what is kept


def test_a_row_says_everything(uninterrupted):
    row = next(iter(rows_of(uninterrupted).values()))
    assert row["status"] == "done"
    assert row["error"] is None
    assert row["steps"] == 2
    assert {"val/accuracy", "test/accuracy", "train/loss", "val/loss", "test/loss"} <= row["metrics"].keys()
    assert row["config"]["data.train_samples"] == 128
    assert row["parameters"] > row["norm_parameters"] > 0
    assert row["step_ms"] > 0
    assert row["peak_memory_mb"] > 10
    assert row["seconds"]["total"] >= row["seconds"]["train"] + row["seconds"]["setup"] > 0
    assert row["versions"]["torch"]
    assert row["host"]["threads"] == 1
    assert row["warnings"] == []
    folder = store.cell_dir(uninterrupted, row["id"])
    assert (folder / store.LOG).read_text() == ""  # nothing of Lightning's chatter
    config = store.load_config(uninterrupted, row["id"])
    assert config is not None
    assert {key: row[key] for key in store.HEADER} == config
    lines = store.load_metrics(uninterrupted, row["id"])
    assert [line["step"] for line in lines if "train/loss" in line][:2] == [0, 1]
    assert lines[-1].keys() >= {"step", "epoch", "seconds", "test/accuracy"}


def test_cells_of_this_process_and_of_their_own_agree(uninterrupted, tmp_path):
    import torch

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    summary = run(tiny(seeds=range(3)), tmp_path, in_process=True)
    assert summary.exit_code == 0
    assert curves(summary.directory) == curves(uninterrupted)
    assert table(summary.directory) == table(uninterrupted)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_finished_is_not_run_again_and_what_is_new_is(tmp_path):
    first = run(tiny(seeds=[0]), tmp_path)
    results = sorted(first.directory.glob("cells/*/result.json"))
    before = [path.stat().st_mtime_ns for path in results]
    again = run(tiny(seeds=[0]), tmp_path)
    assert (again.done, again.skipped, again.exit_code) == (2, 2, 0)
    more = run(tiny(seeds=[0], norms=["none", "rms_norm"]), tmp_path)
    assert (more.done, more.skipped) == (2, 1)
    assert [path.stat().st_mtime_ns for path in results] == before
    assert [row["label"] for row in store.load_results(first.directory)] == ["batch_norm", "rms_norm", "none"]
    results[0].write_bytes(results[0].read_bytes()[:100])
    with pytest.warns(store.StoreWarning, match="result.json"):
        mended = run(tiny(seeds=[0]), tmp_path)
    assert (mended.done, mended.skipped) == (2, 1)


# ------------------------------------------------------------------------------------------------- what goes wrong

ODD = """
    import os, sys, warnings
    import torch
    from torch import nn
    import normzoo as nz

    @nz.register("test_runner_halo")
    class Halo(nz.MomentNorm):
        moments = "b (g c) s -> g"

    class Plain(nn.Module):
        def __init__(self, num_features, channel_dim=1):
            super().__init__()

        def forward(self, x):
            return self.spoil(x) if torch.is_grad_enabled() or not self.training else x

        def spoil(self, x):
            return x

    class Raises(Plain):
        def spoil(self, x):
            print("about to fail")
            raise RuntimeError("no way")

    class NaN(Plain):
        def spoil(self, x):
            return x * float("nan")

    class NaNInEvaluation(Plain):
        def spoil(self, x):
            return x if self.training else x / 0

    class Warns(Plain):
        def spoil(self, x):
            warnings.warn("a bit odd")
            return x

    class Killed(Plain):
        def spoil(self, x):
            os.kill(os.getpid(), 9)

    class Terminated(Plain):
        def spoil(self, x):
            os.kill(os.getpid(), 15)
            return x

    class Exits(Plain):
        def spoil(self, x):
            sys.exit(0)

    study = nz.Study(
        "odd",
        norms=["test_runner_halo(groups=2)", Raises, NaN, NaNInEvaluation, Warns, Killed, Terminated, Exits, "none"],
        tasks=["digits/mlp"],
        settings=nz.grid(epochs=1, train_samples=128, log_every=1),
        seeds=[0],
    )
"""


@pytest.mark.usefixtures("own_registry")
def test_failures_and_divergences_are_rows(tmp_path, capfd):
    file = write(tmp_path / "odd.py", ODD)
    summary = run(load_study_file(file), tmp_path, progress=True)
    rows = {row["label"]: row for row in store.load_results(summary.directory)}
    assert {label: (row["status"], row["attempt"]) for label, row in rows.items()} == {
        "test_runner_halo(groups=2)": ("done", 1),
        "Raises": ("failed", 1),
        "NaN": ("diverged", 1),
        "NaNInEvaluation": ("diverged", 1),
        "Warns": ("done", 1),
        "Killed": ("failed", 2),
        "Terminated": ("failed", 2),
        "Exits": ("failed", 2),
        "none": ("done", 1),
    }
    assert (summary.done, summary.diverged, summary.failed, summary.exit_code) == (3, 2, 4, 1)
    assert rows["Raises"]["error"]["type"] == "RuntimeError"
    assert rows["Raises"]["error"]["message"] == "no way"
    assert 'raise RuntimeError("no way")' in rows["Raises"]["error"]["traceback"]
    assert "about to fail" in (store.cell_dir(summary.directory, rows["Raises"]["id"]) / store.LOG).read_text()
    assert "SIGKILL" in rows["Killed"]["error"]["message"]
    assert "SIGTERM" in rows["Terminated"]["error"]["message"]
    assert "without a result" in rows["Exits"]["error"]["message"]
    assert rows["Warns"]["warnings"] == ["UserWarning: a bit odd"]
    assert "train/loss is" not in rows["NaN"]["error"]["message"]
    assert rows["NaN"]["error"]["message"] == "the training loss is nan at step 1"
    assert rows["NaN"]["nonfinite"] == ["train/loss"]
    assert store.load_metrics(summary.directory, rows["NaN"]["id"])[-1]["nonfinite"] == ["train/loss"]
    assert "val/loss" in rows["NaNInEvaluation"]["error"]["message"]
    out = capfd.readouterr().out
    assert "odd: 9 of 9 cells to run, 2 at once" in out
    assert "digits/mlp  Raises  seed 0  FAILED: RuntimeError: no way" in out
    assert "digits/mlp Killed seed 0: killed by SIGKILL; starting it again" in out
    assert "3 done, 2 diverged, 4 failed in" in out
    assert "run them again with --retry-failed" in out

    norms = {"NaN": f"{file}:NaN", "fine": "batch_norm"}
    assert run(tiny("odd2", norms=norms, seeds=[0]), tmp_path).exit_code == 3


@pytest.mark.usefixtures("own_registry")
def test_a_failed_cell_is_kept_unless_asked_for(tmp_path):
    file = write(
        tmp_path / "flaky.py",
        """
        import pathlib
        from torch import nn

        class Flaky(nn.Module):
            def __init__(self, num_features, channel_dim=1):
                super().__init__()
                if not pathlib.Path(__file__).with_name("mended").exists():
                    raise RuntimeError("not yet")

            def forward(self, x):
                return x
        """,
    )
    study = tiny("flaky", norms=[f"{file}:Flaky", "none"], seeds=[0])
    assert run(study, tmp_path).failed == 1
    (tmp_path / "mended").touch()
    kept = run(study, tmp_path)
    assert (kept.failed, kept.skipped, kept.exit_code) == (1, 2, 1)
    mended = run(study, tmp_path, retry_failed=True)
    assert (mended.failed, mended.skipped, mended.exit_code) == (0, 1, 0)


def test_refused_norms_are_listed_before_anything_runs(tmp_path):
    study = tiny(
        "lm", norms=["instance_norm", "layer_norm_joint", "layer_norm"], tasks=["text/transformer"], settings=[{}]
    )
    for in_process in (False, True):
        with pytest.raises(
            NormzooError, match=r"cannot be run:\n- .*instance_norm(.|\n)*\n- .*layer_norm_joint"
        ) as error:
            run(study, tmp_path, in_process=in_process)
        assert str(error.value).count("\n- ") == 2
    assert not (tmp_path / "lm" / store.STUDY).exists()


@pytest.mark.parametrize("in_process", [False, True])
def test_models_that_cannot_be_built_are_said_before_anything_runs(tmp_path, capfd, in_process):
    study = tiny(norms=["group_norm(groups=7)", "rms_norm"])
    summary = run(study, tmp_path, in_process=in_process, progress=True)
    assert (summary.done, summary.failed, summary.exit_code) == (2, 2, 1)
    out = capfd.readouterr().out
    said = "2 cells will fail, as the model cannot be built:\n- digits/mlp with group_norm(groups=7): groups=7 does not"
    assert 0 < out.index(said) < out.index("seed 0")
    failed = [row["error"]["type"] for row in rows_of(summary.directory).values() if row["status"] == "failed"]
    assert failed == ["OptionError"] * 2
    run(study, tmp_path, in_process=in_process, progress=True)
    assert "will fail" not in capfd.readouterr().out, "they have their rows"


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NormzooError, match=r"cannot write results to .*file/tiny: Not a directory"):
        run(tiny(), tmp_path / "file")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(NormzooError, match=r"cannot write results to .*Permission denied"):
            run(tiny(), tmp_path / "locked")


def test_a_broken_installation_is_one_message_that_names_torchvision(tmp_path, monkeypatch):
    failure = "Traceback:\n  import torchmetrics\nRuntimeError: operator torchvision::nms does not exist\n"
    monkeypatch.setattr(runner, "_ask", lambda cells: (failure, []))
    with pytest.raises(NormzooError, match=r"uninstall it, nothing here needs it\):\n(.|\n)*torchvision::nms"):
        run(tiny(), tmp_path)
    assert not (tmp_path / "tiny" / store.STUDY).exists()


@pytest.mark.usefixtures("own_registry")
def test_a_file_that_fails_in_the_trainings_process_is_one_message(tmp_path):
    file = write(tmp_path / "elsewhere.py", "import nothing_of_that_name")
    with pytest.raises(NormzooError, match="No module named 'nothing_of_that_name'"):
        run(tiny(imports=[file]), tmp_path)


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_workers_are_counted(tmp_path, workers):
    with pytest.raises(NormzooError, match="workers must be a whole number"):
        run(tiny(), tmp_path, workers=workers)


FULL_DISK = """
    import errno, multiprocessing
    from normzoo.study import store

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    if multiprocessing.parent_process() is not None:
        store.write_json_atomic = full
"""


@pytest.mark.usefixtures("own_registry")
def test_a_full_disk_fails_cells_and_is_mended_by_running_again(tmp_path, monkeypatch):
    file = write(tmp_path / "full.py", FULL_DISK)
    study = tiny(norms=["none"], imports=[file])
    summary = run(study, tmp_path / "a")
    assert (summary.failed, summary.exit_code) == (2, 1)
    assert all("No space left" in row["error"]["message"] for row in store.load_results(summary.directory))

    write_json = store.write_json_atomic

    def full(path, value):
        if Path(path).name == store.RESULT:
            raise OSError(28, "No space left on device")
        write_json(path, value)

    for in_process in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(store, "write_json_atomic", full)
            summary = run(study, tmp_path / "b", workers=1, in_process=in_process)
        assert (summary.failed, summary.unfinished, summary.exit_code) == (1, 1, 1)
        assert "No space left" in str(summary.problem)
    monkeypatch.setattr(store, "write_json_atomic", write_json)
    assert run(tiny(norms=["none"]), tmp_path / "b").exit_code == 0


def test_a_norm_of_an_interactive_session_needs_in_process(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    monkeypatch.setattr(registry, "_norms", dict(registry._norms))
    monkeypatch.setattr(registry, "_names", dict(registry._names))
    mine = type("Mine", (nn.Identity,), {"__module__": "__main__"})
    nz.register("test_runner_mine", mine)
    study = tiny(norms=["test_runner_mine"], seeds=[0])
    with pytest.raises(NormzooError, match="in_process=True"):
        run(study, tmp_path)
    assert run(study, tmp_path, in_process=True).exit_code == 0


# ----------------------------------------------------------------------------------------------------- interruptions

STUCK = """
    import os, pathlib, time
    import normzoo as nz
    from normzoo.study import runner, store

    here = pathlib.Path(__file__).parent
    if runner._inside_cell:
        with open(here / "pids", "a") as file:
            file.write(f"{os.getpid()}\\n")
        # The first process only answers whether all is well; the third training gets stuck after its first line.
        if len((here / "pids").read_text().split()) > 3 and not (here / "go").exists():
            append = store.append_line

            def stuck(path, row):
                append(path, row)
                time.sleep(600)

            store.append_line = stuck

    study = nz.Study(
        "tiny",
        norms=["batch_norm", "rms_norm"],
        tasks=["digits/mlp"],
        settings=nz.grid(epochs=1, train_samples=128, log_every=1),
        seeds=range(3),
    )
"""

RUN = """
    import sys
    from normzoo.study import load_study_file, run_study

    folder = __file__.rpartition("/")[0]
    study = load_study_file(folder + "/stuck.py")
    sys.exit(run_study(study, folder, workers=1, track=False, progress=False).exit_code)
"""


def start(script: Path) -> Any:
    """A script in a process of its own, from the warm forkserver, which saves its imports."""
    context: Any = runner._context()
    process = context.Process(target=runpy.run_path, args=(str(script),))
    with runner._without_main():
        process.start()
    return process


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_study_goes_on_to_the_same_table(uninterrupted, tmp_path, number, code):
    file = write(tmp_path / "stuck.py", STUCK)
    script = write(tmp_path / "run.py", RUN)
    process = start(script)
    directory = tmp_path / "tiny"
    wait_for(lambda: len(list(directory.glob("cells/*/metrics.jsonl"))) == 3)
    with pytest.raises(NormzooError, match=f"is being run already, by process {process.pid} on"):
        run(tiny(seeds=range(3)), tmp_path)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    wait_for(lambda: not any(alive(pid) for pid in pids), seconds=10)  # nobody is left behind
    kept = {path: path.stat().st_mtime_ns for path in directory.glob("cells/*/result.json")}
    assert len(kept) == 2

    (tmp_path / "go").touch()
    summary = run(load_study_file(file), tmp_path)
    assert (summary.done, summary.skipped, summary.exit_code) == (6, 2, 0)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert table(directory) == table(uninterrupted)
    assert curves(directory) == curves(uninterrupted)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_process_a_signal_interrupts_too(tmp_path, number):
    file = write(
        tmp_path / "stops.py",
        f"""
        import os
        from torch import nn

        class Stops(nn.Identity):
            def __init__(self, num_features, channel_dim=1):
                super().__init__()

            def forward(self, x):
                os.kill(os.getpid(), {int(number)})
                return x
        """,
    )
    before = signal.getsignal(number)
    summary = run(tiny(norms=["none", f"{file}:Stops"], seeds=[0]), tmp_path, in_process=True)
    assert (summary.done, summary.unfinished, summary.exit_code) == (1, 1, 128 + number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("attempt", range(1, runner.ATTEMPTS + 1))
def test_a_process_that_ctrl_c_ends_is_neither_started_again_nor_failed(tmp_path, attempt):
    cell, stop, said = tiny().cells()[0], runner._Signals(), []
    display: Any = SimpleNamespace(stop=lambda cell: None, say=said.append, finish=lambda cell, row: said.append(row))
    ended: Any = SimpleNamespace(exitcode=1)  # as a process does that has not yet come to ignore the signal
    store.cell_dir(tmp_path, cell.id).mkdir(parents=True)
    going = runner._Run(tmp_path, [cell], 1, stop, display)
    stop.signal = signal.SIGINT
    assert going._settle(runner._Job(cell, attempt, ended))
    assert not said
    assert store.load_result(tmp_path, cell.id) is None
    stop.signal = None
    assert going._settle(runner._Job(cell, attempt, ended)) == (attempt == runner.ATTEMPTS)
    assert len(said) == 1


@pytest.mark.usefixtures("own_registry")
def test_a_script_that_runs_its_study_unguarded_is_told(tmp_path):
    script = write(
        tmp_path / "script.py",
        """
        import normzoo as nz

        nz.run_study(nz.Study("script", norms=["none"], tasks=["digits/mlp"], seeds=[0]), "elsewhere")
        """,
    )
    with pytest.raises(NormzooError, match='put the call under `if __name__ == "__main__"'):
        run(tiny(imports=[script]), tmp_path)  # as a study whose norms are registered in that script does


# -------------------------------------------------------------------------------------------------------- the mirror


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit(3)", "ended with exit code 3"),
        ("import time; time.sleep(60)", "had not finished after 0.2 s"),
        ("import os, sys; sys.stdin.read(); os.kill(os.getpid(), 9)", "ended with exit code -9"),
    ],
)
def test_no_fault_of_the_mirror_is_one_of_the_study(tmp_path, monkeypatch, capfd, program, said):
    write(tmp_path / "bad_mirror.py", program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "_MIRROR", "bad_mirror")
    summary = run(
        tiny(norms=["none"], seeds=[0]), tmp_path, track=True, progress=True, mirror_wait=0.2 if "0.2" in said else 20
    )
    assert summary.exit_code == 0
    assert f"mirror {said}" in capfd.readouterr().out
    assert not (summary.directory / store.MIRROR_STOP).exists()


def test_the_mirror_is_told_to_finish(tmp_path, monkeypatch, capfd):
    write(
        tmp_path / "good_mirror.py",
        """
        import pathlib, sys, time
        folder = pathlib.Path(sys.argv[1])
        while not (folder / ".mirror-stop").exists():
            time.sleep(0.01)
        assert sys.stdin.read() == ""
        (folder / "seen").write_text(str(len(list(folder.glob("cells/*/result.json")))))
        """,
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "_MIRROR", "good_mirror")
    summary = run(tiny(norms=["none"]), tmp_path, track=True, progress=True)
    assert (summary.directory / "seen").read_text() == "2"
    assert "Weights & Biases" not in capfd.readouterr().out
