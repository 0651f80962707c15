"""Every norm of the registry against the conformance kit.

The checks that compile, export and start processes are sampled here, each norm taking some; with the environment
variable NORMZOO_ALL_CHECKS every norm takes all. With ``--backend native`` and the like all of it is run on another
backend; for the norms that others are made of, the checks that compute are run on two others in any case.
"""

from __future__ import annotations

import os
import zlib

import pytest

import normzoo as nz
from normzoo import ops
from normzoo.checks import Check, parametrize_with_checks
from normzoo.registry import Spec

ALL = "NORMZOO_ALL_CHECKS" in os.environ
SHARE = 5  # of the slow checks, one in so many

NORMS = [
    *nz.list_norms(),
    "batch_norm(momentum=None)",
    "batch_norm(track_running_stats=False)",
    "batch_norm(affine=False)",
    "ghost_batch_norm(ghost_batch_size=3)",
    "layer_norm(bias=False)",
]

EXPECTED_FAILURES: dict[str, dict[str, str]] = {}


def selected(norm: Spec, check: Check) -> bool:
    return ALL or not check.slow or zlib.crc32(f"{norm} {check.name}".encode()) % SHARE == 0


@parametrize_with_checks(NORMS, expected_failures=EXPECTED_FAILURES, select=selected)
def test_norm(norm, check):
    check(norm)


CORE = [
    "batch_norm",
    "layer_norm",
    "layer_norm_joint",
    "instance_norm",
    "group_norm",
    "rms_norm",
    "positional_norm",
    "batch_renorm",
    "ghost_batch_norm(ghost_batch_size=3)",
    "batch_group_norm",
]


def computes(norm: Spec, check: Check) -> bool:
    return not check.slow and check.group != "contract"


@pytest.mark.parametrize("backend", ["native", "reference"])
@parametrize_with_checks(CORE, select=computes)
def test_core_norm_on_another_backend(norm, check, backend):
    with ops.backend(backend):
        check(norm)
