"""Run every check on every norm, a process for each core, and keep what came of it: `make check-all`."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from normzoo.checks import check_norm
from normzoo.registry import list_norms

RESULTS = Path(__file__).parent / "checks.json"


def run(name: str) -> tuple[str, dict, float]:
    """One norm: the checks it passed by name, all others with their detail."""
    torch.set_num_threads(1)
    began = time.monotonic()
    found: dict = {"passed": [], "failed": {}, "expected_failure": {}, "not_applicable": {}}
    for result in check_norm(name):
        if result.status == "passed":
            found["passed"].append(result.name)
        else:
            found[result.status][result.name] = result.detail
    return name, found, time.monotonic() - began


def main() -> int:
    """Check all, print a line for each norm, write the results; 1 when a check failed."""
    norms: dict[str, dict] = {}
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for name, found, seconds in pool.map(run, list_norms()):
            norms[name] = found
            counts = ", ".join(f"{len(found[s])} {s.replace('_', ' ')}" for s in found if found[s])
            print(f"{name:32s} {seconds:5.1f} s  {counts}", flush=True)
            for check, detail in found["failed"].items():
                print(f"    FAILED {check}: {detail}", flush=True)
    results = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__.partition("+")[0], "norms": norms}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    failed = sum(len(found["failed"]) for found in norms.values())
    print(f"{len(norms)} norms in {time.monotonic() - began:.0f} s, {failed} checks failed; results in {RESULTS}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
