"""Statistics over two real processes equal those of one process on the whole batch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normzoo as nz
from normzoo.surgery import synchronize

WORKER = Path(__file__).with_name("sync_worker.py")
_spec = importlib.util.spec_from_file_location("sync_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), "2", str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", worker.LENGTHS)
@pytest.mark.parametrize("spec", worker.CASES)
def test_two_processes_equal_one(ranks, spec, lengths, masked):
    one = worker.step(spec, {}, slice(0, 8), masked)
    two = [rank[lengths, spec, masked] for rank in ranks]
    for key, expected in one.items():
        if key.startswith("buffer"):
            got = [two[0][key], two[1][key]]
        elif key.startswith(("dw", "db")):
            got = [two[0][key] + two[1][key]]
        else:
            got = [torch.cat([two[0][key], two[1][key]])]
        for value in got:
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


def test_without_processes_it_is_batch_norm():
    x = torch.randn(4, 6, 5)
    torch.testing.assert_close(nz.create("sync_batch_norm", 6)(x), nz.create("batch_norm", 6)(x))


def test_synchronize_sets_what_can_be_set():
    names = ["batch_norm", "batch_renorm", "sync_batch_norm", "ghost_batch_norm", "layer_norm", "none"]
    model = nn.Sequential(*(nz.create(name, 4) for name in names), nn.BatchNorm1d(4))
    assert synchronize(model) == 3
    assert [getattr(norm, "sync", None) for norm in model[:6]] == [True, True, True, False, False, None]
    assert synchronize(model, on=False) == 3
    assert not any(norm.sync for norm in model[:5])


def test_torch_conversion_does_not_take_our_norms_away():
    model = nn.Sequential(nz.create("batch_renorm", 4), nz.create("batch_norm", 4))
    kinds = [type(norm) for norm in model]
    assert [type(norm) for norm in nn.SyncBatchNorm.convert_sync_batchnorm(model)] == kinds


def test_local_statistics_have_no_sync_option():
    for name in ("ghost_batch_norm", "layer_norm", "group_norm"):
        with pytest.raises(TypeError, match="no option 'sync'"):
            nz.create(name, 8, sync=True)
