"""The W&B mirror: whatever happens to it, its runs say what the files say, once, and the files stay as they were."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from normzoo.errors import NormzooError
from normzoo.study import store, tracking

sys.path.insert(0, str(Path(__file__).parent))
import wandb_stub

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="stops processes by POSIX signals")

GROUP = "digits/cnn batch_norm 0a1b2c3d"
QUICK = tracking.Limits(init=3.0, finish=3.0, stall=30.0, grace=30.0, poll=0.05)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's login, settings, network or working folder."""
    for name in os.environ:
        if name.startswith("WANDB") or name == "NETRC":
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(home)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[wandb_stub.Stub]:
    with wandb_stub.serving() as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        monkeypatch.setenv("WANDB_API_KEY", wandb_stub.API_KEY)
        yield stub


class Folder:
    """A study's folder, written as the runner and its cells write it."""

    def __init__(self, path: Path, cells: int) -> None:
        self.path = path
        path.mkdir(parents=True)
        self.ids = [f"{n:016x}" for n in range(cells)]
        record = {key: [] for key in ("norms", "tasks", "settings", "seeds", "varied")}
        record |= {"name": "tiny", "labels": {"batch_norm": "BN"}, "baseline": "BN", "threads": 1, "versions": {}}
        store.open_study(path, record | {"cells": self.ids, "keys": {cell: cell for cell in self.ids}, "created": 1.0})

    def start(self, cell: int, attempt: int = 1, **changes: Any) -> dict[str, Any]:
        """A new attempt at a cell: its header."""
        header = {
            "id": self.ids[cell],
            "study": "tiny",
            "norm": "batch_norm",
            "label": "batch_norm",
            "task": "digits/cnn",
            "seed": cell,
            "group": GROUP,
            "metric": "accuracy",
            "mode": "max",
            "config": {"lr": 0.1, "model.depth": 3, "seed": cell, "clip": None},
            "attempt": attempt,
            "started": 1.7e9 + cell + attempt / 8,
        }
        store.prepare_cell(self.path, header | changes)
        return header | changes

    def log(self, header: dict[str, Any], steps: range, **more: float) -> None:
        """Some lines of the curve; the values tell attempts apart."""
        for step in steps:
            row = {"step": step, "epoch": step // 5, "seconds": step / 7, "train/loss": header["attempt"] / (step + 1)}
            row |= {"val/accuracy": (0.1, 0.5, 0.3)[step % 3]} if step % 2 else {}
            store.append_line(self.file(header, store.METRICS), row | more)

    def end(self, header: dict[str, Any], status: str = "done", **changes: Any) -> None:
        """The cell's row."""
        error = {"type": "ValueError", "message": "no", "traceback": "..."} if status == "failed" else None
        row = header | {
            "status": status,
            "metrics": {"val/accuracy": 0.3, "test/accuracy": 0.7},
            "steps": 30,
            "seconds": {"total": 3.0, "train": 2.0, "setup": 1.0},
            "step_ms": 1.5,
            "parameters": 10,
            "norm_parameters": 2,
            "peak_memory_mb": None,
            "versions": {"torch": "2.13"},
            "host": {"platform": "somewhere"},
            "error": error,
            "finished": header["started"] + 9,
        }
        store.write_json_atomic(self.file(header, store.RESULT), row | changes)

    def write(self, cell: int, rows: int, status: str | None = "done", attempt: int = 1) -> dict[str, Any]:
        """A whole cell."""
        header = self.start(cell, attempt)
        self.log(header, range(rows))
        if status:
            self.end(header, status)
        return header

    def file(self, header: dict[str, Any], name: str) -> Path:
        return store.cell_dir(self.path, header["id"]) / name

    def rows(self, cell: int) -> list[dict[str, Any]]:
        """What a mirror must hold: the lines of the file, with numbers that JSON cannot say as texts."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", store.StoreWarning)
            rows = store.load_metrics(self.path, self.ids[cell])
        return [row | {key: "NaN" for key in row.pop("nonfinite", ())} for row in rows]

    def runs(self, cell: int | None = None) -> list[Path]:
        """The offline runs, of one cell or of all."""
        found = sorted((self.path / "wandb").glob("offline-run-*"))
        return [run for run in found if cell is None or f"-{self.ids[cell]}" in run.name]

    def contents(self) -> dict[str, bytes]:
        """Everything that is not the mirror's."""
        files = [path for path in self.path.rglob("*") if path.is_file() and "wandb" not in path.parts]
        return {str(path): path.read_bytes() for path in files if path.name != store.MIRROR_LOG}

    @property
    def warnings(self) -> list[str]:
        """The warnings in the mirror's log."""
        lines = (self.path / store.MIRROR_LOG).read_text().splitlines()
        return [line for line in lines if " warning: " in line]


READER = """
import sys
from wandb.cli.cli import cli
for path in sys.argv[1:]:
    try:
        cli(["leet", "inspect", "--json", path])
    except SystemExit:
        print("end of run", flush=True)
"""


def inspect(*runs: Path) -> list[dict[str, Any]]:
    """What offline runs hold, as ``wandb leet inspect --json`` tells it; one process for all, for its imports."""
    command = [sys.executable, "-c", READER, *map(str, runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    texts = done.stdout.split("end of run\n")[:-1]
    assert len(texts) == len(runs)
    return [_digest([json.loads(line) for line in text.splitlines()]) for text in texts]


def _digest(records: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": [], "summary": {}, "metrics": {}, "steps": [], "exit": None, "tags": []}
    for record in records:
        value = record.get(record["type"], {})
        if record["type"] == "run":
            found |= {"run": value, "tags": value["tags"]}
        elif record["type"] == "history":
            found["steps"].append(value["item"]["_step"])
            found["rows"].append({k: v for k, v in value["item"].items() if not k.startswith("_")})
        elif record["type"] == "summary":
            found["summary"] |= value["update"]
        elif record["type"] == "metric":
            found["metrics"][value.get("name") or value["glob_name"]] = value
        elif record["type"] == "exit":
            found["exit"] = value.get("exit_code", 0)
    return found


@contextlib.contextmanager
def following(folder: Folder, *, limits: tracking.Limits = QUICK) -> Iterator[subprocess.Popen[str]]:
    """A mirror that follows, as the runner starts one."""
    command = [sys.executable, "-m", "normzoo.study.tracking", str(folder.path), "--follow"]
    process = subprocess.Popen(
        [*command, "--limits", json.dumps(vars(limits))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def worker(folder: Folder) -> int:
    """The process that holds the mirror's lock, once there is one."""
    lock = folder.path / "wandb" / store.LOCK
    until(lambda: lock.exists() and lock.read_text().startswith("process "))
    found = re.match(r"process (\d+)", lock.read_text())
    assert found is not None
    return int(found[1])


def core(parent: int) -> int:
    """W&B's own process below a worker."""
    if Path("/proc/self/stat").exists():
        texts = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
        pairs = [(text.split()[0], text.rpartition(")")[2].split()[1]) for text in texts]
    else:
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [tuple(line.split()) for line in listing.splitlines()]
    return next(int(process) for process, above in pairs if above == str(parent))


# ------------------------------------------------------------------------------------------------------------ offline


def test_offline_runs_say_what_the_files_say(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "tiny", 5)
    for cell, status in enumerate(("done", "failed", "diverged", None)):
        folder.write(cell, 8, status)
    folder.log(folder.start(1), range(3), **{"train/loss": math.nan, "grad": math.inf})
    folder.end({**folder.start(1, attempt=2)}, "failed")  # failed before its first row
    with (folder.path / "cells" / folder.ids[3] / store.METRICS).open("a") as file:
        file.write('foreign\n{"step": 8, "torn')
    header = folder.start(2)
    folder.log(header, range(3), **{"train/loss": math.nan, "grad": math.inf})
    folder.end(header, "diverged")
    before = folder.contents()

    done = tracking.sync(folder.path)
    assert (done.mode, done.runs, done.unchanged, done.unfinished, done.problem) == ("offline", 4, 0, 1, None)
    assert done.rows == 8 + 0 + 3 + 8
    assert "normzoo sync" in str(done)
    runs = folder.runs()
    assert len(runs) == 4
    found = {run["run"]["run_id"]: run for run in inspect(*runs)}
    for cell in range(4):
        run = found[folder.ids[cell]]
        expected = folder.rows(cell)
        assert run["rows"] == expected
        assert run["steps"] == list(range(len(expected)))
        assert run["run"]["run_group"] == GROUP
        assert run["run"]["job_type"] == "train"
        assert run["run"]["project"] == "normzoo"
        assert run["run"]["display_name"] == f"digits/cnn BN seed {cell}"
        config = {key: value for key, value in run["run"]["config"]["update"].items() if key != "_wandb"}
        assert config == {"lr": 0.1, "model/depth": 3, "seed": cell, "clip": None}
        assert run["metrics"]["val/accuracy"]["summary"] == {"last": True, "max": True}
        assert run["metrics"]["*"]["step_metric"] == "step"
    tags = ["tiny", "digits/cnn", "BN"]
    assert [found[cell]["tags"] for cell in folder.ids[:4]] == [
        tags,
        [*tags, "failed"],
        [*tags, "diverged"],
        [*tags, "unfinished"],
    ]
    assert [found[cell]["exit"] for cell in folder.ids[:4]] == [0, 1, 0, 1]
    summary = found[folder.ids[0]]["summary"]
    assert summary["val/accuracy"] == {"max": 0.5, "last": 0.5}
    assert (summary["test/accuracy"], summary["status"], summary["seconds/total"]) == (0.7, "done", 3.0)
    assert found[folder.ids[1]]["summary"]["error"] == "ValueError: no"
    assert any("is no row" in line for line in folder.warnings)

    # Again: nothing. Then only what has changed: a cell that went on, one that was run again, one that was uploaded.
    assert tracking.sync(folder.path).unchanged == 4
    assert folder.runs() == runs
    assert folder.contents() == before
    header = store.load_config(folder.path, folder.ids[3])
    assert header is not None
    folder.log(header, range(9, 12))
    folder.end(header)
    folder.write(1, 5, attempt=3)
    (folder.runs(2)[0] / f"run-{folder.ids[2]}.wandb.synced").touch()
    folder.write(2, 4, attempt=2)
    done = tracking.sync(folder.path)
    assert (done.runs, done.unchanged, done.unfinished) == (3, 1, 0)
    runs = [folder.runs(cell)[0] for cell in (1, 2, 3)]
    assert len(folder.runs()) == 4
    for cell, run in zip((1, 2, 3), inspect(*runs), strict=True):
        assert run["rows"] == folder.rows(cell)
        assert run["run"]["run_id"] == folder.ids[cell] + ("-2" if cell == 2 else "")
        assert run["exit"] == 0


def test_a_mirror_killed_in_the_middle_is_completed_without_duplicates(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "tiny", 24)
    for cell in range(24):
        folder.write(cell, 120)
    process = subprocess.Popen([sys.executable, "-m", "normzoo.study.tracking", str(folder.path)])
    with process:
        until(lambda: len(folder.runs()) >= 6)
        os.kill(worker(folder), signal.SIGKILL)
    assert process.returncode == 1
    assert "the mirror process died (signal 9)" in folder.warnings[0]
    open_at_death = folder.runs()[-1]
    assert len(folder.runs()) < 24

    done = tracking.sync(folder.path)
    assert done.problem is None
    assert done.runs + done.unchanged == 24
    assert done.unchanged >= 4
    assert [len(folder.runs(cell)) for cell in range(24)] == [1] * 24
    interrupted = folder.ids.index(open_at_death.name.rsplit("-", 1)[-1])
    cells = [0, interrupted, 23]
    for cell, run in zip(cells, inspect(*(folder.runs(cell)[0] for cell in cells)), strict=True):
        assert run["rows"] == folder.rows(cell)
        assert run["exit"] == 0


def test_following_survives_the_death_of_its_parts(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "tiny", 3)
    left = folder.write(2, 3, None)  # by an earlier run, and waiting to be run again
    os.utime(folder.file(left, store.CONFIG), (1.7e9, 1.7e9))
    with following(folder) as mirror:
        first = worker(folder)
        header = folder.start(0)
        folder.log(header, range(5))
        until(lambda: folder.runs(0))
        assert folder.runs(2) == []
        until(lambda: inspect(*folder.runs(0))[0]["rows"] == folder.rows(0))  # live: the run is still open
        with folder.file(header, store.METRICS).open("a") as file:
            file.write('{"step": 5, ')
            file.flush()
            time.sleep(0.2)
            file.write('"seconds": 1.0}\n')
        os.kill(core(first), signal.SIGKILL)
        folder.log(header, range(6, 9))
        until(lambda: worker(folder) != first)  # another one was started
        folder.end(header)
        second = folder.write(1, 4, None)
        until(lambda: folder.runs(1))
        folder.log(folder.start(1, attempt=2), range(2))  # started again while its run is open
        folder.log(second | {"attempt": 2}, range(2, 7))
        folder.end(second | {"attempt": 2, "started": second["started"] + 1 / 8})
        before = folder.contents()
        (folder.path / store.MIRROR_STOP).touch()
        output, _ = mirror.communicate(timeout=60)
        (folder.path / store.MIRROR_STOP).unlink()
    assert (mirror.returncode, output) == (0, "")
    assert folder.contents() == before
    assert len(folder.warnings) == 1
    assert [len(folder.runs(cell)) for cell in range(3)] == [1, 1, 1]
    for cell, run in enumerate(inspect(*folder.runs(0), *folder.runs(1), *folder.runs(2))):
        assert run["rows"] == folder.rows(cell)
        assert run["exit"] == (1 if cell == 2 else 0)


def test_the_mirror_outlives_its_runner_only_to_write_the_rest(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "tiny", 1)
    header = folder.start(0)
    with following(folder) as mirror:
        worker(folder)
        folder.log(header, range(4))
        until(folder.runs)
        assert "another process mirrors" in (tracking.sync(folder.path, limits=tracking.Limits(lock=0.5)).problem or "")
        folder.log(header, range(4, 6))
        assert mirror.stdin is not None
        mirror.stdin.close()  # as the system does when the runner is killed
        assert mirror.wait(30) == 0
    (run,) = inspect(*folder.runs())
    assert run["rows"] == folder.rows(0)
    assert run["tags"][-1] == "unfinished"


# ------------------------------------------------------------------------------------------------------------- online


def test_online_runs_hold_the_rows_once(tmp_path: Path, server: wandb_stub.Stub) -> None:
    folder = Folder(tmp_path / "tiny", 4)
    for cell, status in enumerate(("done", "failed", "diverged", None)):
        folder.write(cell, 6, status)

    def check(names: dict[int, str]) -> None:
        for cell, name in names.items():
            assert server.rows(name) == folder.rows(cell)
            assert [row["_step"] for row in server.runs[name].rows] == list(range(len(folder.rows(cell))))

    done = tracking.sync(folder.path)
    assert (done.mode, done.runs, done.rows, done.problem) == ("online", 4, 24, None)
    same = dict(enumerate(folder.ids))
    check(same)
    runs = [server.runs[cell] for cell in folder.ids]
    assert [run.exit_code for run in runs] == [0, 1, 0, 1]
    assert [run.fields["tags"][3:] for run in runs] == [[], ["failed"], ["diverged"], ["unfinished"]]
    assert {run.fields["groupName"] for run in runs} == {GROUP}
    assert runs[0].config["model/depth"] == 3
    assert runs[0].summary["val/accuracy"] == {"max": 0.5, "last": 0.3}
    assert runs[0].rows[-1]["_timestamp"] == pytest.approx(1.7e9 + 1 / 8 + 5 / 7)
    assert server.requests.count("otel") == 0

    # Again: the server is not even asked. Then the unfinished one goes on, and the failed one is run again.
    asked = len(server.requests)
    assert tracking.sync(folder.path).unchanged == 4
    assert len(server.requests) == asked
    header = store.load_config(folder.path, folder.ids[3])
    assert header is not None
    folder.log(header, range(6, 9))
    folder.end(header)
    folder.write(1, 4, attempt=2)
    done = tracking.sync(folder.path)
    assert (done.runs, done.rows, done.unchanged) == (2, 3 + 4, 2)
    check(same | {1: f"{folder.ids[1]}-2"})
    assert len(server.runs) == 5
    assert server.runs[folder.ids[3]].exit_code == 0
    assert server.runs[folder.ids[3]].fields["tags"] == ["tiny", "digits/cnn", "BN"]
    assert server.runs[folder.ids[1]].fields["groupName"] == tracking.SUPERSEDED
    assert server.runs[f"{folder.ids[1]}-2"].fields["groupName"] == GROUP

    # The mirror's memory is lost: what the server knows is enough.
    for state in (folder.path / "wandb" / "cells").iterdir():
        state.unlink()
    done = tracking.sync(folder.path)
    assert (done.runs, done.rows, done.problem) == (4, 0, None)
    check(same | {1: f"{folder.ids[1]}-2"})
    assert len(server.runs) == 5


def test_an_interrupted_online_mirror_goes_on_where_the_server_is(tmp_path: Path, server: wandb_stub.Stub) -> None:
    folder = Folder(tmp_path / "tiny", 1)
    header = folder.start(0)
    name = folder.ids[0]
    with following(folder) as mirror:
        pid = worker(folder)
        folder.log(header, range(10))
        until(lambda: name in server.runs and len(server.runs[name].history) == 10)  # live: W&B sends every 15 s
        mirror.kill()
        os.kill(pid, signal.SIGKILL)
    folder.log(header, range(10, 25))
    folder.end(header)
    before = folder.contents()
    done = tracking.sync(folder.path)
    assert (done.runs, done.rows, done.problem) == (1, 15, None)
    assert server.rows(name) == folder.rows(0)
    assert list(server.runs) == [name]
    assert server.runs[name].exit_code == 0
    assert folder.contents() == before


# ------------------------------------------------------------------------------------------------------------- faults


def test_a_server_that_fails_costs_a_bounded_time_and_one_warning(
    tmp_path: Path, server: wandb_stub.Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path / "tiny", 2)
    for cell in range(2):
        folder.write(cell, 5)
    before = folder.contents()
    limits = tracking.Limits(init=1.5, finish=1.5, stall=20.0)

    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    done = tracking.sync(folder.path, limits=limits)  # nobody there
    assert "refused" in (done.problem or "")
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    server.fail_streams_with = 403  # refuses for good
    assert "Fatal error while uploading" in (tracking.sync(folder.path, limits=limits).problem or "")
    server.fail_streams_with = 500  # may answer later
    assert "Timed out" in (tracking.sync(folder.path, limits=limits).problem or "")
    assert time.monotonic() - began < 60
    assert done.exit_code == 1
    assert len(folder.warnings) == 3
    assert folder.contents() == before

    server.fail_streams_with = None
    assert tracking.sync(folder.path).problem is None
    assert [server.rows(name) for name in folder.ids] == [folder.rows(0), folder.rows(1)]
    assert len(server.runs) == 2


def test_a_mirror_that_hangs_is_stopped(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "tiny", 1)
    folder.write(0, 3, None)
    with following(folder, limits=tracking.Limits(stall=5.0, poll=0.05)) as mirror:
        os.kill(worker(folder), signal.SIGSTOP)
        (folder.path / store.MIRROR_STOP).touch()
        assert mirror.wait(60) == 0  # the second worker does it
    assert "no sign of life" in folder.warnings[0]
    assert len(folder.runs()) == 1


def test_a_cell_that_is_refused_does_not_keep_the_others(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "tiny", 3)
    for cell in range(3):
        folder.write(cell, 3)
    header = folder.start(1)
    folder.end(header)
    store.write_json_atomic(folder.file(header, store.CONFIG), {k: v for k, v in header.items() if k != "mode"})
    done = tracking.sync(folder.path)
    assert done.runs == 2
    assert "1 of the cells" in (done.problem or "")
    assert f"cell {folder.ids[1]} is not mirrored: KeyError: 'mode'" in folder.warnings[0]
    assert len(folder.runs(0)) == len(folder.runs(2)) == 1


# ----------------------------------------------------------------------------------------------------- mode and login


def test_the_mode_is_what_was_asked_or_what_the_login_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path.home()
    monkeypatch.delenv("WANDB_BASE_URL")
    assert tracking.choose_mode() == "offline"
    assert tracking.choose_mode("online") == "offline"
    assert tracking.choose_mode("disabled") == "disabled"
    netrc = home / ".netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {wandb_stub.API_KEY}\n")
    netrc.chmod(0o600)
    assert tracking.choose_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert tracking.choose_mode() == "offline"
    monkeypatch.delenv("WANDB_BASE_URL")
    for asked, mode in {"offline": "offline", "dryrun": "offline", "disabled": "disabled", "run": "online"}.items():
        monkeypatch.setenv("WANDB_MODE", asked)
        assert tracking.choose_mode() == mode
        assert tracking.choose_mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(NormzooError, match="did you mean 'offline'"):
        tracking.choose_mode()
    monkeypatch.delenv("WANDB_MODE")
    netrc.unlink()
    settings = home / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nmode = disabled\n")
    assert tracking.choose_mode() == "disabled"
    settings.write_text(f"[default]\napi_key = {wandb_stub.API_KEY}\n")
    assert tracking.choose_mode() == "online"
    settings.write_text("not settings")
    assert tracking.choose_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", wandb_stub.API_KEY)
    assert tracking.choose_mode() == "online"


def test_nothing_is_written_where_nothing_is_to_be_mirrored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NormzooError, match="no study folder"):
        tracking.sync(tmp_path)
    assert tracking.main([str(tmp_path)]) == 2
    assert "no study folder" in capsys.readouterr().err
    folder = Folder(tmp_path / "tiny", 1)
    folder.write(0, 3)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.main([str(folder.path)]) == 0
    assert capsys.readouterr().out == "W&B is disabled; nothing was mirrored\n"
    assert sorted(path.name for path in folder.path.iterdir()) == ["cells", "study.json"]


def test_the_keeper_does_not_import_wandb() -> None:
    code = "import sys; from normzoo.study import tracking; print(sorted({'wandb', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
