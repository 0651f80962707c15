"""Every norm of the registry against the conformance kit.

The checks that compile, export and start processes are sampled here, each norm taking some; with the environment
variable NORMZOO_ALL_CHECKS every norm takes all.
"""

from __future__ import annotations

import os
import zlib

import normzoo as nz
from normzoo.checks import Check, parametrize_with_checks

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


def selected(norm: str, check: Check) -> bool:
    return ALL or not check.slow or zlib.crc32(f"{norm} {check.name}".encode()) % SHARE == 0


@parametrize_with_checks(NORMS, expected_failures=EXPECTED_FAILURES, select=selected)
def test_norm(norm, check):
    check(norm)
