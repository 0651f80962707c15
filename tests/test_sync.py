"""Statistics over real processes equal those of one process on the whole batch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normzoo as nz
from normzoo.ops import backend
from normzoo.ops.kernels import load
from normzoo.surgery import synchronize

WORKER = Path(__file__).with_name("sync_worker.py")
_spec = importlib.util.spec_from_file_location("sync_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found, for each number of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, WORKER, folder], check=False, stderr=subprocess.PIPE, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return {world: [torch.load(folder / f"{rank} of {world}.pt") for rank in range(world)] for world in worker.LENGTHS}


@pytest.mark.parametrize(
    ("world", "lengths"), [(world, name) for world in worker.LENGTHS for name in worker.LENGTHS[world]]
)
@pytest.mark.parametrize("spec", worker.CASES)
def test_processes_equal_one(found, spec, world, lengths):
    exact = {torch.float64: (1e-10,), torch.float32: (1e-5,), torch.bfloat16: (1e-5, 4e-3)}
    for dtype in worker.DTYPES:
        for masked in worker.MASKS:
            one = worker.step(spec, {}, slice(0, 8), masked, rounded=dtype)
            ranks = [rank[lengths, spec, dtype, masked] for rank in found[world]]
            assert ranks[0]["y0"].dtype == dtype
            worker.agree(ranks, one, f"{dtype}, mask {masked}", *exact[dtype])


@pytest.mark.parametrize("layout", worker.LAYOUTS)
@pytest.mark.parametrize("text", worker.OPERATIONS)
def test_every_pattern_and_layout(found, text, layout):
    for i, turn in enumerate(worker.TURNS):
        with backend("reference"):
            one = worker.operation(text, layout, turn, slice(0, 8), torch.float64, False)
        worker.agree([rank[text, layout, i] for rank in found[2]], one, str(turn))


def test_some_of_the_processes(found):
    ranks = [rank["group"] for rank in found[3]]
    x = worker.step("batch_norm", {}, slice(0, 8))
    worker.agree([ranks[0], ranks[2]], x, "two of three")
    worker.agree([ranks[1]], x, "the third")


@pytest.mark.parametrize("lengths", ["even", "empty"])
def test_kernels_and_formula_meet_alike(found, lengths):
    """The same collectives with the same numbers; none backward where the input is a constant."""
    kernels = ["moments", "rescale", "gradient_sums", "gradient"]
    for rank in found[2]:
        for needed in (True, False):
            by_kernels, operators = rank["calls", "auto", lengths, needed]
            by_formula, none = rank["calls", "reference", lengths, needed]
            assert by_kernels == by_formula
            assert (
                by_kernels == [("allgather_", 18, "torch.float32"), ("allreduce_", 12, "torch.float32")][: 1 + needed]
            )
            assert none == []
            if load():
                assert operators == kernels[: 3 + needed]


def test_one_rank_by_kernels_and_one_by_the_formula(found):
    one = worker.step("batch_norm", {}, slice(0, 8))
    worker.agree([rank["one by the formula"] for rank in found[2]], one, "mixed")


def test_a_gradient_of_the_parameters_alone(found):
    x, _, dy = worker.whole()
    expected = (nn.functional.batch_norm(x, None, None, training=True) * dy).sum((0, 2))
    got = [rank["weights alone"][0] for rank in found[2]]
    torch.testing.assert_close(got[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert not got[1].any()


def test_a_second_derivative_is_refused(found):
    assert all("once_differentiable" in rank["twice"] for rank in found[2])


def test_autocast_leaves_statistics_alone(found):
    one = worker.step("batch_norm", {}, slice(0, 8))
    worker.agree([rank["autocast"] for rank in found[2]], one, "autocast")


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
