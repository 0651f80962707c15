"""How speed is measured: who takes part, in which order, what is counted, and what is written down."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import itertools
import json
import platform
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import normzoo as nz
from normzoo import ops
from normzoo.bench import (
    Case,
    Effort,
    Recurrent,
    Row,
    Subject,
    as_csv,
    measure_accuracy,
    measure_case,
    measure_recurrent,
    suite,
    timing,
)
from normzoo.bench.case import parse_shape
from normzoo.bench.contenders import Absent, Contender, line_up, make, packaged, torch_layer
from normzoo.bench.measure import floor_job, saved_bytes, timed_rows
from normzoo.bench.pages import WORKLOADS, measure_pages
from normzoo.bench.plot import roofline
from normzoo.bench.timing import SELDOM, Job, measure, ratio

REPOSITORY = Path(__file__).resolve().parents[1]
ONCE = Effort(rounds=1)


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_bytes_are_two_three_and_five_times_the_tensor():
    case = Case((64, 64, 32, 32), dtype="bfloat16")
    tensor = 64 * 64 * 32 * 32 * 2
    assert [case.bytes(d) for d in ("forward", "backward", "both")] == [2 * tensor, 3 * tensor, 5 * tensor]


def test_layouts():
    image = Case((2, 8, 4, 4), "channels-last").inputs()
    assert image.x.is_contiguous(memory_format=torch.channels_last)
    assert image.dy.is_contiguous(memory_format=torch.channels_last)
    assert not image.x.is_contiguous()
    tokens = Case((2, 5, 8), "tokens")
    assert (tokens.channels, tokens.channel_dim) == (8, -1)
    assert tokens.inputs().x.is_contiguous()
    assert Case((2, 8, 5)).channels == 8


@pytest.mark.parametrize(
    ("case", "positions"),
    [(Case((40, 8, 6, 6)), (40, 6, 6)), (Case((40, 50, 8), "tokens"), (40, 50)), (Case((40, 8)), (40,))],
)
def test_the_mask_leaves_seventy_percent_with_the_padding_at_the_end(case, positions):
    mask = case.inputs().mask
    assert mask.shape == positions
    assert mask.float().mean().item() == pytest.approx(0.7, abs=0.02)
    flat = mask.flatten(1) if mask.ndim > 1 else mask.unsqueeze(0)
    assert (flat[:, :-1] >= flat[:, 1:]).all()
    assert flat.any(1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4,),), "no batch and channels"),
        (((4, 0),), "no batch and channels"),
        (((4, 8), "token"), "did you mean 'tokens'"),
        (((4, 8), "channels-last"), "memory format"),
        (((4, 8), "tokens", "float23"), "did you mean 'float32'"),
        (((4, 8), "tokens", "float32", "cud"), "did you mean 'cuda'"),
    ],
)
def test_what_is_no_case(arguments, message):
    with pytest.raises(nz.NormzooError, match=message):
        Case(*arguments)


@pytest.mark.parametrize("text", ["", "64,", "64 64", "a,b", "4.5,2"])
def test_what_is_no_shape(text):
    with pytest.raises(nz.NormzooError, match="expected sizes"):
        parse_shape(text)


# ---- how time is taken -----------------------------------------------------------------------------------------------


def test_contenders_take_turns_and_the_first_one_changes():
    log: list[str] = []

    def job(name: str) -> Job:
        return Job(lambda: log.append(name) or torch.empty(0), lambda y: log.append(name))

    jobs = [job(name) for name in "abc"]
    measure(jobs, device="cpu", effort=Effort(rounds=4))
    turns = [name for name, _ in itertools.groupby(log)]
    # neighbouring rounds "abc bca cab abc" have no turn twice in a row
    assert "".join(turns).endswith("abcbcacababc")
    assert all(sorted(each.times) == [0, 1, 2, 3] for each in jobs)
    assert all(each.calls > 1 for each in jobs), "short calls are repeated within a burst"
    assert log.count("a") >= 2 * 4 * jobs[0].calls


def test_forward_and_backward_are_told_apart_and_a_slow_one_takes_part_less_often():
    def spin(seconds: float) -> torch.Tensor:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return torch.empty(0)

    quick = [Job(lambda: spin(0.002), lambda _: spin(0.006)) for _ in range(2)]
    slow = Job(lambda: spin(0.1))
    rounds = measure([*quick, slow], device="cpu", effort=Effort(seconds=0.2))
    assert rounds >= 5
    assert len(quick[0].times) == rounds
    assert sorted(slow.times) == list(range(0, rounds, SELDOM))
    ahead, back = quick[0].times[1]
    assert ahead >= 0.0015
    assert back >= 0.0055
    assert slow.seconds("backward")[0] == 0


def test_on_a_gpu_the_cache_is_flushed_before_each_pass_and_not_timed(monkeypatch):
    """With a clock that counts what is launched: one thing forward, two backward, and a flush of ten."""
    launched = [0]

    def launch(number: int) -> torch.Tensor:
        launched[0] += number
        return torch.empty(0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = launched[0]

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_flusher", lambda: types.SimpleNamespace(zero_=lambda: launch(10)))
    job = Job(lambda: launch(1), lambda y: launch(2))
    measure([job], device="cuda", effort=Effort(rounds=2))
    assert job.times == {0: (1, 2), 1: (1, 2)}
    assert launched[0] % 23 == 0
    measure([job := Job(lambda: launch(1))], device="cuda", effort=Effort(rounds=1))
    assert job.times == {0: (1, 0)}


def test_ratios_pair_the_rounds():
    """A machine that is ten times slower for a while slows both."""
    ours, base = {0: 2.0, 1: 20.0, 2: 2.0, 3: 30.0}, {0: 1.0, 1: 10.0, 2: 1.0}
    assert ratio(ours, base) == 2.0


def test_rows_are_multiples_of_the_base_and_of_the_best_other():
    def job(forward: float, backward: float) -> Job:
        return Job(torch.Tensor, calls=3, times={0: (forward, backward), 1: (2 * forward, 2 * backward)})

    jobs = {
        ("", "floor"): job(1, 1),
        ("a", "normzoo"): job(2, 4),
        ("a", "normzoo native"): job(1, 1),
        ("a", "torch.nn"): job(4, 4),
        ("a", "formula"): job(40, 40),
        ("b", "normzoo"): job(8, 0),
    }
    rows = {(r.norm, r.contender, r.direction): r for r in timed_rows(Case((2, 3)), jobs, ("", "floor"), "both")}
    ours = rows["a", "normzoo", "both"]
    assert (ours.seconds, ours.floors, ours.to_best) == (9, 3, 0.75)  # the best other is not our own other way
    assert rows["a", "normzoo", "backward"].floors == 4
    assert rows["a", "torch.nn", "both"].to_best == 4
    assert rows["b", "normzoo", "forward"].to_best is None
    assert (ours.rounds, ours.calls) == (2, 3)


def test_threads_and_the_collector_are_as_before():
    import gc

    before = torch.get_num_threads()
    seen = []
    measure([Job(lambda: seen.append((torch.get_num_threads(), gc.isenabled())) or torch.empty(0))],
            device="cpu", effort=Effort(threads=before + 1, rounds=1))  # fmt: skip
    assert set(seen) == {(before + 1, False)}
    assert torch.get_num_threads() == before
    assert gc.isenabled()


# ---- who takes part --------------------------------------------------------------------------------------------------

PEERS = ["batch_norm", "group_norm(groups=2)", "instance_norm", "layer_norm", "layer_norm_joint", "rms_norm"]
CASES = [
    Case((3, 8, 4, 5)),
    Case((3, 8, 4, 5), "channels-last"),
    Case((3, 6, 8), "tokens"),
    Case((6, 8), "tokens"),
    Case((3, 8, 6)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("norm", PEERS)
def test_torchs_layer_computes_the_same_with_the_same_parameters(norm, case):
    ours = make(norm, case)
    theirs = torch_layer(ours, case)
    if norm == "instance_norm" and len(case.shape) == 2:
        assert theirs is None
        return
    x, dy, _ = case.inputs()
    with ops.backend("reference"):
        y = ours(x)
    expected = torch.autograd.grad(y, [x, *ours.parameters()], dy)
    z = theirs(x)
    found = torch.autograd.grad(z, [x, *theirs.parameters()], dy)
    assert not torch.equal(ours.weight, torch.ones_like(ours.weight))
    torch.testing.assert_close(z, y, atol=2e-5, rtol=1e-4)
    for ours_gradient, their_gradient in zip(expected, found, strict=True):
        torch.testing.assert_close(their_gradient, ours_gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", ["affine=False", "bias=False", "eps=0.1"])
def test_torchs_layer_has_the_same_options(options):
    case = Case((3, 8, 4, 5))
    ours = make(f"group_norm(groups=2, {options})", case)
    theirs = torch_layer(ours, case)
    assert len(list(theirs.parameters())) == len(list(ours.parameters()))
    torch.testing.assert_close(theirs(case.inputs().x), ours(case.inputs().x), atol=1e-5, rtol=1e-5)


def test_what_is_derived_from_a_norm_is_not_compared_with_torchs():
    case = Case((4, 8, 3, 3))
    assert torch_layer(make("batch_renorm", case), case) is None


def test_a_mask_goes_to_ours_alone():
    case = Case((4, 8, 6))
    found = line_up("batch_norm", case, ("formula", "torch.nn"), True)
    assert [c.name for c in found] == ["normzoo", "formula"]
    assert {c.norm for c in found} == {"batch_norm masked"}
    y = found[0].call(case.inputs())
    assert (y.movedim(1, -1)[~case.inputs().mask] == 0).all()


class TheirNorm(nn.Module):
    """Stands in for the layers of other packages: it notes how it was made."""

    def __init__(self, *arguments, **options):
        super().__init__()
        self.made = arguments, options
        self.weight = nn.Parameter(torch.ones(8))
        if options.get("bias"):
            self.bias = nn.Parameter(torch.zeros(8))


@pytest.mark.parametrize(
    ("norm", "layout", "made"),
    [
        ("layer_norm", "tokens", ((8,), {"eps": 1e-5, "bias": True})),
        ("rms_norm", "tokens", ((8,), {"eps": 1e-6, "in_place": False})),
        ("group_norm(groups=2)", "channels-first", ((8, 2), {"eps": 1e-5, "bias": True})),
        ("layer_norm", "channels-first", None),
        ("group_norm(groups=2)", "tokens", None),
        ("batch_norm", "tokens", None),
    ],
)
def test_other_packages_take_part_where_they_have_the_case(monkeypatch, norm, layout, made):
    case = Case((2, 8, 8), layout)
    ours = make(norm, case)
    object.__setattr__(case, "device", "cuda")
    found = packaged("liger", ours, case)
    assert (found.reason if isinstance(found, Absent) else found) == (made and "not installed")

    package = types.SimpleNamespace(LigerLayerNorm=TheirNorm, LigerRMSNorm=TheirNorm, LigerGroupNorm=TheirNorm)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", lambda name: package)
    monkeypatch.setattr(TheirNorm, "to", lambda self, device: self)
    found = packaged("liger", ours, case)
    assert (found and found.made) == made
    if made:
        assert torch.equal(found.weight, ours.weight)
        assert found.weight is not ours.weight


def test_every_contender_runs_in_its_backend():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(ops._backend)
            return x * 1

    contender = line_up("layer_norm", Case((4, 8)), ("formula",), False)[1]
    contender.module = Spy()
    measure([contender.job(Case((4, 8)).inputs())], device="cpu", effort=ONCE)
    assert set(seen) == {"reference"}


def test_an_alternative_that_is_none():
    with pytest.raises(nz.NormzooError, match=r"did you mean 'torch\.nn'"):
        line_up("layer_norm", Case((4, 8)), ("torch.n",), False)


def test_a_norm_that_cannot_serve_is_a_row_with_the_reason():
    rows = measure_case(Case((6, 8)), [Subject("instance_norm"), Subject("group_norm(groups=3)")], effort=ONCE)
    reasons = {row.norm: row.reason for row in rows if row.contender == "normzoo"}
    assert "one value per statistic" in reasons["instance_norm"]
    assert "does not divide" in reasons["group_norm(groups=3)"]
    assert all(row.seconds is None for row in rows if row.reason)
    assert next(row for row in rows if row.contender == "floor").seconds > 0


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_a_case_is_measured_in_every_direction():
    case = Case((16, 8, 4, 4), "channels-last")
    rows = measure_case(case, [Subject("batch_norm"), Subject("batch_norm", masked=True)], effort=ONCE)
    found = {(row.norm, row.contender, row.direction): row for row in rows}
    contenders = {
        ("", "floor"),
        ("batch_norm", "normzoo"),
        ("batch_norm", "formula"),
        ("batch_norm", "torch.nn"),
        ("batch_norm masked", "normzoo"),
        ("batch_norm masked", "formula"),
    }
    assert set(found) == {(*c, d) for c in contenders for d in ("forward", "backward", "both")}
    for row in rows:
        assert row.gb_per_s * row.seconds * 1e9 == pytest.approx(case.bytes(row.direction))
        assert row.low <= row.seconds <= row.high
    assert all(row.floors == 1 for row in rows if row.contender == "floor")
    assert found["batch_norm", "formula", "both"].floors > 1


def test_norms_of_the_same_name_are_told_apart(tmp_path):
    specs = []
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(NARROW)
        specs.append(f"{tmp_path / name}:Narrow")
    rows = measure_case(Case((4, 8), "tokens"), [*map(Subject, specs), Subject(specs[0])], (), "forward", ONCE)
    assert [row.norm for row in rows] == ["", *specs]


def test_rows_say_what_served():
    rows = measure_case(Case((16, 8)), [Subject("layer_norm"), Subject("rms_norm")], ("native", "formula"), effort=ONCE)
    ways = {(row.norm, row.contender): row.way for row in rows if row.seconds}
    assert ways["layer_norm", "normzoo"] in ("cpu", "native")
    assert ways["layer_norm", "normzoo native"] == "native"
    assert ways["", "floor"] == ways["layer_norm", "formula"] == ""
    refused = {(row.norm, row.contender): row.reason for row in rows if row.reason}
    assert list(refused) == [("rms_norm", "normzoo native")]
    assert "does not serve" in refused["rms_norm", "normzoo native"]


def test_one_direction_alone():
    rows = measure_case(Case((16, 8)), [Subject("rms_norm")], (), "forward", ONCE)
    assert {row.direction for row in rows} == {"forward"}
    assert floor_job(Case((16, 8)).inputs(), backward=False).backward is None


def test_the_floor_copies_and_adds():
    inputs = Case((16, 8)).inputs()
    job = floor_job(inputs)
    y = job.forward()
    assert torch.equal(y, inputs.x)
    assert y.data_ptr() == job.forward().data_ptr()
    assert torch.equal(job.backward(y), inputs.x + inputs.dy)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(256))

    def forward(self, x):
        return (x * self.weight).exp() + x.exp().detach()  # x and one exponential; nobody needs the other


@pytest.mark.parametrize(
    ("module", "statistics"),
    [
        (Gain(), 64 * 256 * 4),
        (nn.LayerNorm(256), 2 * 64 * 4),  # an operator written in C++: the input, a mean and a scale for each row
        (nn.Identity(), -64 * 256 * 4),
    ],
)
def test_saved_bytes(module, statistics):
    inputs = Case((64, 256)).inputs()
    assert saved_bytes(Contender("", "", module), inputs) == 64 * 256 * 4 + statistics


def test_ours_saves_no_more_than_the_formula():
    rows = measure_case(Case((16, 64), "tokens"), [Subject("layer_norm")], effort=ONCE)
    saved = {row.contender: row.saved_bytes for row in rows}
    assert saved["normzoo"] < saved["formula"]
    assert saved["floor"] is None


NARROW = '''
import torch
from torch import nn

class Narrow(nn.Module):
    """One percent too much, except in float64."""

    channel_dim = -1

    def __init__(self, num_features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x):
        return (x if x.dtype == torch.float64 else x * 1.01) * self.weight + self.bias
'''


def test_accuracy_finds_what_is_wrong_and_where(tmp_path):
    (tmp_path / "narrow.py").write_text(NARROW)
    case = Case((512, 8), "tokens")
    wrong, right = measure_accuracy(case, [Subject(f"{tmp_path}/narrow.py:Narrow"), Subject("layer_norm")], ())
    assert wrong.norm == "Narrow"
    for error in (wrong.input, wrong.weight):
        assert error == pytest.approx(0.01, rel=1e-3)
    assert wrong.bias < 1e-6
    assert 0.005 < wrong.output < 0.011
    for error in (right.output, right.input, right.weight, right.bias):
        assert error < 1e-5


def test_accuracy_in_half_precision_is_of_the_same_numbers():
    """The oracle gets the rounded input and parameters: what is left is the rounding of the results."""
    found = measure_accuracy(Case((256, 64), "tokens", "bfloat16"), [Subject("layer_norm")], ("formula",))
    for errors in found:
        assert 1e-4 < errors.output < 3e-3
        assert errors.weight < 3e-3


# ---- recurrent layers ------------------------------------------------------------------------------------------------


def test_recurrent_layers_are_multiples_of_torchs():
    rows = measure_recurrent(Recurrent("gru", 3, 4, 8), ["layer_norm", "instance_norm"], effort=ONCE)
    found = {(row.norm, row.contender, row.direction): row for row in rows}
    assert found["none", "torch.nn.GRU", "both"].floors == 1
    for direction in ("forward", "backward", "both"):
        assert found["layer_norm", "normzoo", direction].floors > 0
        assert found["layer_norm", "formula", direction].seconds > 0
    refused = found["instance_norm", "normzoo", "both"]
    assert refused.seconds is None
    assert refused.reason
    with pytest.raises(nz.NormzooError, match="did you mean 'lstm'"):
        Recurrent("lstn")


# ---- what is written -------------------------------------------------------------------------------------------------


def test_csv_reads_back():
    rows = measure_case(Case((6, 8)), [Subject("layer_norm"), Subject("instance_norm")], (), effort=ONCE)
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [row["norm"] for row in read] == [row.norm for row in rows]
    assert float(read[0]["seconds"]) == rows[0].seconds
    assert read[-1]["seconds"] == ""
    assert read[-1]["reason"] == rows[-1].reason


def test_roofline(tmp_path):
    rows = [
        row
        for size in (8, 16)
        for row in measure_case(Case((size, 8)), [Subject("layer_norm")], ("torch.nn",), effort=ONCE)
    ]
    roofline(rows, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(nz.NormzooError, match="cannot write"):
        roofline(rows, tmp_path / "roof.docx")
    with pytest.raises(nz.NormzooError, match="nothing to plot"):
        roofline([Row("a", "b", "1x1", "tokens", "float32", "cpu", "both", reason="no")], tmp_path / "none.png")


# ---- the suite -------------------------------------------------------------------------------------------------------


def test_targets():
    assert suite.Target("", 1.6, 1.6).met
    assert not suite.Target("", 1.61, 1.6).met
    assert suite.Target("", 5.0, 5.0, least=True).met
    assert not suite.Target("", 4.9, 5.0, least=True).met
    assert not suite.Target("", None, 5.0).met
    assert not suite.Target("", float("nan"), 5.0).met


def test_an_interrupted_suite_keeps_what_it_has(tmp_path):
    def stop(effort):
        raise KeyboardInterrupt

    row = measure_case(Case((6, 8)), [Subject("layer_norm")], (), effort=ONCE)
    judge = lambda found: [suite.Target("one", 2.0, 1.0)]  # noqa: E731
    done = suite.Section("first", lambda effort: suite.Found(row), judge)
    out = tmp_path / "speed.json"
    run = suite.run_suite(out, [done, suite.Section("second", stop, judge)], ONCE)
    next(run)
    with pytest.raises(KeyboardInterrupt):
        next(run)
    kept = json.loads(out.read_text())
    assert list(kept["sections"]) == ["first"]
    assert not kept["complete"]
    assert kept["machine"]["torch"] == torch.__version__
    assert kept["sections"]["first"]["targets"][0]["met"] is False
    assert kept["sections"]["first"]["rows"][0]["seconds"] == row[0].seconds
    text = (tmp_path / "speed.inc").read_text()
    assert "Interrupted" in text
    assert "0 of 1 targets" in text
    assert len(list(csv.DictReader(io.StringIO((tmp_path / "speed.csv").read_text())))) == len(row)

    list(suite.run_suite(out, [done], ONCE))
    assert json.loads(out.read_text())["complete"]
    assert "Interrupted" not in (tmp_path / "speed.inc").read_text()
    assert not list(tmp_path.glob(".*")), "nothing half written is left"


def test_the_suite_covers_every_layout_and_dtype():
    names = [part.name for part in suite.sections()]
    assert len(set(names)) == len(names)
    for shape in ("64x64x32x32 channels-first", "64x64x32x32 channels-last", "32x512x512 tokens", "16384x512 tokens"):
        for dtype in ("float32", "bfloat16"):
            assert f"{shape} {dtype}" in names
    for part in ("small calls", "gradients", "lstm of 64", "gru of 256", "keeping pages", "training step", "relatives"):
        assert any(part in name for name in names), part


def test_a_figure_of_the_suite_is_the_middle_one_of_its_passes(tmp_path):
    times = iter([5.0, 1.0, 3.0])

    def measure(effort):
        second = next(times)
        floor = Row("", "floor", "1x1", "tokens", "float32", "cpu", "both", seconds=1.0, floors=1.0, rounds=2)
        return suite.Found([floor, replace(floor, norm="a", contender="normzoo", seconds=second, floors=second)])

    def judge(found):
        return [suite.Target("a", found.row("a").floors, 2.0)]

    again = suite.Section("again", measure, judge)
    counted = []
    once = suite.Section("once", lambda effort: counted.append(effort.seconds) or suite.Found(), lambda found: [], True)
    run = suite.run_suite(tmp_path / "speed.json", [again, once], Effort(seconds=6.0), passes=3)
    found = [(number, [target.value for target in found.targets]) for part, found, number in run if part is again]
    assert found == [(1, [5.0]), (2, [3.0]), (3, [3.0])]
    assert counted == [6.0], "what is measured once has all the time"
    kept = json.loads((tmp_path / "speed.json").read_text())
    assert kept["complete"]
    assert [(row["seconds"], row["rounds"]) for row in kept["sections"]["again"]["rows"]] == [(1.0, 6), (3.0, 6)]


def test_the_parts_of_the_suite_judge_what_they_measure():
    image, rows = Case((8, 16, 4, 4), "channels-last"), Case((8, 16), "tokens", "bfloat16")
    found = suite._rows(image, suite.NORMS, ("torch.nn",), ONCE)
    targets = suite._standard(image, found)
    judged = [target.what for target in targets]
    for norm in (*suite.NORMS[:-1], "HaloNorm(groups=8)"):
        assert f"{norm}: multiple of the floor" in judged
    assert "rms_norm: time over torch.nn's" in judged
    limits = {target.what.partition(":")[0]: target.limit for target in targets if "floor" in target.what}
    assert set(limits.values()) == {1.6, 2.0}

    small = suite._rows(rows, suite.NORMS, ("torch.nn",), ONCE)
    assert {t.limit for t in suite._standard(rows, small) if "floor" in t.what} == {2.0}
    assert len(suite._small(small)) == 6
    assert len(suite._like_batch_norm(suite._relatives(image, ONCE))) == 5
    assert all(target.met for target in suite._exact(suite._gradients(Case((64, 16), "tokens", "bfloat16"), ONCE)))
    recurrent = Recurrent("lstm", 3, 4, 8)
    inside = suite._beside_plain(recurrent, suite._recurrent(recurrent, ONCE))
    assert [target.limit for target in inside] == [1.15] * 3
    assert all(target.value > 0 for target in inside)
    step = {"task": "t", "bare": 1.0, "ours": 1.1, "ratio": 1.1}
    assert [t.value for t in suite._beside_bare(suite.Found(steps=[step, step]))] == [1.1]
    on_gpu = suite._on_gpu(image, found)
    assert sum(target.least for target in on_gpu) == len(on_gpu) == 7 * 2 + 3
    faster = next(t for t in on_gpu if t.what == "instance_norm: times as fast as torch.nn")
    theirs, ours = found.row("instance_norm", "torch.nn"), found.row("instance_norm")
    assert faster.value == pytest.approx(theirs.floors / ours.floors)

    found.targets = targets
    record = {"command": "x", "complete": True, "machine": {}, "sections": {"a": suite._as_dict(found)}}
    table = suite.page(json.loads(json.dumps(record)))
    assert "| rms_norm |" in table
    assert "at most 1.6" in table


def test_the_page_is_what_was_measured():
    record = json.loads((REPOSITORY / "docs" / "speed.json").read_text(encoding="utf-8"))
    assert record["complete"], "run `make bench`"
    assert (REPOSITORY / "docs" / "speed.inc").read_text(encoding="utf-8") == suite.page(record)


# ---- memory that is kept ---------------------------------------------------------------------------------------------

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")


def in_a_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={"OMP_NUM_THREADS": "1", "PATH": "", **environment},
        capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


FAULTS = """
import resource, torch
from normzoo.ops import memory

def faults(calls=8):
    for _ in range(calls):  # what is kept has to be there once
        torch.ones(16 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        torch.ones(16 * 2**20)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls
"""


@glibc
def test_kept_pages_are_not_mapped_again():
    """64 MB are 16,384 pages; a process as it starts gets all of them anew each time."""
    lines = in_a_process(FAULTS + "print(faults(), memory.keep_pages(), faults())").split()
    default, kept = float(lines[0]), float(lines[2])
    assert lines[1] == "True"
    page = __import__("mmap").PAGESIZE
    assert default > 0.9 * 64 * 2**20 / page / 512  # 512 where the system uses huge pages
    assert kept < 0.05 * default


@glibc
def test_released_pages_are_mapped_again():
    """Before any is kept: what is kept may be used once more."""
    lines = in_a_process(FAULTS + "print(memory.keep_pages(), memory.keep_pages(False), faults())").split()
    assert lines[:2] == ["True", "True"]
    assert float(lines[2]) > 0.9 * 64 * 2**20 / __import__("mmap").PAGESIZE / 512


@glibc
@pytest.mark.parametrize(("told", "kept"), [("0", False), ("1", True), ("", True)])
def test_the_environment_decides(told, kept):
    code = "from normzoo.ops import memory; print(memory.start())"
    assert in_a_process(code, NORMZOO_KEEP_PAGES=told).strip() == str(kept)


def test_without_glibc_nothing_is_done(monkeypatch):
    from normzoo.ops import memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.keep_pages() is False
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())  # musl's has no mallopt
    assert memory.keep_pages() is False


@glibc
def test_the_gain_of_keeping_pages():
    gains = measure_pages(rounds=1, shape=(2, 4, 8))
    assert [gain.workload for gain in gains] == list(WORKLOADS)
    assert all(gain.default > 0 and gain.kept > 0 and gain.gain == gain.default / gain.kept for gain in gains)
