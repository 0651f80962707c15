"""The kit itself: a mutant is caught by the check that names its fault, a twin passes, and the forms it comes in."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normzoo as nz
from normzoo import checks, registry
from normzoo.checks import CheckFailed, NotApplicable, Subject, check_norm, infer, list_checks, parametrize_with_checks
from normzoo.registry import load_file

HERE = Path(__file__).resolve().parent
MUTANTS = HERE / "mutants.py"
mutants = load_file(MUTANTS)
CHECKS = {check.name: check for check in list_checks()}
ALL = "NORMZOO_ALL_CHECKS" in os.environ

PEAK = """
import torch
from torch import nn
import normzoo as nz

class PeakNorm(nn.Module):
    "Divide by the largest magnitude over channels."
    def __init__(self, num_features, eps=1e-5, channel_dim=1):
        super().__init__()
        self.eps, self.channel_dim = eps, channel_dim
        self.weight = nn.Parameter(torch.ones(num_features))
    def forward(self, x):
        y = x / (x.abs().amax(self.channel_dim, keepdim=True) + self.eps)
        shape = [1] * x.ndim
        shape[self.channel_dim] = -1
        return y * self.weight.view(shape)

class PowerNorm(PeakNorm):
    "Divide by the root mean square over channels, in whatever precision."
    def forward(self, x):
        y = x / ((x * x).mean(self.channel_dim, keepdim=True) + self.eps).sqrt()
        shape = [1] * x.ndim
        shape[self.channel_dim] = -1
        return y * self.weight.view(shape)

class HaloNorm(nz.MomentNorm):
    "Groups of channels share a statistic over the whole batch."
    moments = "b (g c) s -> g"

class Broken(PeakNorm):
    def forward(self, x):
        return {}["gain"] * x
"""


@pytest.fixture(scope="module")
def user_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "my_file.py"
    path.write_text(textwrap.dedent(PEAK))
    return path


def spec(cls: type) -> str:
    return f"{MUTANTS}:{cls.__name__}"


def failures(report) -> dict[str, str]:
    return {result.name: result.detail for result in report.failed}


# ---- mutants and twins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=str)
def test_a_mutant_is_caught_by_the_check_that_names_its_fault(mutant):
    with pytest.raises(CheckFailed) as failure:
        CHECKS[mutant.check](spec(mutant.norm))
    assert re.search(mutant.says, str(failure.value)), str(failure.value)


@pytest.mark.parametrize("twin", mutants.TWINS, ids=lambda twin: twin.__name__)
def test_a_twin_passes_everything(twin):
    slow = {mutant.twin for mutant in mutants.MUTANTS if CHECKS[mutant.check].slow}
    report = check_norm(spec(twin), slow=ALL or twin in slow)
    report.raise_on_failure()
    assert {result.status for result in report} <= {"passed", "not_applicable"}


def test_every_check_has_a_mutant():
    assert set(CHECKS) == {mutant.check for mutant in mutants.MUTANTS}
    assert len({mutant.norm for mutant in mutants.MUTANTS}) >= 30


def test_every_check_says_what_it_guards_and_what_to_do():
    for check in CHECKS.values():
        for sentence in (check.guards, check.mend):
            assert sentence.endswith("."), (check.name, sentence)
            assert len(sentence) < 200, (check.name, sentence)


# ---- verdicts on strangers -------------------------------------------------------------------------------------------


def test_a_strangers_class_passes(user_file):
    report = check_norm(f"{user_file}:PeakNorm")
    report.raise_on_failure()
    detail = {result.name: result for result in report}
    assert detail["causality"].status == "not_applicable"
    assert detail["causality"].detail == "undeclared"
    assert detail["distributed_data_parallel"].status == "passed"
    inferred = report.inferred
    assert inferred.shares == "b c s -> b s"
    assert inferred.causal
    assert inferred.scale_invariant
    assert not inferred.shift_invariant
    assert not inferred.batch_dependent


def test_a_strangers_fault_is_found(user_file):
    report = check_norm(f"{user_file}:PowerNorm", slow=False)
    assert failures(report).keys() == {"half_precision"}
    with pytest.raises(CheckFailed, match="Take statistics in float32"):
        report.raise_on_failure()


def test_three_lines_pass(user_file):
    report = check_norm(f"{user_file}:HaloNorm", slow=False)
    report.raise_on_failure()
    assert report.inferred.shares == "b (g c) s -> g"


def test_an_exception_is_a_failure_that_is_named(user_file):
    report = check_norm(f"{user_file}:Broken", only=["shapes", "gradcheck"])
    for detail in failures(report).values():
        assert "KeyError: 'gain'" in detail
        assert "my_file.py:" in detail
    assert len(report.failed) == 2


@pytest.mark.parametrize(
    ("norm", "shares", "in_evaluation", "traits"),
    [
        (nn.BatchNorm2d, "b c s -> c", "nothing", "batch_dependent causal stateful scale_invariant shift_invariant"),
        (nn.LayerNorm, "b c s -> b s", "b c s -> b s", "causal causal_in_training scale_invariant shift_invariant"),
        (nn.RMSNorm, "b c s -> b s", "b c s -> b s", "causal causal_in_training scale_invariant"),
        (nn.InstanceNorm1d, "b c s -> b c", "b c s -> b c", "scale_invariant shift_invariant"),
        (functools.partial(nn.GroupNorm, 4), "b (g c) s -> b g", "b (g c) s -> b g", "scale_invariant shift_invariant"),
        (nn.Identity, "nothing", "nothing", "causal causal_in_training"),
        ("ghost_batch_norm(ghost_batch_size=2)", "(n b) c s -> n c", "nothing",
         "batch_dependent causal stateful scale_invariant shift_invariant"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_what_is_inferred(norm, shares, in_evaluation, traits):
    found = infer(norm)
    assert (found.shares, found.shares_in_evaluation) == (shares, in_evaluation)
    names = ("batch_dependent", "causal", "causal_in_training", "stateful", "scale_invariant", "shift_invariant",
             "stochastic", "batch_dependent_in_evaluation")  # fmt: skip
    assert {name for name in names if getattr(found, name)} == set(traits.split())
    assert not found.untold


class Halo(nz.MomentNorm):
    moments = "b (g c) s -> g"


class Overridden(Halo):
    def normalize(self, x, mask, channels_last):
        return x / x.abs().amax((0, 1, 2), keepdim=True)


def test_a_pattern_is_shown_as_its_author_stated_it():
    for groups in (1, 2, 8):  # with 8 groups, or one, of 8 channels plainer patterns say the same
        found = infer(functools.partial(Halo, groups=groups))
        assert (found.shares, found.shares_in_evaluation) == ("b (g c) s -> g", "nothing")
    assert infer("group_norm(groups=8)").shares_in_evaluation == "b (g c) s -> b g"
    assert infer(functools.partial(nn.GroupNorm, 8)).shares == "b c s -> b c", "a plain module states none"
    assert infer(functools.partial(Overridden, groups=8)).shares == "b c s ->", "what is stated is not believed"


def test_what_is_no_pattern_is_described():
    assert infer(spec(mutants.Running)).shares == (
        "no single pattern; an element moves every other channel, some other position, some other channel and position"
    )
    assert infer(spec(mutants.Noisy)).stochastic


def test_known_faults_of_torch_are_found():
    report = check_norm(nn.BatchNorm1d, slow=False)
    assert {"checkpointing", "two_forwards"} <= failures(report).keys()
    assert "layouts" in failures(check_norm(nn.LocalResponseNorm, only=["layouts"]))
    check_norm(nn.LayerNorm, slow=False).raise_on_failure()
    check_norm(functools.partial(nn.GroupNorm, 4), slow=False).raise_on_failure()


# ---- results ---------------------------------------------------------------------------------------------------------


def test_results():
    report = check_norm("group_norm", only=["shapes", "momentum", "eps_option"])
    assert [result.name for result in report] == ["eps_option", "shapes", "momentum"]
    assert [result.status for result in report] == ["passed", "passed", "not_applicable"]
    assert report.ok
    assert all(result.seconds > 0 for result in report)
    assert report[2].detail == "has no open option 'momentum'"
    assert report[2].check is CHECKS["momentum"]
    assert str(report) == "group_norm: 2 passed · 1 not applicable"
    assert report.norm == "group_norm"


def test_selection():
    names = lambda only, **options: {check.name for check in list_checks(only, **options)}  # noqa: E731
    assert names("half") == {"half_precision"}
    assert names("mask or padding") == {
        "mask_against_unpadded", "mask_weights", "mask_edges", "padding_is_inert",
    }  # fmt: skip
    assert names("systems and not onnx") == {c.name for c in CHECKS.values() if c.group == "systems"} - {"onnx"}
    assert not any(check.slow for check in list_checks(slow=False))
    assert names(["gradcheck"]) == {"gradcheck"}
    with pytest.raises(nz.NormzooError, match="did you mean 'gradcheck'"):
        list_checks(["gradchek"])
    with pytest.raises(nz.NormzooError, match="unknown check 'haf'"):
        list_checks("haf")
    with pytest.raises(nz.NormzooError, match="as in 'half or mask'"):
        list_checks("half or")
    with pytest.raises(nz.NormzooError, match="as in 'half or mask'"):
        list_checks("half + mask")


def test_fail_fast():
    whole = check_norm(spec(mutants.NoEps), slow=False)
    report = check_norm(spec(mutants.NoEps), slow=False, fail_fast=True)
    assert len(report) < len(whole)
    assert [result.name for result in report.failed] == [whole.failed[0].name]
    assert report[-1].status == "failed"


def test_expected_failures_are_strict():
    norm = spec(mutants.GainTwice)
    report = check_norm(norm, only=["gain_and_shift"], expected_failures={"gain_and_shift": "squared on purpose"})
    assert (report[0].status, report[0].detail, report.ok) == ("expected_failure", "squared on purpose", True)
    report = check_norm("rms_norm", only=["shapes"], expected_failures={"shapes": "I thought so"})
    assert report[0].status == "failed"
    assert "I thought so" in report[0].detail
    with pytest.raises(nz.NormzooError, match="did you mean 'shapes'"):
        check_norm("rms_norm", only=["shapes"], expected_failures={"shape": ""})


def test_a_norm_can_say_what_it_fails():
    class Squared(mutants.GainTwice):
        expected_failures = {"gain_and_shift": "the paper squares the gain"}

    report = check_norm(Squared, only=["gain_and_shift", "shapes"])
    assert [(r.name, r.status) for r in report] == [("shapes", "passed"), ("gain_and_shift", "expected_failure")]


class Misspelt(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_featurs))  # noqa: F821


def test_what_cannot_be_checked_is_said():
    with pytest.raises(nz.NormzooError, match="expected what makes one from a width: the class"):
        check_norm(nn.BatchNorm1d(4))  # pyright: ignore[reportArgumentType]
    with pytest.raises(nz.NormzooError, match=r"norm\(8\) raised ValueError"):
        check_norm(nn.Dropout)
    with pytest.raises(nz.NormzooError, match=rf"raised NameError: .*\({re.escape(__file__)}, line \d+\)"):
        check_norm(Misspelt)
    with pytest.raises(nz.NormzooError, match="did you mean 'batch_norm'"):
        check_norm("bach_norm")
    with pytest.raises(NotApplicable, match="undeclared"):
        CHECKS["causality"](nn.LayerNorm)
    assert Subject(functools.partial(nn.GroupNorm, 32)).channels == 32


def test_checks_leave_no_trace():
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state()), warnings.filters[:]  # noqa: NPY002
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    check_norm(spec(mutants.DrawsGlobally), only="not export and not onnx", slow=False)
    after = torch.get_rng_state(), random.getstate(), repr(np.random.get_state()), warnings.filters[:]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())


def test_a_check_is_the_same_every_time():
    names = ["half_precision", "large_mean", "first_step", "gain_and_shift"]
    one, other = (check_norm(spec(mutants.Cancels), only=names) for _ in range(2))
    assert [(r.name, r.status, r.detail) for r in one] == [(r.name, r.status, r.detail) for r in other]


def test_a_check_of_ones_own():
    known = dict(checks.kit._checks)
    try:

        @checks.check
        def no_bias(subject: Subject) -> None:
            """The norm has no shift.

            Leave it to the next layer.
            """
            if (
                "shift" in subject.make().roles.values()
                and dict(subject.make().named_parameters()).get("bias") is not None
            ):
                raise CheckFailed("there is a bias")

        assert no_bias.group == "test_checks"
        assert "no_bias" in failures(check_norm("layer_norm", only=["no_bias"]))
        assert check_norm("rms_norm", only=["no_bias"]).ok
        with pytest.raises(nz.NormzooError, match="expected two"):

            @checks.check
            def silent(subject: Subject) -> None:
                """Say nothing of what to do."""

        def shapes(subject: Subject) -> None:
            """Take a name twice.

            Choose another.
            """

        with pytest.raises(nz.NormzooError, match="is taken"):
            checks.check(shapes)
    finally:
        checks.kit._checks.clear()
        checks.kit._checks.update(known)


# ---- two processes ---------------------------------------------------------------------------------------------------


def test_two_processes_serve_what_another_process_can_find(user_file):
    class Local(nz.MomentNorm):
        moments = "b c s -> c"

    with pytest.raises(NotApplicable, match="another process cannot find it"):
        CHECKS["synchronization"](Local)
    assert CHECKS["synchronization"](f"{user_file}:HaloNorm(groups=2)") == ""
    with pytest.raises(NotApplicable, match="no open option 'sync'"):
        CHECKS["synchronization"]("layer_norm")


def test_two_processes_find_a_name_that_a_file_registers(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_norms", dict(registry._norms))
    monkeypatch.setattr(registry, "_names", dict(registry._names))
    path = tmp_path / "registering.py"
    path.write_text(
        "import normzoo as nz\n"
        "@nz.register('registered_by_a_file')\n"
        "class Mine(nz.MomentNorm):\n    'Batch norm.'\n    moments = 'b c s -> c'\n"
    )
    load_file(path)
    assert CHECKS["distributed_data_parallel"]("registered_by_a_file") == ""


def test_a_process_that_dies_is_a_failure(tmp_path):
    path = tmp_path / "dying.py"
    path.write_text(
        "import os, normzoo as nz\nimport torch.distributed as dist\n"
        "class Dying(nz.MomentNorm):\n"
        "    moments = 'b c s -> c'\n"
        "    def normalize(self, *arguments):\n"
        "        if dist.is_initialized(): os._exit(3)\n"
        "        return super().normalize(*arguments)\n"
    )
    with pytest.raises(CheckFailed, match="died"):
        CHECKS["synchronization"](f"{path}:Dying")
    assert CHECKS["synchronization"]("batch_norm") == ""  # the server is there for the next


def test_a_file_that_checks_itself_is_not_run_again_and_again(tmp_path):
    path = tmp_path / "unguarded.py"
    path.write_text(
        "import normzoo as nz\nfrom normzoo.checks import check_norm\n"
        "class Mine(nz.MomentNorm):\n    moments = 'b c s -> c'\n"
        "check_norm(Mine, only=['construction'])\n"
    )
    with pytest.raises(NotApplicable, match="if __name__ == '__main__'"):
        CHECKS["distributed_data_parallel"](f"{path}:Mine")


# ---- pytest ----------------------------------------------------------------------------------------------------------


def parameters(decorator) -> dict[str, tuple]:
    return {parameter.id: parameter for parameter in decorator.args[1]}


def test_parametrize():
    decorator = parametrize_with_checks(
        ["rms_norm", nn.LayerNorm],
        expected_failures={"rms_norm": {"shapes": "a reason"}, nn.LayerNorm: {"gradcheck": "another"}},
    )
    found = parameters(decorator)
    assert decorator.args[0] == ("norm", "check")
    assert set(found) == {f"{norm}-{name}" for norm in ("rms_norm", "LayerNorm") for name in CHECKS}
    (mark,) = found["rms_norm-shapes"].marks
    assert (mark.name, mark.kwargs) == ("xfail", {"raises": CheckFailed, "reason": "a reason", "strict": True})
    assert [key for key, parameter in found.items() if parameter.marks] == ["rms_norm-shapes", "LayerNorm-gradcheck"]
    norm, check = found["LayerNorm-causality"].values
    with pytest.raises(pytest.skip.Exception, match="undeclared"):
        check(norm)
    chosen = parametrize_with_checks(["none"], select=lambda norm, check: check.name == "shapes")
    assert set(parameters(chosen)) == {"none-shapes"}


def test_parametrize_refuses_what_would_be_lost():
    with pytest.raises(nz.NormzooError, match="did you mean 'rms_norm'"):
        parametrize_with_checks(["rms_norm"], expected_failures={"rms_nrm": {}})
    with pytest.raises(nz.NormzooError, match="did you mean 'shapes'"):
        parametrize_with_checks(["rms_norm"], expected_failures={"rms_norm": {"shape": ""}})
    with pytest.raises(nz.NormzooError, match="two of the norms are called"):
        parametrize_with_checks(["rms_norm", "rms_norm"])


@parametrize_with_checks(
    [mutants.GainTwice, nn.LayerNorm],
    expected_failures={"GainTwice": {"gain_and_shift": "the gain is squared on purpose"}},
    select=lambda norm, check: check.name in ("gain_and_shift", "shapes"),
)
def test_norm(norm, check):
    check(norm)


def test_importing_the_kit_is_light():
    code = (
        "import sys, normzoo.checks;"
        "heavy = {'pytest', 'pytorch_lightning', 'wandb', 'onnx', 'onnxruntime', 'torch._dynamo'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- command line ----------------------------------------------------------------------------------------------------


def test_json(capsys, user_file):
    code = checks.run_check_command(f"{user_file}:PowerNorm", "half or layouts", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert code == 1
    assert list(found) == ["norm", "traits", "checks"]
    assert found["norm"] == "PowerNorm"
    assert found["traits"]["declared"] is False
    assert found["traits"]["shares"] == "b c s -> b s"
    assert found["traits"]["causal"] is True
    assert [list(result) for result in found["checks"]] == [["name", "status", "detail"]] * 2
    assert {r["name"]: r["status"] for r in found["checks"]} == {"layouts": "passed", "half_precision": "failed"}
    assert checks.run_check_command("batch_norm", "shapes", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["traits"]["batch_dependent"] is True


def test_text(capsys, user_file):
    assert checks.run_check_command(f"{user_file}:PowerNorm", "half or layouts or eps or causality") == 1
    out = capsys.readouterr().out
    assert out.startswith("PowerNorm: 2 passed · 1 failed · 2 not applicable\n")
    assert "✓ layouts" in out
    assert re.search(r"✗ half_precision +float16 input of magnitude 1000", out)
    assert "Take statistics in float32" in out
    assert re.search(r"inferred +batch dependent no · causal yes", out)
    assert max(map(len, out.splitlines())) <= 120
    assert checks.run_check_command("rms_norm", "shapes", fail_fast=True) == 0


def test_text_for_a_terminal_without_unicode(monkeypatch, capsys):
    monkeypatch.setattr(checks.command, "_encodes", lambda text: False)
    checks.run_check_command("rms_norm", "shapes")
    assert "+ shapes" in capsys.readouterr().out.encode("ascii").decode()
