"""The compiled CPU kernels: built once with the machine's own compiler, then loaded from the cache.

They are built on first use, which takes about a minute and says so. Where there is no compiler everything works
without them, on torch's kernels and on the formulas.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any, Literal

import torch

from normzoo.errors import NormzooError
from normzoo.ops import memory

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_NAME = "normzoo_cpu"
_loaded: bool | None = None  # None until somebody asked
_loading = threading.Lock()
_direct: Callable[..., Any] | None = None
_declarations: list[Callable[[], None]] = []

# bound here: a small call asks both
_compiling = torch.compiler.is_compiling
_overridden = torch._C._has_torch_function_variadic


@dataclass(frozen=True)
class Status:
    """How the compiled kernels stand.

    Attributes:
        state: ``"ready"`` (built for this machine), ``"not built"`` (they will be on first use), ``"unavailable"``
            (no compiler, or it failed) or ``"off"``.
        reason: why, in words.
        path: where the library is, or would be.
        compiler: the C++ compiler, if there is one.
    """

    state: Literal["ready", "not built", "unavailable", "off"]
    reason: str
    path: Path
    compiler: str | None


def status() -> Status:
    """How the kernels stand on this machine; builds nothing."""
    path, compiler = library(), _compiler()
    if os.environ.get("NORMZOO_KERNELS") == "0":
        return Status("off", "NORMZOO_KERNELS=0 is set", path, compiler)
    if path.exists():
        return Status("ready", "built for this processor, compiler flags and torch", path, compiler)
    if compiler is None:
        return Status("unavailable", "no C++ compiler was found: install g++ or clang++, or set CXX", path, None)
    if (failed := _failure(path)).exists():
        return Status(
            "unavailable", f"the last build failed, see {failed}; try again with: normzoo kernels build", path, compiler
        )
    return Status("not built", "they are built on first use, or by: normzoo kernels build", path, compiler)


def load() -> bool:
    """Have the kernels at hand, building them if need be; ``False`` where that cannot be, see :func:`status`."""
    global _loaded
    if _loaded is None:
        with _loading:  # threads that meet here build, load and declare once
            if _loaded is None:
                loaded = _load()
                if loaded:
                    for declaration in _declarations:
                        declaration()
                _loaded = loaded
    return _loaded


def _load() -> bool:
    now = status()
    if now.state == "not built":
        try:
            build()
        except NormzooError as error:
            print(f"normzoo: goes on without its CPU kernels; {error}", file=sys.stderr)
            return False
    elif now.state != "ready":
        return False
    memory.start()
    try:
        torch.ops.load_library(str(now.path))
    except OSError as error:  # cut short by a full disk, or on one that may not execute
        print(f"normzoo: goes on without its CPU kernels; {error}; to mend: normzoo kernels build", file=sys.stderr)
        return False
    global _direct
    with suppress(ImportError):  # built where Python's headers are missing
        loader = ExtensionFileLoader(_NAME, str(now.path))
        spec = spec_from_loader(_NAME, loader)
        assert spec is not None
        _direct = module_from_spec(spec).standardize
    return True


# What torch.compiler.assume_constant_result does, without importing the compiler for it.
load._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def standardize(*arguments: Any, alone: bool) -> Any:
    """The operator ``normzoo::standardize``, as directly as it can be called; its result alone if so wanted.

    ``torch.ops`` reads arguments by the schema, which takes longer than a small norm does.
    """
    if _direct is None or _compiling() or _overridden(*arguments[:3]):
        results = torch.ops.normzoo.standardize.default(*arguments)
        return results[0] if alone else results
    return _direct(*arguments, alone)


def declare(declaration: Callable[[], None]) -> None:
    """Call this once the kernels are loaded: it tells torch what else it has to know of the operators."""
    _declarations.append(declaration)
    if _loaded:
        declaration()


def build() -> Path:
    """Compile the kernels for this machine and keep them in the cache; says so on standard error, as it takes long.

    Processes that build at the same time do not wait for each other: the last one to finish replaces its equal.

    Raises:
        NormzooError: without a compiler, with its output when it fails, or when the cache cannot be written.
    """
    path = library()
    if _compiler() is None:
        raise NormzooError("no C++ compiler was found; expected g++ or clang++ on the PATH, or its name in CXX")
    try:
        _build(path)
    except OSError as error:
        raise NormzooError(
            f"cannot keep the CPU kernels in {path.parent}: {error}; name another folder in TORCH_EXTENSIONS_DIR"
        ) from error
    return path


def _build(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        print(
            "normzoo: compiling its CPU kernels, once, about a minute (NORMZOO_KERNELS=0 does without)",
            file=sys.stderr,
        )
        script = (
            "import sys; from torch.utils.cpp_extension import load; "
            f"load({_NAME!r}, sys.argv[2:], extra_cflags={list(FLAGS)!r}, build_directory=sys.argv[1], "
            "is_python_module=False, verbose=True)"
        )
        environment = os.environ | {"PATH": _with_ninja(os.environ.get("PATH", ""))}
        if len(command := _command()) > 1:  # the loader takes CXX for the name of one file
            compiler = Path(folder) / "c++"
            compiler.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
            compiler.chmod(0o755)
            environment["CXX"] = str(compiler)
        # a process of its own: the loader reads the environment and speaks on standard output
        done = subprocess.run(
            [sys.executable, "-c", script, folder, *_sources()],
            check=False,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if "interrupted by user" in done.stdout:  # Ctrl-C where this process ignores it; nothing is wrong here
            raise NormzooError("the build of the CPU kernels was interrupted; their next use begins it again")
        if done.returncode:
            _failure(path).write_text(done.stdout)
            raise NormzooError(f"the C++ compiler failed on the CPU kernels; its output is in {_failure(path)}")
        os.replace(Path(folder) / f"{_NAME}.so", path)
    with suppress(FileNotFoundError):
        _failure(path).unlink()


def library() -> Path:
    """Where the library is kept: a folder for each version of sources, flags, torch and processor."""
    home = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch_extensions"
    )
    return Path(home) / "normzoo" / _key() / f"{_NAME}.so"


@cache
def _key() -> str:
    digest = hashlib.sha256(repr((FLAGS, torch.__version__, _processor())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What ``-march=native`` depends on, so that machines which share a home do not share a library."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"


def _sources() -> list[str]:
    return [str(path) for path in sorted(SOURCES.glob("*.cpp"))]


def _command() -> list[str]:
    """The compiler, which may have several words, as in ``ccache g++``."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _compiler() -> str | None:
    return shutil.which(_command()[0])


def _failure(path: Path) -> Path:
    return path.with_name("build.log")


def _with_ninja(path: str) -> str:
    """The PATH with the folder of this environment's ninja, which need not be activated."""
    import ninja

    return os.pathsep.join([ninja.BIN_DIR, path])
