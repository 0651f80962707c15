"""Two processes that share statistics: a server that is started once forks a pair of ranks for every norm.

The server is a process of its own that has imported torch and run nothing: forking it is quick, and safe, which forking
the caller, with its threads and devices, is not.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normzoo.checks.subject import CheckFailed, NotApplicable, Subject, call, outside
from normzoo.errors import NormzooError
from normzoo.registry import canonical, list_norms, load_file, resolve

LENGTHS = ((4, 4), (3, 5), (8, 0))
PATIENCE = 30.0  # seconds for a pair; it takes one
Answer = dict[Any, Any]

_inside = False
_server: tuple[subprocess.Popen[bytes], Connection] | None = None
_answers: dict[str, Answer] = {}


# ---- the caller's side -----------------------------------------------------------------------------------------------


def start() -> None:
    """Start the server, if it does not run; it imports torch while the caller does something else."""
    global _server
    if not _possible() or (_server is not None and _server[0].poll() is None):
        return
    here, there = Pipe()
    command = [sys.executable, "-c", "import sys; from normzoo.checks import pair; pair.serve(int(sys.argv[1]))"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [*command, str(there.fileno())], pass_fds=[there.fileno()], env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    there.close()
    _server = process, here


def inside() -> bool:
    """Whether this process is one of a pair, or their server."""
    return _inside


def _possible() -> bool:
    return hasattr(os, "fork") and dist.is_available() and dist.is_gloo_available() and not _inside


@atexit.register
def stop() -> None:
    """End the server."""
    global _server
    if _server is not None:
        process, connection = _server
        _server = None
        connection.close()
        process.kill()
        process.wait()


def ask(subject: Subject) -> Answer:
    """What two processes find for a norm: for each case a list of two dictionaries, or the error as text.

    Raises:
        NotApplicable: where there cannot be two processes, or where another process could not find the norm.
    """
    if not _possible():
        raise NotApplicable("needs os.fork and the gloo backend of torch.distributed")
    try:
        name = canonical(subject.spec)
    except NormzooError as error:
        raise NotApplicable("another process cannot find it: define it at the top level of a file") from error
    home = inspect.getmodule(resolve(subject.spec)[0])
    if home is not None and home.__name__ == "__main__":
        raise NotApplicable("is defined by the script that runs, which another process would run again")
    if name not in _answers:
        _answers[name] = _ask(name, getattr(home, "__file__", None), subject.takes("sync"))
    if "unavailable" in _answers[name]:
        raise NotApplicable(_answers[name]["unavailable"])
    return _answers[name]


def _ask(name: str, file: str | None, sync: bool) -> Answer:
    global _server
    start()
    assert _server is not None
    process, connection = _server
    request = {"spec": name, "file": file, "path": sys.path, "sync": sync}
    try:
        connection.send(request)
        if not connection.poll(2 * PATIENCE):
            raise EOFError
        answer = pickle.loads(connection.recv_bytes())
    except (EOFError, OSError) as error:
        process.kill()
        _server = None
        raise RuntimeError("the process that starts pairs of processes did not answer") from error
    return answer


# ---- the server's side -----------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Answer requests until the caller is gone."""
    global _inside
    _inside = True
    torch.set_num_threads(1)
    for name in ("torch._dynamo", "einops._torch_specific"):  # what the ranks would import, each for itself
        importlib.import_module(name)
    list_norms()
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name need not resolve
    connection = Connection(descriptor)
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(_run_pair(request)))


def _run_pair(request: dict[str, Any]) -> Answer:
    """Fork two ranks, and put their findings together."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_fork(rank, request, Path(folder)) for rank in range(2)]
        found: dict[int, Answer] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(ranks)}
        while waiting:
            ready = wait(list(waiting), timeout=PATIENCE)
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    found[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    found[rank] = {"error": f"process {rank} died"}
        for pid, connection in ranks:
            if connection in waiting:
                os.kill(pid, 9)
            connection.close()
            os.waitpid(pid, 0)
    if len(found) < 2:
        return _everywhere(f"two processes wait for each other: no answer within {PATIENCE:g} s")
    for rank in (0, 1):
        if "unavailable" in found[rank]:
            return found[rank]
        if "error" in found[rank]:
            return _everywhere(found[rank]["error"])
    together: Answer = {}
    for case in found[0]:
        errors = [found[rank][case] for rank in (0, 1) if isinstance(found[rank][case], str)]
        together[case] = errors[0] if errors else [found[0][case], found[1][case]]
    return together


def _everywhere(error: str) -> Answer:
    return {"ddp": error} | {("sync", lengths, masked): error for lengths in LENGTHS for masked in (False, True)}


def _fork(rank: int, request: dict[str, Any], folder: Path) -> tuple[int, Connection]:
    here, there = Pipe(duplex=False)
    pid = os.fork()
    if pid:
        there.close()
        return pid, here
    try:
        answer = _rank(rank, request, folder)
    except BaseException as error:  # nothing may return into the server's loop
        answer = {"error": f"process {rank}: {type(error).__name__}: {error}"}
    there.send_bytes(pickle.dumps(answer))
    there.close()
    os._exit(0)


def _rank(rank: int, request: dict[str, Any], folder: Path) -> Answer:
    sys.path[:] = request["path"]
    try:
        try:
            resolve(request["spec"])
        except NormzooError:
            if not request["file"]:
                raise
            load_file(request["file"])  # the file registers the name
        subject = Subject(request["spec"])
    except Exception as error:  # somebody's file may raise anything when it is imported
        return {"unavailable": f"another process cannot import it: {type(error).__name__}: {error}"}
    store = dist.FileStore(str(folder / "store"), 2)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE / 3))
    answer: Answer = {"ddp": _tried(_parallel, subject, rank)}
    broken = ""
    if request["sync"]:
        for lengths in LENGTHS:
            first = sum(lengths[:rank])
            part = slice(first, first + lengths[rank])
            for masked in (False, True):
                case = "sync", lengths, masked
                answer[case] = broken or _tried(train, subject, part, masked, sync=True)
                broken = answer[case] if isinstance(answer[case], str) else ""  # the other rank may be elsewhere now
    dist.destroy_process_group()
    return answer


def _tried(function: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except CheckFailed as failure:
        return str(failure)
    except Exception as error:  # the norm is somebody else's code: it may raise anything
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "torch" not in Path(f.filename).parts]
        return f"raised {type(error).__name__}: {error} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"


def train(subject: Subject, part: slice, masked: bool, sync: bool = False) -> dict[str, Tensor]:
    """Two training steps on a part of the batch; every number that must agree."""
    norm = subject.make({"sync": True} if sync else {}, channel_dim=-1)
    found: dict[str, Tensor] = {}
    for seed in range(2):
        x = subject.data((8, 5), seed=seed, channel_dim=-1)
        mask = torch.rand(8, 5, generator=torch.Generator().manual_seed(seed)) > 0.3
        dy = outside(x)[part]
        x = x[part].clone().requires_grad_()
        y = call(norm, x, mask[part] if masked else None)
        inputs = {"the input": x, **dict(norm.named_parameters())}
        grads = torch.autograd.grad(y.sin(), list(inputs.values()), dy, allow_unused=True)
        found[f"the output of step {seed}"] = y.detach()
        named = zip(inputs, grads, strict=True)
        found |= {f"the gradient of {name} in step {seed}": g for name, g in named if g is not None}
    return found | {f"buffer {name}": b.detach().clone() for name, b in norm.named_buffers()}


class _Scaled(nn.Module):
    """A norm with something to learn beside it: DDP refuses a model without parameters."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.norm(x)


def _parallel(subject: Subject, rank: int) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(_Scaled(subject.make()))
    for step in range(2):
        outputs = [model(subject.data(seed=10 * step + 2 * i + rank)) for i in range(2)]
        model.zero_grad()
        sum((y * outside(y)).sum() for y in outputs).backward()  # pyright: ignore[reportAttributeAccessIssue]
        with torch.no_grad():
            for name, parameter in model.module.named_parameters():
                if parameter.grad is None:
                    raise CheckFailed(f"{name} takes no part in the output: DDP needs find_unused_parameters=True")
                parameter.sub_(0.01 * parameter.grad)
    model.eval()
    model(subject.data())  # takes over the buffers of the first process
    return {name: p.detach() for name, p in model.named_parameters()} | {n: b.clone() for n, b in model.named_buffers()}
