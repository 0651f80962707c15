"""Weights & Biases as a mirror: the local files are the truth, and one process a study copies them, live or afterwards.

.. code-block:: text

    python -m normzoo.study.tracking DIR --follow    while the study runs; ends when its runner has ended
    python -m normzoo.study.tracking DIR             a finished or partly finished folder, as often as one likes

Two processes take part, so that nothing W&B does can hold anybody up. The *keeper* (`follow`, `sync`) never imports
wandb: it starts the *worker*, listens to its signs of life, kills it when they stop and, while following, starts
another. The worker keeps one run per cell. Neither writes anything outside ``DIR/wandb`` and ``DIR/mirror.log``.

What makes a repetition free of duplicates:

- ``DIR/wandb/cells/<id>.json`` says per mode how far a cell was mirrored, and whether its run was closed.
- An offline run that was not closed, or has become old, is thrown away and written again: that costs milliseconds.
- An online run is resumed, and continued after the rows that the server has.
- A cell that was started again gets a new online run (``<id>-2``): W&B cannot replace the rows of a run. Its
  predecessor leaves the group for ``superseded``, so that a group holds one run per seed.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import io
import itertools
import json
import math
import netrc
import os
import queue
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from normzoo.errors import NormzooError, unknown
from normzoo.study import store

if TYPE_CHECKING:
    import wandb

PROJECT = "normzoo"
"""The W&B project when neither ``WANDB_PROJECT`` nor W&B's settings name one."""

SUPERSEDED = "superseded"

_FOLDER = "wandb"  # wandb.init(dir=DIR) puts its runs there
_MODES = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    # W&B's other names for the same.
    "run": "online",
    "shared": "online",
    "dryrun": "offline",
}
_CLOUD = ("api.wandb.ai", "api.forge.coreweave.com")


@dataclass(frozen=True)
class Limits:
    """How long the mirror waits, in seconds.

    Args:
        init: for W&B to open a run.
        finish: for W&B to upload the rest of a run.
        stall: for a sign of life of the worker; longer than any single call to W&B may take.
        grace: for the rest to be mirrored after the study has ended.
        poll: between two looks at the files.
        lock: for another mirror of the same folder to end.
    """

    init: float = 20.0
    finish: float = 30.0
    stall: float = 90.0
    grace: float = 120.0
    poll: float = 1.0
    lock: float = 5.0


@dataclass(frozen=True)
class Mirrored:
    """What a mirror did.

    Args:
        directory: the study's folder.
        mode: ``"online"``, ``"offline"`` or ``"disabled"``.
        runs: W&B runs written or continued.
        rows: lines of curves sent.
        unchanged: cells that were mirrored before and have not changed.
        unfinished: those among ``runs`` whose cell has no result yet.
        problem: what went wrong, in one line; None when everything is mirrored.
    """

    directory: Path
    mode: str
    runs: int = 0
    rows: int = 0
    unchanged: int = 0
    unfinished: int = 0
    problem: str | None = None

    @property
    def exit_code(self) -> int:
        """0 when everything is mirrored, 1 when something is missing."""
        return 0 if self.problem is None else 1

    def __str__(self) -> str:
        if self.mode == "disabled":
            return "W&B is disabled; nothing was mirrored"
        count = f"{self.runs} run{'' if self.runs == 1 else 's'}"
        if self.mode == "offline":
            text = f"mirrored {count} offline to {self.directory / _FOLDER}"
        else:
            text = f"mirrored {count} to W&B"
        notes = [f"{self.unchanged} unchanged"] if self.unchanged else []
        notes += [f"{self.unfinished} of a cell without result"] if self.unfinished else []
        text += f" ({', '.join(notes)})" if notes else ""
        if self.mode == "offline" and (self.runs or self.unchanged):
            upload = f"`normzoo sync {self.directory}` or `wandb sync {self.directory / _FOLDER}`"
            text += f"; after `wandb login`, {upload} uploads them"
        if self.problem is not None:
            text += (
                f"\nwarning: {self.problem}; the results are as they were, `normzoo sync {self.directory}` tries again"
            )
        return text


def sync(directory: str | os.PathLike[str], mode: str | None = None, *, limits: Limits | None = None) -> Mirrored:
    """Mirror a study's folder to Weights & Biases; what is mirrored already is left alone.

    It asks nothing, waits for nothing without end, and never touches a result. What goes wrong is told in the returned
    ``problem`` and in ``DIR/mirror.log``.

    Args:
        directory: a folder that a study was run in.
        mode: ``"online"``, ``"offline"`` or ``"disabled"``; by default as `choose_mode` says.
        limits: how long to wait for W&B.

    Raises:
        NormzooError: when the folder is no study's, or the mode is unknown.
    """
    return _keep(Path(directory), mode, limits or Limits(), None)


def follow(directory: str | os.PathLike[str], mode: str | None = None, *, limits: Limits | None = None) -> Mirrored:
    """Mirror a study while it runs.

    It ends when the file `store.MIRROR_STOP` appears in the folder or the pipe on standard input is closed, and then
    first mirrors the rest, for at most ``limits.grace`` seconds. When W&B fails it tries again, with growing pauses.

    Raises:
        NormzooError: when the mode is unknown.
    """
    stop = threading.Event()
    if _is_pipe(sys.stdin):
        _when_closed(sys.stdin, stop.set)
    return _keep(Path(directory), mode, limits or Limits(), stop)


# ----------------------------------------------------------------------------------------------------- mode and login


def choose_mode(mode: str | None = None) -> str:
    """How to mirror: as asked, or as ``WANDB_MODE`` or W&B's settings say, or online for those who are logged in.

    Nothing is asked and no network is used. Logged in are those with ``WANDB_API_KEY`` or
    ``WANDB_IDENTITY_TOKEN_FILE``, a key in W&B's settings, or one for W&B's server in the netrc file.

    Returns:
        ``"online"``, ``"offline"`` or ``"disabled"``; online is answered by offline without a login.

    Raises:
        NormzooError: for an unknown mode.
    """
    settings = _settings_files()
    asked = mode or os.environ.get("WANDB_MODE") or settings.get("mode")
    if asked is not None and asked not in _MODES:
        raise unknown("W&B mode", asked, ("online", "offline", "disabled"))
    chosen = _MODES[asked or "online"]
    return "offline" if chosen == "online" and not _logged_in(settings) else chosen


def _settings_files() -> dict[str, str]:
    """W&B's settings: the user's, overridden by the working folder's."""
    folder = os.environ.get("WANDB_CONFIG_DIR")
    user = Path(folder).expanduser() if folder else Path.home() / ".config" / "wandb"
    files = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, UnicodeError):  # W&B itself warns of a broken file and goes on
        files.read([user / "settings", Path(_FOLDER) / "settings"])
    return dict(files["default"]) if files.has_section("default") else {}


def _logged_in(settings: Mapping[str, str]) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if settings.get("api_key") or settings.get("identity_token_file"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or f"https://{_CLOUD[0]}").netloc
    hosts = _CLOUD if server in _CLOUD else (server,)
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeError):
            entries = netrc.netrc(path.expanduser())
            if any(entries.authenticators(host) for host in hosts):
                return True
    return False


# --------------------------------------------------------------------------------------------------------- the keeper


def _keep(directory: Path, mode: str | None, limits: Limits, stop: threading.Event | None) -> Mirrored:
    """Run workers until everything is mirrored: one to sync, as many as it takes to follow."""
    chosen = choose_mode(mode)
    total = Mirrored(directory, chosen)
    if stop is None:
        store.load_study(directory)
    if chosen == "disabled":
        return total
    if chosen == "offline" and _MODES.get(mode or os.environ.get("WANDB_MODE", "")) == "online":
        total = replace(total, problem="online was asked for without a W&B login (`wandb login`): mirrored offline")
        _note(directory, f"warning: {total.problem}")
    pauses = itertools.chain((2.0, 10.0, 60.0), itertools.repeat(300.0))
    told, since = None, time.time() - 30  # its runner did not wait for this process to come up
    while True:
        last = stop is None or _stopped(directory, stop)
        outcome = _Keeper(directory, chosen, limits, stop, since).run()
        total = replace(
            total,
            runs=total.runs + outcome.runs,
            rows=total.rows + outcome.rows,
            unchanged=max(0, outcome.unchanged - total.runs),  # some were mirrored by an earlier worker of ours
            unfinished=outcome.unfinished,
        )
        if outcome.problem and outcome.problem != told:
            told = outcome.problem
            _note(directory, f"warning: {told}")
        if outcome.problem is None or last:
            break
        deadline = time.monotonic() + next(pauses)
        while time.monotonic() < deadline and not _stopped(directory, stop):
            time.sleep(min(0.2, limits.poll))
    if outcome.problem:
        total = replace(total, problem=outcome.problem)
    _note(directory, str(replace(total, problem=None)))
    return total


def _stopped(directory: Path, stop: threading.Event | None) -> bool:
    return stop is not None and (stop.is_set() or (directory / store.MIRROR_STOP).exists())


def _note(directory: Path, text: str) -> None:
    # A folder that cannot be written must not stop anything; the same text is in the returned summary.
    with contextlib.suppress(OSError), (directory / store.MIRROR_LOG).open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def _is_pipe(stream: Any) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):
        return False  # no standard input, or one without a file behind it


def _when_closed(stream: Any, action: Callable[[], object]) -> None:
    """Act when the other end of a pipe is closed, however its holder went."""

    def wait() -> None:
        while os.read(stream.fileno(), 4096):
            pass
        action()

    threading.Thread(target=wait, daemon=True).start()


class _Keeper:
    """One worker's life, seen from outside."""

    def __init__(self, directory: Path, mode: str, limits: Limits, stop: threading.Event | None, since: float) -> None:
        self.directory, self.mode, self.limits, self.stop, self.since = directory, mode, limits, stop, since
        self.messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self.errors: list[str] = []
        self.last = Mirrored(directory, mode)

    def run(self) -> Mirrored:
        """Start the worker, and answer with what it says it did, or with what became of it."""
        command = [sys.executable, "-P", "-m", "normzoo.study.tracking", str(self.directory), "--worker", self.mode]
        command += ["--follow", "--since", str(self.since)] if self.stop is not None else []
        command += ["--limits", json.dumps(asdict(self.limits))]
        worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(self.directory, self.mode),
            start_new_session=True,  # Ctrl-C is for the study; the mirror still has the rest to write
        )
        assert worker.stdin is not None
        ears = [
            threading.Thread(target=self._listen, args=(worker.stdout,), daemon=True),
            threading.Thread(target=self._overhear, args=(worker.stderr,), daemon=True),
        ]
        for ear in ears:
            ear.start()
        try:
            return self._watch(worker, ears)
        finally:
            worker.kill()
            worker.wait()
            worker.stdin.close()
            for ear in ears:
                ear.join(5.0)

    def _watch(self, worker: subprocess.Popen[bytes], ears: list[threading.Thread]) -> Mirrored:
        assert worker.stdin
        heard = time.monotonic()
        while True:
            try:
                message = self.messages.get(timeout=0.1)
            except queue.Empty:
                message = None
            if message is not None:
                heard = time.monotonic()
                if self._take(message):
                    return self.last
            elif worker.poll() is not None:
                ears[0].join(5.0)
                if self.messages.empty():
                    return self._died(worker.returncode)
            if time.monotonic() - heard > self.limits.stall:
                return replace(
                    self.last, problem=f"W&B gave no sign of life for {self.limits.stall:.0f} s and was stopped"
                )
            if not worker.stdin.closed and _stopped(self.directory, self.stop):
                worker.stdin.close()

    def _take(self, message: dict[str, Any]) -> bool:
        """Note what the worker says; whether it was its last word."""
        if "warning" in message:
            _note(self.directory, f"warning: {message['warning']}")
        self.last = replace(self.last, **message.get("did", {}))
        return "end" in message

    def _died(self, code: int) -> Mirrored:
        words = f": {self.errors[-1]}" if code > 0 and self.errors else ""
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        return replace(self.last, problem=f"the mirror process died ({reason}){words}")

    def _listen(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                if line.endswith(b"\n"):  # the last one may be torn
                    self.messages.put(json.loads(line))

    def _overhear(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                self.errors[:] = [line.decode(errors="replace").strip()]


def _environment(directory: Path, mode: str) -> dict[str, str]:
    """The user's, without what would make all runs one, change their names or print."""
    ours = re.compile(
        "WANDB_(SERVICE|RUN_ID|RUN_GROUP|RESUME|JOB_TYPE|NAME|NOTES|TAGS|SWEEP.*|LAUNCH.*|CONFIG|CONFIG_[0-9]+|DIR|CONSOLE"
        "|DISABLED|SILENT|QUIET|SHOW_.*|CONFIG_PATHS|REINIT)"
    )
    environment = {key: value for key, value in os.environ.items() if not ours.fullmatch(key)}
    # The mirror says itself what went wrong; W&B need not hear of it.
    environment.setdefault("WANDB_ERROR_REPORTING", "false")
    environment.setdefault("WANDB_CACHE_DIR", str(directory.resolve() / _FOLDER / "cache"))
    environment.setdefault("WANDB_DATA_DIR", str(directory.resolve() / _FOLDER / "cache"))
    return environment | {"WANDB_MODE": mode}


# --------------------------------------------------------------------------------------------------------- the worker


class _Trouble(Exception):
    """Something that ends the worker, and whose text says all."""


@dataclass
class _Cell:
    """A cell as the worker knows it; ``settled`` when its run is closed and says what the files say."""

    id: str
    look: tuple[Any, ...] | None = None
    started: float = 0.0
    settled: bool = False
    run: wandb.Run | None = None
    offset: int = 0
    rows: int = 0
    skip: int = 0
    seen: set[str] = field(default_factory=set)


class _Notices(io.TextIOBase):
    """Standard error, kept for reading: nowhere else does W&B say that an upload failed for good."""

    def __init__(self, below: Any) -> None:
        self._below, self._text = below, ""

    def write(self, text: str) -> int:
        self._text += text
        with contextlib.suppress(BrokenPipeError):  # the keeper is gone, and the rest is still to be written
            self._below.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._below.flush()

    def take(self) -> list[str]:
        """The complete lines since the last call."""
        *lines, self._text = self._text.split("\n")
        return lines


class _Worker:
    """Keeps one W&B run per cell, in this process."""

    def __init__(
        self, directory: Path, mode: str, limits: Limits, since: float, notices: _Notices, tell: Callable[..., None]
    ) -> None:
        import wandb

        self.wandb, self.directory, self.mode, self.limits, self.notices = wandb, directory, mode, limits, notices
        self.since, self.tell = since, tell
        self.told = 0.0
        self.study: dict[str, Any] = {}
        self.study_look: tuple[Any, ...] | None = None
        self.cells: dict[str, _Cell] = {}
        self.written: set[str] = set()
        self.unchanged: set[str] = set()
        self.unfinished: set[str] = set()
        self.refused: set[str] = set()
        self.refused_in_a_row = 0
        self.rows = 0
        settings = _settings_files()
        self.project = os.environ.get("WANDB_PROJECT") or settings.get("project") or PROJECT
        server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url")
        self.target = [server, os.environ.get("WANDB_ENTITY") or settings.get("entity"), self.project]

    # The loop

    def follow(self, stop: threading.Event) -> None:
        """Mirror what happens until ``stop``, then the rest."""
        while not stop.is_set():
            self.round(final=False)
            stop.wait(self.limits.poll)
        self.round(final=True, deadline=time.monotonic() + self.limits.grace)

    def round(self, *, final: bool, deadline: float = math.inf) -> None:
        """Look at every cell once; ``final`` also opens and closes the runs of cells without a result."""
        for cell in self._all():
            if time.monotonic() - self.told > 0.5:
                self.report()
            if time.monotonic() > deadline:
                raise _Trouble("no time was left to mirror everything")
            if cell.id in self.refused:
                continue
            try:
                self._step(cell, final)
            except (OSError, _Trouble, self.wandb.errors.CommError):
                raise  # W&B or the disk is at fault, and the other cells would fare no better
            except Exception as error:  # whatever W&B has against this cell must not keep the others from it
                self._refuse(cell, error)
        self.report()

    def report(self) -> None:
        """Give a sign of life, and say what was done."""
        self.told = time.monotonic()
        did = {"runs": len(self.written), "rows": self.rows, "unchanged": len(self.unchanged - self.written)}
        self.tell(did=did | {"unfinished": len(self.unfinished)})

    def _refuse(self, cell: _Cell, error: Exception) -> None:
        self.tell(warning=f"cell {cell.id} is not mirrored: {_line(error)}")
        self.refused.add(cell.id)
        self.refused_in_a_row += 1
        if self.refused_in_a_row == 3:
            raise error  # it is not the cells

    def _all(self) -> list[_Cell]:
        """The cells of the study as it is now."""
        look = _stat(self.directory / store.STUDY)
        if look is not None and look != self.study_look:
            self.study, self.study_look = store.load_study(self.directory), look
        return [self.cells.setdefault(cell_id, _Cell(cell_id)) for cell_id in self.study.get("cells", ())]

    def _step(self, cell: _Cell, final: bool) -> None:
        """Bring one cell's run to what its files say."""
        folder = store.cell_dir(self.directory, cell.id)
        look = tuple(_stat(folder / name) for name in (store.CONFIG, store.METRICS, store.RESULT))
        before, cell.look = cell.look, look
        if look[0] is None or (look == before and (cell.settled or not final)):
            return
        # What lay there unfinished before the study began is left until it moves: it may be waiting to be run again.
        if before is None and look[2] is None and look[0][2] < self.since * 1e9 and not final:
            return
        header = store.load_config(self.directory, cell.id)
        if header is None:
            return
        result = store.load_result(self.directory, cell.id)
        if result is not None and result["started"] != header["started"]:
            result = None
        if cell.run is not None and cell.started != header["started"]:
            cell.run.finish(exit_code=1)  # `_open` sees to what becomes of it
            cell.run = None
        if cell.run is None:
            if self._is_mirrored(cell, header, result):
                cell.settled = True
                self.unchanged.add(cell.id)
                return
            self._open(cell, header)
        if self._send(cell, header) and (result is not None or final):
            self._close(cell, header, result)

    # One run

    def _is_mirrored(self, cell: _Cell, header: dict[str, Any], result: dict[str, Any] | None) -> bool:
        return self._state(cell.id).get("closed") == self._mark(cell, header, result)

    def _mark(self, cell: _Cell, header: dict[str, Any], result: dict[str, Any] | None) -> list[Any]:
        """What tells one state of a cell's files from another, and one place to mirror them to from another."""
        metrics = cell.look[1] if cell.look else None  # as it was before it was read: what came since is mirrored again
        target = self.target if self.mode == "online" else None
        return [header["started"], result and result.get("finished"), metrics and metrics[1], target]

    def _open(self, cell: _Cell, header: dict[str, Any]) -> None:
        """Start or resume the cell's run; ``cell.skip`` rows are there already."""
        cell.started, cell.settled = header["started"], False
        cell.offset = cell.rows = cell.skip = 0
        cell.seen = set()
        cell.run = self._start(cell.id, header) if self.mode == "offline" else self._resume(cell.id, header)
        cell.skip = cell.run.starting_step
        cell.run.define_metric("step")
        cell.run.define_metric("*", step_metric="step")
        if header["mode"] in ("min", "max"):
            cell.run.define_metric(f"val/{header['metric']}", step_metric="step", summary=f"{header['mode']},last")
        cell.run.summary["started"] = header["started"]

    def _start(self, cell_id: str, header: dict[str, Any]) -> wandb.Run:
        """A new offline run in place of the cell's old ones."""
        pattern = re.compile(rf"offline-run-\d+_\d+-{re.escape(cell_id)}(-\d+)*")
        folders = (self.directory / _FOLDER).glob(f"offline-run-*-{cell_id}*")
        old = [folder for folder in folders if pattern.fullmatch(folder.name) and not folder.is_symlink()]
        uploaded = any(any(folder.glob("*.synced")) for folder in old)  # what has been there cannot be replaced
        generation = self._state(cell_id).get("generation", 1) + uploaded
        self._save(cell_id, generation=generation)
        for folder in old:
            shutil.rmtree(folder)
        return self._init(_run_id(cell_id, generation), header)

    def _resume(self, cell_id: str, header: dict[str, Any]) -> wandb.Run:
        """The cell's online run; a new one where the server holds rows of an earlier start of the cell."""
        state = self._state(cell_id)
        if state.get("target") != self.target:
            state = {}
        generation = state.get("generation", 1)
        if state.get("started", header["started"]) != header["started"]:
            generation = self._supersede(cell_id, generation, header)
        while True:
            self._save(cell_id, generation=generation, started=header["started"], target=self.target)
            run = self._init(_run_id(cell_id, generation), header, resume="allow")
            known = run.summary.get("started") if run.starting_step else None
            if known is None or math.isclose(known, header["started"], rel_tol=0, abs_tol=1e-3):
                run.tags = self._tags(header)
                return run
            run.finish(exit_code=1)
            generation = self._supersede(cell_id, generation, header)

    def _supersede(self, cell_id: str, generation: int, header: dict[str, Any]) -> int:
        """Take the run of an abandoned start of a cell out of its group; the number of the next one."""
        run = self._init(_run_id(cell_id, generation), header, resume="allow", group=SUPERSEDED, job_type=SUPERSEDED)
        run.tags = (*self._tags(header), SUPERSEDED)
        run.finish(exit_code=1)
        self._listen()
        return generation + 1

    def _init(self, run_id: str, header: dict[str, Any], **options: Any) -> wandb.Run:
        wanted = {
            "init_timeout": self.limits.init,
            "finish_timeout": self.limits.finish,
            "finish_timeout_raises": True,
            "quiet": True,
            "show_info": False,
            "show_emoji": False,
            "show_colors": False,
            "console": "off",
            "save_code": False,
            "disable_code": True,
            "disable_git": True,
            "label_disable": True,
            "symlink": False,
            # "Stop" in the browser stops what logs: that would be the mirror, not the study.
            "stop_fn": _nothing,
            "x_disable_stats": True,
            "x_disable_meta": True,
            "x_disable_machine_info": True,
            "x_disable_viewer": True,
            "x_save_requirements": False,
            "x_transaction_log_flush_interval": 1.0,
        }
        # Other versions of W&B lack some of these, and refuse what they do not know.
        settings = {key: value for key, value in wanted.items() if key in self.wandb.Settings.model_fields}
        return self.wandb.init(
            id=run_id,
            name=f"{header['task']} {self._label(header)} seed {header['seed']}",
            project=self.project,
            tags=self._tags(header),
            # W&B reads a period in a key as nesting, and then cannot filter by it.
            config={key.replace(".", "/"): value for key, value in header["config"].items()},
            dir=str(self.directory),
            mode=self.mode,
            reinit="create_new",
            settings=self.wandb.Settings(**settings),
            **({"group": header["group"], "job_type": "train"} | options),
        )

    def _label(self, header: dict[str, Any]) -> str:
        return self.study.get("labels", {}).get(header["norm"], header["label"])

    def _tags(self, header: dict[str, Any]) -> tuple[str, ...]:
        tags = (header["study"], header["task"], self._label(header))
        return tuple(dict.fromkeys(tag[:64] for tag in tags if tag))  # W&B takes at most 64 characters

    def _send(self, cell: _Cell, header: dict[str, Any]) -> bool:
        """Log the lines that are new and complete; false when the cell was started again at this very moment."""
        assert cell.look is not None
        folder = store.cell_dir(self.directory, cell.id)
        data = b""
        with contextlib.suppress(FileNotFoundError), (folder / store.METRICS).open("rb") as file:
            file.seek(cell.offset)
            data = file.read()
        if _stat(folder / store.CONFIG) != cell.look[0]:
            cell.look = ()
            return False
        data = data[: data.rfind(b"\n") + 1]
        cell.offset += len(data)
        for line in data.splitlines():
            row = _decode(line)
            if row is not None:
                self._log(cell, header, row)
            elif line:
                self.tell(warning=f"cell {cell.id} has a line in {store.METRICS} that is no row; it is not mirrored")
        return True

    def _log(self, cell: _Cell, header: dict[str, Any], row: dict[str, Any]) -> None:
        assert cell.run is not None
        cell.rows += 1
        cell.seen.update(row)
        if cell.rows > cell.skip:
            # W&B's own clock starts with the mirror; the cell's is the one that means something.
            when = {"_timestamp": header["started"] + row["seconds"]} if _is_number(row.get("seconds")) else {}
            cell.run.log(row | when)
            self.rows += 1

    def _close(self, cell: _Cell, header: dict[str, Any], result: dict[str, Any] | None) -> None:
        """End the run as its cell ended; without a result it ends as failed, and is continued when the cell is."""
        run, cell.run = cell.run, None
        assert run is not None
        status = result["status"] if result else "unfinished"
        if status != "done":
            run.tags = (*self._tags(header), status)
        run.summary.update(_summary(header, result, cell.seen) | {"status": status})
        run.finish(exit_code=0 if status in ("done", "diverged") else 1)
        self._listen()
        self._save(cell.id, closed=self._mark(cell, header, result))
        cell.settled = True
        self.refused_in_a_row = 0
        self.written.add(cell.id)
        (self.unfinished.add if result is None else self.unfinished.discard)(cell.id)

    def _listen(self) -> None:
        """Raise when W&B has said that it gave up, pass other warnings on."""
        for line in self.notices.take():
            text = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
            if "ERROR" in text or "Fatal error" in text:
                raise _Trouble(text.removeprefix("wandb: ").removeprefix("WARNING "))
            if "WARNING" in text:
                self.tell(warning=text.removeprefix("wandb: WARNING "))

    # What the mirror remembers of a cell, in each mode

    def _state(self, cell_id: str) -> dict[str, Any]:
        return self._states(cell_id).get(self.mode, {})

    def _states(self, cell_id: str) -> dict[str, Any]:
        path = self._state_path(cell_id)
        return (store.read_json(path) or {}) if path.exists() else {}

    def _save(self, cell_id: str, **changes: Any) -> None:
        """Remember something; unless it is that the run was closed, the run is open now."""
        path = self._state_path(cell_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        states = self._states(cell_id)
        store.write_json_atomic(path, states | {self.mode: states.get(self.mode, {}) | {"closed": None} | changes})

    def _state_path(self, cell_id: str) -> Path:
        return self.directory / _FOLDER / "cells" / f"{cell_id}.json"


def _run_id(cell_id: str, generation: int) -> str:
    return cell_id if generation == 1 else f"{cell_id}-{generation}"


def _nothing() -> None:
    """What the mirror does when it is told to stop from the browser."""


def _stat(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does: inode, size, time."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _decode(line: bytes) -> dict[str, Any] | None:
    """A row as W&B takes it: numbers that JSON cannot say are NaN again."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    return row | dict.fromkeys(row.pop("nonfinite", ()), math.nan)


def _summary(header: dict[str, Any], result: dict[str, Any] | None, seen: set[str]) -> dict[str, Any]:
    """What the result knows beyond the curves, flat; the summaries that W&B makes of curves stay W&B's."""
    flat: dict[str, Any] = {"attempt": header["attempt"]}
    if result is None:
        return flat
    flat |= {key: value for key, value in result["metrics"].items() if key not in seen}
    for key in ("steps", "step_ms", "parameters", "norm_parameters", "peak_memory_mb"):
        flat[key] = result.get(key)
    flat |= {f"seconds/{key}": value for key, value in (result.get("seconds") or {}).items()}
    flat |= {f"host/{key}": value for key, value in (result.get("host") or {}).items()}
    flat |= {f"versions/{key}": value for key, value in (result.get("versions") or {}).items()}
    if result.get("error"):
        flat["error"] = f"{result['error']['type']}: {result['error']['message']}"[:1000]
    return flat


def _line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


@contextlib.contextmanager
def _alone(directory: Path, patience: Callable[[], bool]) -> Iterator[None]:
    """Be the only mirror of a folder, waiting for another one as long as there is patience."""
    folder = directory / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(store.lock(folder))
                break
            except NormzooError:
                if not patience():
                    raise NormzooError(
                        f"another process mirrors {directory} at this moment, as a running study does"
                    ) from None
                time.sleep(0.2)
        yield


def _work(directory: Path, mode: str, limits: Limits, following: bool, since: float) -> None:
    """The worker's life. It ends by `os._exit`: wandb's own way out waits for whatever is still open."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stderr = notices = _Notices(os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for handle in (1, 2):
        os.dup2(nowhere, handle)  # wandb-core inherits these, and would hold the keeper's pipes open
    closed = threading.Event()

    def tell(**message: Any) -> None:
        try:
            channel.write(json.dumps(message) + "\n")
            channel.flush()
        except BrokenPipeError:
            closed.set()

    # Without its keeper a worker that follows writes the rest, one that syncs goes.
    _when_closed(sys.stdin, closed.set if following else lambda: os._exit(1))
    begun = time.monotonic()

    def patience() -> bool:
        tell()
        return (following and not closed.is_set()) or time.monotonic() - begun < limits.lock

    problem = None
    try:
        with _warnings_told(tell), _alone(directory, patience):
            worker = _Worker(directory, mode, limits, since, notices, tell)
            if following:
                worker.follow(closed)
            else:
                worker.round(final=True)
            worker.wandb.teardown()
            if worker.refused:
                problem = f"W&B did not take {len(worker.refused)} of the cells; see {directory / store.MIRROR_LOG}"
    except Exception as error:  # whatever it is, the keeper writes it down
        problem = str(error) if isinstance(error, NormzooError | _Trouble) else f"the mirror failed: {_line(error)}"
    tell(did={"problem": problem}, end=True)
    os._exit(0 if problem is None else 1)


@contextlib.contextmanager
def _warnings_told(tell: Callable[..., None]) -> Iterator[None]:
    """Pass the store's warnings on, each once."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, store.StoreWarning):
            tell(warning=str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("once", store.StoreWarning)
        warnings.showwarning = show
        yield


def main(arguments: list[str] | None = None) -> int:
    """The command line: ``python -m normzoo.study.tracking DIR [--follow] [--mode MODE]``."""
    parser = argparse.ArgumentParser(prog="python -m normzoo.study.tracking", description="Mirror a study to W&B.")
    parser.add_argument("directory", type=Path, help="the folder of a study")
    parser.add_argument("--follow", action="store_true", help="until its runner has ended")
    parser.add_argument("--mode", help="online, offline or disabled")
    parser.add_argument("--limits", type=json.loads, default={}, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    limits = Limits(**options.limits)
    if options.follow and _is_pipe(sys.stdin):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the runner, who closes the pipe
    if options.worker:
        _work(options.directory, options.worker, limits, options.follow, options.since)
    try:
        done = (follow if options.follow else sync)(options.directory, options.mode, limits=limits)
    except NormzooError as error:
        print(error, file=sys.stderr)
        return 2
    if not options.follow:
        print(done)
    return done.exit_code


if __name__ == "__main__":
    sys.exit(main())
