"""How the compiled CPU kernels come to be, and what happens where they cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from normzoo.errors import NormzooError
from normzoo.ops import kernels

Run = Callable[..., subprocess.Popen[str]]

WORKS = """
import sys
import torch
import normzoo as nz
from normzoo import ops
from normzoo.ops import kernels

x = torch.randn(4, 12, 6, 5, generator=torch.Generator().manual_seed(0))
for name in ("batch_norm", "layer_norm", "batch_renorm"):
    results = []
    for backend in ("auto", "cpu", "reference"):
        with ops.backend(backend):
            z = x.clone().requires_grad_()
            y = nz.create(name, 12)(z)
            y.square().sum().backward()
            results.append((y.detach(), z.grad))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-4)
print(kernels.load(), kernels.status().state, kernels.status().reason, sep="|")
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a program in a process of its own, whose kernels are kept in an empty folder."""

    def start(program: str, **environment: str) -> subprocess.Popen[str]:
        names = ("NORMZOO_KERNELS", "CXX")
        kept = {name: value for name, value in os.environ.items() if name not in names}
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program],
            env=kept | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Standard output and error of a process that ends well."""
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out, errors


def goes_on_without(process: subprocess.Popen[str], hint: str) -> None:
    """The process had no kernels, worked, and said so in one line with this hint."""
    out, errors = finish(process)
    assert out.startswith("False|")
    (line,) = errors.strip().splitlines()
    assert "goes on without" in line
    assert hint in line


@pytest.fixture
def broken_compiler(tmp_path: Path) -> tuple[Path, Path]:
    """A compiler that knows its version and nothing else, and a file with a line for each time it was to compile."""
    calls, program = tmp_path / "calls", tmp_path / "c++"
    calls.touch()
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in -dump*) echo 12.2.0; exit;; --version) echo "c++ (GCC) 12.2.0"; exit;; esac\n'
        f'echo "$@" >> {calls}\n'
        'echo "families.h: this machine is out of ink" >&2\n'
        "exit 1\n"
    )
    program.chmod(0o755)
    return program, calls


def test_without_a_compiler_everything_works(run, tmp_path):
    out, errors = finish(run(WORKS, CXX="no-such-compiler"))
    loaded, state, reason = out.strip().split("|")
    assert (loaded, state) == ("False", "unavailable")
    assert "no C++ compiler" in reason
    assert "CXX" in reason
    assert errors == ""
    assert not list(tmp_path.rglob("*.so"))


def test_switched_off(run, tmp_path):
    out, errors = finish(run(WORKS, NORMZOO_KERNELS="0"))
    assert out.strip() == "False|off|NORMZOO_KERNELS=0 is set"
    assert errors == ""
    assert not (tmp_path / "cache").exists()


def test_a_compiler_that_fails_is_asked_once(run, broken_compiler, tmp_path):
    compiler, calls = broken_compiler
    out, errors = finish(run(WORKS, CXX=str(compiler)))
    loaded, state, reason = out.strip().split("|")
    assert (loaded, state) == ("False", "unavailable")
    (log,) = tmp_path.rglob("build.log")
    assert str(log) in reason
    assert "normzoo kernels build" in reason
    assert "out of ink" in log.read_text()
    first, second = errors.strip().splitlines()
    assert "compiling" in first
    assert "goes on without" in second
    assert str(log) in second
    asked = len(calls.read_text().splitlines())
    assert asked >= 1

    out, errors = finish(run(WORKS, CXX=str(compiler)))
    assert out.startswith("False|unavailable|the last build failed")
    assert errors == ""
    assert len(calls.read_text().splitlines()) == asked, "the compiler was asked again without need"


def test_build_asks_a_failed_compiler_again(broken_compiler, tmp_path, monkeypatch):
    compiler, calls = broken_compiler
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    assert kernels.status().state == "not built"
    log = kernels.library().with_name("build.log")
    for _ in range(2):
        before = len(calls.read_text().splitlines())
        with pytest.raises(NormzooError, match="compiler failed") as caught:
            kernels.build()
        assert str(log) in str(caught.value)
        assert len(calls.read_text().splitlines()) > before
    assert kernels.status().state == "unavailable"
    assert [path.name for path in log.parent.iterdir()] == ["build.log"], "what a build leaves behind is its log"


def test_a_cache_that_cannot_be_made(run, broken_compiler, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "cache")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", cache)
    monkeypatch.setenv("CXX", str(broken_compiler[0]))
    with pytest.raises(NormzooError, match=r"Not a directory.* TORCH_EXTENSIONS_DIR"):
        kernels.build()
    goes_on_without(run(WORKS, TORCH_EXTENSIONS_DIR=cache, CXX=str(broken_compiler[0])), "TORCH_EXTENSIONS_DIR")


def test_a_library_cut_short(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    kernels.library().parent.mkdir(parents=True)
    kernels.library().write_bytes(b"\x7fELF" + bytes(96))
    goes_on_without(run(WORKS), "normzoo kernels build")


def test_an_interrupted_build_is_begun_again(broken_compiler, tmp_path, monkeypatch):
    """Ctrl-C reaches ninja too, also where this process ignores it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(broken_compiler[0]))
    said = SimpleNamespace(returncode=130, stdout="ninja: build stopped: interrupted by user.\n")
    monkeypatch.setattr(kernels.subprocess, "run", lambda *_, **__: said)
    with pytest.raises(NormzooError, match="interrupted"):
        kernels.build()
    assert not list(kernels.library().parent.iterdir())
    assert kernels.status().state == "not built"


def test_threads_that_meet_load_once(monkeypatch):
    loads, declared, answers = [], [], []

    def load():
        loads.append(1)
        time.sleep(0.05)
        return True

    monkeypatch.setattr(kernels, "_loaded", None)
    monkeypatch.setattr(kernels, "_load", load)
    monkeypatch.setattr(kernels, "_declarations", [lambda: declared.append(1)])
    threads = [threading.Thread(target=lambda: answers.append(kernels.load())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (loads, declared, answers) == ([1], [1], [True] * 4)


@pytest.mark.parametrize(
    ("given", "asked"), [("ccache g++", "ccache"), ("'/my tools/g++' -m64", "/my tools/g++"), ("", "c++"), (" ", "c++")]
)
def test_the_name_of_a_compiler_may_have_words(monkeypatch, given, asked):
    monkeypatch.setattr(kernels.shutil, "which", lambda name: f"found {name}")
    monkeypatch.setenv("CXX", given)
    assert kernels._compiler() == f"found {asked}"


def test_a_compiler_of_several_words_is_asked_with_all_of_them(broken_compiler, tmp_path, monkeypatch):
    compiler, calls = broken_compiler
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", f"env {compiler}")
    with pytest.raises(NormzooError, match="compiler failed"):
        kernels.build()
    assert "normzoo" in calls.read_text()
    assert "out of ink" in kernels.library().with_name("build.log").read_text()


def test_build_without_a_compiler_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NormzooError, match=r"g\+\+ or clang\+\+"):
        kernels.build()
    assert not list(tmp_path.iterdir())


def test_status_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    now = kernels.status()
    assert now.state in ("not built", "unavailable")
    assert now.path == kernels.library()
    assert tmp_path in now.path.parents
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tmp_path / "torch_extensions" in kernels.library().parents
    assert not list(tmp_path.iterdir())


def test_another_torch_or_other_sources_are_another_library(tmp_path, monkeypatch):
    before = kernels._key.__wrapped__()
    assert before == kernels._key.__wrapped__()
    for source in kernels.SOURCES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(kernels, "SOURCES", tmp_path)
    assert kernels._key.__wrapped__() == before
    header = tmp_path / "simd.h"
    header.write_text(header.read_text() + "\n")
    assert kernels._key.__wrapped__() != before
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert kernels._key.__wrapped__() != before


COMPILED_AT_ONCE = """
import torch
import normzoo as nz

for name in ("batch_norm", "group_norm"):
    norm, x = nz.create(name, 16), torch.randn(4, 16, 6)
    y = torch.compile(norm, fullgraph=True, backend="aot_eager")(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, norm(x))
    print(name)
"""


def test_the_first_call_of_all_may_be_compiled():
    done = subprocess.run(
        [sys.executable, "-c", COMPILED_AT_ONCE], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["batch_norm", "group_norm"]


compiles = pytest.mark.skipif(kernels._compiler() is None, reason="no C++ compiler")


@compiles
@pytest.mark.timeout(900)  # on a busy machine
def test_an_empty_cache_is_filled_on_first_use(run, tmp_path):
    hasty = tmp_path / "c++"  # without optimisation it takes a quarter of the time
    hasty.write_text(f'#!/bin/sh\nexec {kernels._compiler()} "$@" -O0\n')
    hasty.chmod(0o755)
    out, errors = finish(run(WORKS, CXX=str(hasty)))
    assert out.startswith("True|ready|")
    assert len(errors.strip().splitlines()) == 1
    assert "compiling its CPU kernels" in errors
    (library,) = tmp_path.rglob("*.so")
    assert [path.name for path in library.parent.iterdir()] == [library.name]

    out, errors = finish(run(WORKS, CXX="no-such-compiler"))
    assert out.startswith("True|ready|"), "a library that is there needs no compiler"
    assert errors == ""


@compiles
@pytest.mark.timeout(900)  # on a busy machine
@pytest.mark.skipif("NORMZOO_ALL_CHECKS" not in os.environ, reason="compiles twice; NORMZOO_ALL_CHECKS runs it")
def test_two_processes_that_build_at_once(run, tmp_path):
    processes = [run(WORKS) for _ in range(2)]
    for process in processes:
        out, _ = finish(process)
        assert out.startswith("True|ready|")
    (library,) = tmp_path.rglob("*.so")
    assert [path.name for path in library.parent.iterdir()] == [library.name]
