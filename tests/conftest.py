"""What all tests share.

One thread for each test process: several of them share the cores, and results agree only at equal counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

collect_ignore = ["triton_hopper.py"]  # a program of test_triton.py, which needs Triton


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend", default="auto", help="compute every norm by this one of normzoo.ops.CHOICES; default: auto"
    )


@pytest.fixture(autouse=True)
def chosen_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    name = str(request.config.getoption("--backend"))
    if name == "auto":
        yield
        return
    from normzoo import ops  # not for all: some tests look at what is imported

    with ops.backend(name):
        yield
