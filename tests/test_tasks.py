from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon
from torch.utils.data import DataLoader

from normzoo import create, list_norms
from normzoo.data import list_data
from normzoo.errors import NormzooError, OptionError
from normzoo.layers.base import Norm, parameter_roles
from normzoo.models.dropout import Dropout
from normzoo.tasks import (
    ClassificationTask,
    LanguageModelTask,
    NormSync,
    RegressionTask,
    Setting,
    TrainingTask,
    Unbuildable,
    build,
    check_compatible,
    list_tasks,
    primary_metric,
    resolve,
)
from normzoo.tasks.compatibility import looks_ahead
from normzoo.tasks.metrics import BitsPerSymbol, CountedMean
from normzoo.tasks.optim import JointOptimizer, configure, create_optimizer, parameter_groups

pytestmark = [
    # Lightning's own, from its use of torch's pytrees
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:DeprecationWarning"),
]


def is_complete(norm: str) -> bool:
    """Whether a registered norm can be made from its width alone."""
    try:
        create(norm, 8)
    except OptionError:
        return False
    return True


NORMS = [norm for norm in list_norms() if is_complete(norm)]
SMALL: dict[str, dict[str, Any]] = {
    "digits/mlp": {"train_samples": 128, "batch_size": 32},
    "adding/lstm": {"train_samples": 64, "batch_size": 32, "length": 6, "width": 8, "eval_samples": 32},
    "recall/transformer": {"train_samples": 64, "batch_size": 32, "width": 8, "depth": 1, "eval_samples": 32},
    "text/transformer": {
        "train_samples": 32,
        "batch_size": 16,
        "width": 8,
        "depth": 1,
        "length": 8,
        "eval_samples": 32,
    },
}


@pytest.fixture(autouse=True)
def _quiet():
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def trainer(setting: Setting, **arguments: Any) -> pl.Trainer:
    chosen = {"accelerator": "cpu", "devices": 1, "logger": False} | setting.trainer_arguments(lean=True) | arguments
    return pl.Trainer(**chosen)


def fit(task: str, norm: str = "layer_norm", seed: int = 0, callbacks: Any = (), **overrides: Any):
    setting = resolve(task, SMALL.get(task, {}) | {"epochs": 1} | overrides)
    module, data = build(task, norm, setting, seed)
    run = trainer(setting, callbacks=list(callbacks))
    run.fit(module, data)
    return module, data, run


# ---- settings ----------------------------------------------------------------------------------------------------


def test_overrides_find_their_place():
    setting = resolve("adding/rnn", {"lr": 1, "width": 16, "data.length": 12, "model": {"depth": 2}, "batch_size": 8})
    assert (setting.lr, setting.batch_size) == (1.0, 8)
    assert (setting.model["width"], setting.model["depth"], setting.data["length"]) == (16, 2, 12)


def test_a_setting_is_concrete_and_resolves_to_itself():
    setting = resolve("text/transformer")
    assert setting.model["causal"] is True
    assert setting.model["heads"] >= 1
    assert setting.data["text_hash"]
    everything = {name: getattr(setting, name) for name in Setting.__dataclass_fields__}
    assert resolve("text/transformer", everything) == setting
    json.dumps(everything)


def test_another_optimizer_brings_its_own_learning_rate():
    assert resolve("digits/cnn", {"optimizer": "sgd"}).lr == 0.1
    assert resolve("digits/cnn", {"optimizer": "sgd", "lr": 0.5}).lr == 0.5
    muon = resolve("digits/transformer", {"optimizer": "muon"})
    assert (muon.momentum, muon.nesterov) == (0.95, True)
    assert resolve("digits/rnn", {"optimizer": "adamw"}) == resolve("digits/rnn")


@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        ("digits", {}, "a task is 'data/model'"),
        ("digits/", {}, "a task is 'data/model'"),
        ("digit/cnn", {}, "did you mean 'digits'"),
        ("digits/cn", {}, "did you mean 'cnn'"),
        ("text/cnn", {}, "has no view for 'cnn'"),
        ("digits/cnn", {"learning_rate": 0.1}, "no option 'learning_rate'"),
        ("digits/cnn", {"batchsize": 1}, "did you mean 'batch_size'"),
        ("adding/rnn", {"lenght": 1}, "did you mean 'length'"),
        ("adding/rnn", {"model.widht": 1}, "did you mean 'model.width'"),
        ("adding/rnn", {"width": 4, "model.width": 8}, "given twice"),
        ("adding/rnn", {"data": 3}, "mapping"),
        ("adding/rnn", {"length": 2}, "at least 4"),
        ("digits/cnn", {"lr": 0}, "lr must be a number above 0"),
        ("digits/cnn", {"lr": float("nan")}, "lr must be"),
        ("digits/cnn", {"lr": "fast"}, "lr must be"),
        ("digits/cnn", {"lr": float("inf")}, "finite"),
        ("digits/cnn", {"epochs": 0}, "epochs must be a whole number"),
        ("digits/cnn", {"epochs": 1.5}, "epochs must be a whole number"),
        ("digits/cnn", {"batch_size": True}, "batch_size must be"),
        ("digits/cnn", {"optimizer": "adamv"}, "did you mean 'adam'"),
        ("digits/cnn", {"schedule": "cosin"}, "did you mean 'cosine'"),
        ("digits/cnn", {"precision": "bf16"}, "unknown precision"),
        ("digits/cnn", {"warmup": 1}, "warmup must be"),
        ("digits/cnn", {"momentum": -0.1}, "momentum must be"),
        ("digits/cnn", {"milestones": [0.75, 0.5]}, "must rise"),
        ("digits/cnn", {"milestones": "half"}, "must be shares"),
        ("digits/cnn", {"nesterov": True}, "optimizer 'adamw' has no nesterov"),
        ("digits/cnn", {"optimizer": "sgd", "beta2": 0.9}, "optimizer 'sgd' has no beta2"),
        ("digits/cnn", {"optimizer": "sgd", "momentum": 0, "nesterov": True}, "momentum > 0"),
        ("digits/cnn", {"decay_norms": 1}, "True or False"),
        ("text/transformer", {"causal": False}, "would see it"),
    ],
)
def test_bad_settings_are_refused_with_a_hint(task: str, overrides: dict, message: str):
    with pytest.raises(NormzooError, match=message):
        resolve(task, overrides)


def test_settings_need_no_torch_and_checking_them_no_lightning():
    script = """
        import sys
        from normzoo.tasks import Setting, list_tasks, resolve
        Setting(lr=0.1), list_tasks()
        assert "torch" not in sys.modules
        for task in list_tasks():
            resolve(task)
        from normzoo.tasks import check_compatible
        check_compatible("text/transformer", "layer_norm")
        assert "pytorch_lightning" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=os.environ)


# ---- schedules ---------------------------------------------------------------------------------------------------


def test_the_warm_up_is_linear_and_ends_at_the_full_rate():
    setting = Setting(schedule="constant", warmup=0.25)
    assert [setting.factor(step, 16) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decaying_schedules_start_at_one_and_fall_towards_zero(schedule: str, warmup: float):
    setting, steps = Setting(schedule=schedule, warmup=warmup), 200
    rates = [setting.factor(step, steps) for step in range(steps)]
    start = round(warmup * steps)
    assert rates[start] == 1 == max(rates)
    assert all(after < before for before, after in zip(rates[start:], rates[start + 1 :], strict=False))
    assert 0 < rates[-1] < 0.02
    middle = (start + steps) // 2
    assert math.isclose(rates[middle], 0.5, abs_tol=1e-9)
    assert setting.factor(steps, steps) == 0


def test_the_step_schedule_drops_at_its_milestones():
    setting = Setting(schedule="step", milestones=(0.5, 0.8), drop=0.1)
    rates = [setting.factor(step, 10) for step in range(10)]
    assert rates == pytest.approx([1] * 5 + [0.1] * 3 + [0.01] * 2)


def test_the_trainer_follows_the_schedule():
    class Rates(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    module, _, run = fit("digits/mlp", lr=0.1, warmup=0.25, schedule="linear", epochs=2, callbacks=[rates])
    assert run.global_step == 8
    assert rates.seen == pytest.approx([0.1 * module.setting.factor(step, 8) for step in range(8)])


def test_a_schedule_without_an_end_is_refused():
    module, _ = build("digits/mlp", "none")
    with pytest.raises(NormzooError, match="how long the training is"):
        configure(module.model, Setting(schedule="cosine"), math.inf)
    assert configure(module.model, Setting(schedule="constant"), math.inf)[1] is None


# ---- optimizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
@pytest.mark.parametrize("norm", ["batch_norm", "group_norm", "rms_norm", "none", "torch.nn:LayerNorm"])
def test_norms_and_biases_are_not_decayed_unless_asked(norm: str, optimizer: str):
    model = build("digits/transformer", norm)[0].model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    roles = parameter_roles(model)
    decayed = {}
    for group in create_optimizer(model, Setting(optimizer=optimizer, weight_decay=0.1)).param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in decayed, "a parameter is in two groups"
            decayed[id(parameter)] = group["weight_decay"]
    assert decayed.keys() == names.keys(), "a parameter is in no group"
    for key, decay in decayed.items():
        plain = names[key] not in roles and not names[key].endswith(("bias", "cls"))
        assert decay == (0.1 if plain else 0.0), names[key]
    assert {0.0, 0.1} == set(decayed.values())

    asked = parameter_groups(model, Setting(weight_decay=0.1, decay_norms=True, decay_biases=True))
    assert [group["weight_decay"] for group in asked] == [0.1]


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    groups = parameter_groups(model, Setting())
    assert sum(len(group["params"]) for group in groups) == 2
    model.requires_grad_(False)
    with pytest.raises(NormzooError, match="nothing to train"):
        create_optimizer(model, Setting())


def test_the_options_reach_the_optimizer():
    model = nn.Linear(3, 2)
    sgd = create_optimizer(model, Setting(optimizer="sgd", lr=0.3, momentum=0.8, nesterov=True))
    assert isinstance(sgd, SGD)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.3, 0.8, True)
    for name, cls in (("adam", Adam), ("adamw", AdamW)):
        adam = create_optimizer(model, Setting(optimizer=name, lr=0.3, momentum=0.8, beta2=0.7))
        assert type(adam) is cls
        assert adam.defaults["betas"] == (0.8, 0.7)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = build("text/transformer", "layer_norm")[0].model
    optimizer = create_optimizer(model, Setting(optimizer="muon", momentum=0.9))
    assert isinstance(optimizer, JointOptimizer)
    muon, adamw = optimizer.parts
    assert isinstance(muon, Muon)
    assert isinstance(adamw, AdamW)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert taken == {name for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2}
    with pytest.raises(NormzooError, match="not matrices"):
        create_optimizer(build("digits/cnn", "none")[0].model, Setting(optimizer="muon"))


def parts_and_joint() -> tuple[list[nn.Parameter], JointOptimizer]:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 3, generator=generator)), nn.Parameter(torch.randn(3, generator=generator))]
    return weights, JointOptimizer([Muon([weights[0]], lr=0.1), AdamW([weights[1]], lr=0.1)])


def descend(weights: list[nn.Parameter], optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (weights[0] @ weights[1]).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_the_joint_optimizer_is_its_parts():
    weights, joint = parts_and_joint()
    descend(weights, [joint], 5)
    others, parts = parts_and_joint()
    descend(others, list(parts.parts), 5)
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))


def test_the_joint_optimizer_resumes_where_it_was_saved():
    straight, joint = parts_and_joint()
    descend(straight, [joint], 6)

    weights, first = parts_and_joint()
    descend(weights, [first], 3)
    saved = json.loads(json.dumps(first.state_dict()["param_groups"])), first.state_dict()
    _, second = parts_and_joint()
    resumed = [parameter for group in second.param_groups for parameter in group["params"]]
    with torch.no_grad():
        for parameter, value in zip(resumed, weights, strict=True):
            parameter.copy_(value)
    second.load_state_dict(saved[1])
    descend(resumed, [second], 3)
    assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))


def test_a_schedule_moves_every_part_of_the_joint_optimizer():
    _, joint = parts_and_joint()
    for _ in range(2):  # also after its state was loaded
        for group in joint.param_groups:
            group["lr"] = 0.25
        assert [group["lr"] for part in joint.parts for group in part.param_groups] == [0.25, 0.25]
        joint.load_state_dict(joint.state_dict())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_every_optimizer_learns(optimizer: str):
    module, data = build("digits/mlp", "layer_norm")
    before = loss_over(module, data)
    module, data, _ = fit("digits/mlp", optimizer=optimizer, lr={"sgd": 0.1}.get(optimizer, 0.01), epochs=6)
    assert loss_over(module, data) < 0.6 * before


def loss_over(module: TrainingTask, data: pl.LightningDataModule) -> float:
    module.eval()
    with torch.no_grad():
        total = count = 0.0
        for batch in data.val_dataloader():
            loss, counted = module.loss(module(batch["x"], batch.get("mask")), batch)
            total, count = total + float(loss * counted), count + float(counted)
    return total / count


# ---- clipping and accumulation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer_norm", "group_norm", "none"])
def test_accumulated_batches_are_one_large_batch(norm: str):
    common = {"optimizer": "sgd", "lr": 0.05, "precision": "64-true", "epochs": 2}
    large, _, one = fit("digits/mlp", norm, batch_size=32, **common)
    small, _, other = fit("digits/mlp", norm, batch_size=8, accumulate=4, **common)
    assert one.global_step == other.global_step == 8
    for (name, a), b in zip(large.named_parameters(), small.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12), name


class Norms(pl.Callback):
    """Norms of the gradient as the optimizer sees it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        pass

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        grads = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        if grads:
            self.seen.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))


@pytest.mark.parametrize("told", [True, False])
def test_gradients_are_clipped_also_where_the_trainer_was_not_told(told: bool):
    setting = resolve("digits/mlp", SMALL["digits/mlp"] | {"clip": 0.01, "epochs": 2, "optimizer": "sgd"})
    module, data = build("digits/mlp", "none", setting)
    norms = Norms()
    run = trainer(setting, callbacks=[norms], **({} if told else {"gradient_clip_val": None}))
    run.fit(module, data)
    assert len(norms.seen) >= 6
    assert norms.seen == pytest.approx([0.01] * len(norms.seen), rel=1e-3)


def test_accumulation_is_kept_where_the_trainer_was_not_told():
    setting = resolve("digits/mlp", SMALL["digits/mlp"] | {"accumulate": 2, "epochs": 2})
    module, data = build("digits/mlp", "none", setting)
    run = trainer(setting, accumulate_grad_batches=1)
    run.fit(module, data)
    assert run.global_step == 4
    assert module.lr_schedulers().last_epoch == 4  # pyright: ignore


@pytest.mark.parametrize("theirs", [{"gradient_clip_val": 2.0}, {"accumulate_grad_batches": 3}])
def test_a_trainer_that_contradicts_the_setting_is_refused(theirs: dict):
    setting = resolve("digits/mlp", SMALL["digits/mlp"] | {"clip": 1.0, "accumulate": 2})
    module, data = build("digits/mlp", "none", setting)
    with pytest.raises(NormzooError, match="contradicts"):
        trainer(setting, **theirs).fit(module, data)


# ---- what is logged ----------------------------------------------------------------------------------------------


class Rows(DummyLogger):
    """What a logger is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.rows.append((step or 0, dict(metrics)))


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


@pytest.mark.parametrize(("log_every", "blocks"), [(2, [2, 2, 2, 2]), (3, [3, 3, 2]), (1, [1] * 8), (4, [4, 4])])
def test_the_training_loss_is_the_mean_of_a_block(log_every: int, blocks: list[int]):
    setting = resolve("digits/mlp", SMALL["digits/mlp"] | {"epochs": 2, "log_every": log_every})
    module, data = build("digits/mlp", "batch_norm", setting)
    losses, rows = Losses(), Rows()
    trainer(setting, callbacks=[losses], logger=rows).fit(module, data)
    assert len(losses.seen) == 8
    starts = [sum(blocks[:index]) for index in range(len(blocks))]
    means = [sum(losses.seen[s : s + n]) / n for s, n in zip(starts, blocks, strict=True)]
    logged = [row["train/loss"] for _, row in rows.rows if "train/loss" in row]
    assert logged == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("task", SMALL)
def test_metrics_have_the_promised_names_and_values(task: str):
    module, data, run = fit(task)
    metric, mode = primary_metric(task)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    tested = run.test(module, data, verbose=False)[0]
    assert set(logged) == {"train/loss", "val/loss", f"val/{metric}"}
    assert set(tested) == {"test/loss", f"test/{metric}"}
    assert logged["val/loss"] == pytest.approx(loss_over(module, data), rel=1e-4)
    assert mode == ("max" if metric == "accuracy" else "min")
    if metric == "mse":
        assert logged["val/mse"] == pytest.approx(logged["val/loss"], rel=1e-4)
    if metric == "bits_per_char":
        assert logged["val/bits_per_char"] == pytest.approx(logged["val/loss"] / math.log(2), rel=1e-5)
    if metric == "accuracy":
        assert logged["val/accuracy"] == pytest.approx(accuracy_over(module, data), rel=1e-5)


def accuracy_over(module: TrainingTask, data: pl.LightningDataModule) -> float:
    right = asked = 0
    for batch in data.val_dataloader():
        counts = batch["y"] != -100
        right += int((module(batch["x"]).argmax(-1) == batch["y"])[counts].sum())
        asked += int(counts.sum())
    return right / asked


def test_the_mean_counts_samples_not_batches():
    mean = CountedMean()
    mean.update(torch.tensor(1.0), torch.tensor(9))
    mean.update(torch.tensor(11.0), torch.tensor(1))
    mean.update(torch.tensor(float("nan")), torch.tensor(0))  # nothing was asked
    assert mean.compute() == 2


def test_a_diverged_training_does_not_look_well():
    for metric in (CountedMean(), BitsPerSymbol()):
        metric.update(torch.tensor(1.0), torch.tensor(9))
        metric.update(torch.tensor(float("nan")), torch.tensor(1))
        assert metric.compute().isnan()
    module, _, run = fit("digits/mlp", "none", optimizer="sgd", lr=1e30, schedule="constant", warmup=0, epochs=2)
    assert not math.isfinite(run.callback_metrics["val/loss"])
    assert not all(parameter.isfinite().all() for parameter in module.parameters())


# ---- masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "none"])
@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_what_is_in_the_padding_does_not_matter(model: str, norm: str):
    module, data = build(f"adding/{model}", norm, resolve(f"adding/{model}", {"variable": True, "length": 8}))
    batch = next(iter(data.train_dataloader()))
    assert not batch["mask"].all()
    spoiled = batch | {"x": batch["x"].masked_fill(~batch["mask"].unsqueeze(-1), float("nan"))}
    one, other = (module.training_step(b, 0) for b in (batch, spoiled))
    assert one.isfinite()
    assert one == other


class Tagger(nn.Module):
    """An answer at every position; takes a mask and remembers it."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2, outputs)
        self.mask: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.mask = mask
        return self.linear(x)


def test_losses_and_metrics_are_over_real_tokens_only():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 2, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4]).unsqueeze(1)
    y = torch.randint(3, (4, 5), generator=generator)
    y[0, 0] = -100
    task = ClassificationTask(Tagger(3), Setting(), classes=3)
    loss, count = task.loss(task(x, mask), {"x": x, "y": y, "mask": mask})
    real = mask & (y != -100)
    assert torch.equal(task.model.mask, mask)  # pyright: ignore
    assert count == real.sum() == 12
    assert torch.allclose(loss, F.cross_entropy(task(x)[real], y[real]))
    metrics: Any = task.metrics["on_val"]
    task.measure(metrics, task(x), {"x": x, "y": y, "mask": mask}, loss, count)
    assert torch.isclose(metrics["accuracy"].compute(), (task(x).argmax(-1) == y)[real].float().mean())

    targets = torch.randn(4, 5, 2, generator=generator)
    regression = RegressionTask(Tagger(2), Setting())
    loss, count = regression.loss(regression(x), {"x": x, "y": targets, "mask": mask})
    assert count == 2 * mask.sum()
    assert torch.allclose(loss, F.mse_loss(regression(x)[mask], targets[mask]))


def test_a_batch_of_another_kind_is_refused():
    task = ClassificationTask(nn.Linear(2, 2), Setting(), classes=2)
    with pytest.raises(NormzooError, match="a batch is a mapping"):
        task.training_step(torch.zeros(4, 2), 0)  # pyright: ignore


def test_answers_that_would_be_broadcast_are_refused():
    task = RegressionTask(nn.Linear(2, 1), Setting())
    with pytest.raises(NormzooError, match="broadcasting"):
        task.loss(torch.zeros(8, 1), {"x": torch.zeros(8, 2), "y": torch.zeros(8)})


# ---- pairing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["digits/mlp", "digits/cnn", "digits/resnet20", "digits/lstm", "digits/transformer",
                                  "text/transformer", "text/gru"])  # fmt: skip
def test_for_one_seed_norms_differ_in_the_norm_alone(task: str):
    setting = resolve(task, {"dropout": 0.5})
    seen = []
    for norm in NORMS:
        torch.manual_seed(len(seen))  # the global state must not matter
        try:
            built = build(task, norm, setting, seed=3)
        except NormzooError:
            assert task.startswith("text"), norm  # a norm that looks ahead, or has nothing to average over
            continue
        seen.append((norm, *fingerprint(*built)))
    assert {"batch_norm", "layer_norm", "rms_norm", "batch_renorm", "none"} <= {norm for norm, *_ in seen}
    _, weights, batches, masks = seen[0]
    assert weights
    assert masks
    for norm, *other in seen[1:]:
        assert other[0].keys() == weights.keys(), norm
        assert all(torch.equal(other[0][name], weight) for name, weight in weights.items()), norm
        assert all(torch.equal(a, b) for a, b in zip(other[1], batches, strict=True)), norm
        assert other[2].keys() == masks.keys(), norm
        assert all(torch.equal(other[2][name], mask) for name, mask in masks.items()), norm


def fingerprint(module: TrainingTask, data: Any) -> tuple[dict, list, dict]:
    """Initial weights of what is not a norm, the batches of two epochs, and the masks of two steps of dropout."""
    roles = parameter_roles(module.model)
    weights = {name: p.detach() for name, p in module.model.named_parameters() if name not in roles}
    loader = data.train_dataloader()
    batches = [batch[key] for _ in range(2) for batch in list(loader)[:3] for key in ("x", "y")]
    drops = {name: m for name, m in module.model.named_modules() if isinstance(m, Dropout)}
    masks = {f"{name}/{step}": drop(torch.ones(4, 16)) for name, drop in drops.items() for step in range(2)}
    return weights, batches, masks


def test_another_seed_changes_weights_order_and_dropout():
    setting = resolve("digits/mlp", {"dropout": 0.5})
    one, other = (fingerprint(*build("digits/mlp", "batch_norm", setting, seed=seed)) for seed in (0, 1))
    matrices = [name for name in one[0] if name.endswith("weight")]
    assert matrices
    assert not any(torch.equal(one[0][name], other[0][name]) for name in matrices)
    assert not torch.equal(one[1][0], other[1][0])
    assert not any(torch.equal(one[2][name], other[2][name]) for name in one[2])


def test_building_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    for task in ("digits/mlp", "text/transformer"):
        build(task, "layer_norm", seed=1)
        check_compatible(task, "layer_norm")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_training_twice_is_the_same_training():
    runs = []
    for state in (1, 2):
        torch.manual_seed(state)
        module, _, run = fit("digits/mlp", "batch_norm", dropout=0.3, epochs=2)
        runs.append((run.callback_metrics["val/loss"], *module.state_dict().values()))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


# ---- what does not fit -------------------------------------------------------------------------------------------


class FutureNorm(nn.Module):
    """A stranger that subtracts the mean over the sequence."""

    def __init__(self, num_features: int, channel_dim: int = 1) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(num_features))
        self.dim = 1 if channel_dim == -1 else 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.gain * x.mean(self.dim, keepdim=True)  # gain zero hides it at first


@pytest.mark.parametrize(
    "norm", ["instance_norm", "layer_norm_joint", "batch_norm(track_running_stats=False)", FutureNorm]
)
def test_a_language_model_with_a_norm_that_looks_ahead_is_refused(norm: Any):
    with pytest.raises(NormzooError, match=r"sees later symbols in evaluation .*use a norm"):
        check_compatible("text/transformer", norm)
    with pytest.raises(NormzooError, match="sees later symbols"):
        build("text/transformer", norm)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "batch_norm", "batch_renorm", "none", "torch.nn:LayerNorm"])
def test_norms_that_do_not_look_ahead_in_evaluation_are_allowed(norm: str):
    check_compatible("text/transformer", norm)
    module, _ = build("text/transformer", norm)
    if norm in ("batch_norm", "batch_renorm"):
        assert any("later positions" in note for note in module.notes), "said in the results"
    else:
        assert not module.notes


def test_inside_a_recurrence_there_is_no_later_position():
    check_compatible("text/lstm", "layer_norm_joint")
    with pytest.raises(NormzooError, match="sees later symbols"):
        check_compatible("text/lstm", "layer_norm_joint", resolve("text/lstm", {"placement": "between"}))


def test_tasks_that_read_everything_take_every_norm():
    for norm in NORMS:
        check_compatible("digits/transformer", norm)


class Leaves(nn.Module):
    def __init__(self, num_features: int) -> None:
        raise SystemExit(f"not for {num_features}")


@pytest.mark.parametrize(
    ("task", "norm", "reason"),
    [
        ("digits/cnn", "group_norm(groups=7)", r"group_norm\(groups=7\): groups=7 does not divide 32 channels"),
        ("text/lstm", "group_norm(groups=7)", ".*: groups=7 does not divide 256 channels"),
        ("digits/selu_mlp", "batch_norm", "batch_norm: SELUMLP has no norms"),
        ("digits/cnn", Leaves, "Leaves: SystemExit: not for 32"),
        ("digits/cnn", {"*": "batch_norm", "nowhere": "none"}, "{'.*nowhere.*}: unknown site"),
    ],
)
def test_a_model_that_cannot_be_built_is_told_from_a_refusal(task: str, norm: Any, reason: str):
    with pytest.raises(Unbuildable, match=f"^{task} with {reason}"):
        check_compatible(task, norm)


def test_looking_whether_a_model_looks_ahead_changes_nothing():
    module, _ = build("text/transformer", "batch_norm")
    module.model.train()
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    assert not looks_ahead(module.model)
    assert module.model.training
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())


@pytest.mark.parametrize(("task", "norm"), [("digits/cnn", "bach_norm"), ("text/lstm", "bach_norm")])
def test_unknown_norms_are_refused(task: str, norm: str):
    with pytest.raises(NormzooError, match="did you mean 'batch_norm'"):
        build(task, norm)


# ---- every task --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", list_tasks())
def test_every_listed_task_can_be_trained(task: str):
    setting = resolve(task, {"batch_size": 4})
    module, data = build(task, "batch_norm", setting)
    assert {
        "classification": ClassificationTask,
        "regression": RegressionTask,
        "language_modelling": LanguageModelTask,
    }[data.kind] is type(module)
    batch = next(iter(data.train_dataloader()))
    module.training_step(batch, 0).backward()
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    assert not missing
    assert any(isinstance(m, Norm) for m in module.modules())


def test_every_data_set_has_a_task():
    assert {name.split("/")[0] for name in list_tasks()} == set(list_data())


# ---- synchronisation ---------------------------------------------------------------------------------------------


def test_the_plugin_switches_synchronisation_on_and_back():
    model = build("digits/mlp", "batch_norm")[0].model
    norms = [m for m in model.modules() if isinstance(m, Norm)]
    norms[0].sync = True  # somebody's wish, to be kept
    plugin = NormSync()
    assert plugin.apply(model) is model
    assert all(norm.sync for norm in norms)  # pyright: ignore
    assert [m for m in model.modules() if isinstance(m, Norm)] == norms, "none is replaced"
    plugin.revert(model)
    assert [norm.sync for norm in norms] == [True] + [False] * (len(norms) - 1)  # pyright: ignore


def test_a_batch_norm_of_torch_that_cannot_be_synchronised_is_refused():
    with pytest.raises(NormzooError, match=r"'1' is torch's BatchNorm1d.*CUDA"):
        NormSync().apply(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_lightnings_plugin_is_replaced_and_other_plugins_are_kept():
    class Own(TorchSyncBatchNorm):
        pass

    for plugins, expected in ((None, NormSync), ([Own()], Own), ([NormSync()], NormSync)):
        setting = resolve("digits/mlp", SMALL["digits/mlp"])
        module, _ = build("digits/mlp", "batch_norm", setting)
        run = trainer(setting, strategy="ddp", sync_batchnorm=True, plugins=plugins)
        module.trainer = run
        module.setup("fit")
        assert type(run.strategy._layer_sync) is expected  # pyright: ignore


TWO_PROCESSES = """
    import logging, sys, warnings
    import torch
    import pytorch_lightning as pl
    from normzoo.tasks import build, resolve

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    def train(norm, processes):
        setting = resolve("digits/mlp", dict(batch_size=32 // processes, epochs=2, optimizer="sgd", lr=0.05,
                                             train_samples=128, precision="64-true", log_every=1))
        module, data = build("digits/mlp", norm, setting, seed=1)
        module.double()
        trainer = pl.Trainer(**setting.trainer_arguments(lean=True), accelerator="cpu", devices=processes, logger=False,
                             strategy="ddp_fork" if processes > 1 else "auto", sync_batchnorm=processes > 1)
        trainer.fit(module, data)
        values = [*module.model.state_dict().values()]
        values += [trainer.callback_metrics[name] for name in ("train/loss", "val/loss")]
        return [value.double() for value in values]

    for norm in ("batch_norm", "batch_renorm", "layer_norm"):
        one, two = train(norm, 1), train(norm, 2)
        worst = max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))
        assert worst < 1e-6, (norm, worst)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_two_processes_with_sync_batchnorm_train_as_one():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = textwrap.dedent(TWO_PROCESSES)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- somebody's own Trainer --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")  # it is said on large machines
@pytest.mark.parametrize("named", [True, False])
def test_a_plain_trainer_with_plain_data_and_a_plain_model(tmp_path: Path, named: bool):
    pairs = [(torch.randn(3), torch.tensor(i % 2)) for i in range(32)]
    samples = [{"x": x, "y": y} for x, y in pairs] if named else pairs
    task = ClassificationTask(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), Setting(), classes=2)
    run = pl.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, logger=False, log_every_n_steps=2,
                     enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    run.fit(task, DataLoader(samples, batch_size=8), DataLoader(samples, batch_size=8))  # pyright: ignore
    assert {"train/loss", "val/loss", "val/accuracy"} <= set(run.callback_metrics)
    assert list(tmp_path.rglob("*.ckpt")), "a user's Trainer keeps its checkpoints"


def test_a_training_resumes_from_a_checkpoint_to_the_same_end(tmp_path: Path):
    setting = resolve("digits/mlp", SMALL["digits/mlp"] | {"epochs": 4, "dropout": 0.2})
    straight, data = build("digits/mlp", "batch_norm", setting)
    trainer(setting).fit(straight, data)

    broken, data = build("digits/mlp", "batch_norm", setting)
    half = trainer(setting, callbacks=[Stop(after=2)])
    half.fit(broken, data)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, data = build("digits/mlp", "batch_norm", setting, seed=0)
    trainer(setting).fit(resumed, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for (name, one), other in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


class Stop(pl.Callback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.after


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # W&B's own
def test_it_logs_to_weights_and_biases_from_a_plain_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    setting = resolve("digits/mlp", SMALL["digits/mlp"] | {"epochs": 2, "log_every": 2})
    module, data = build("digits/mlp", "batch_norm", setting)
    with wandb.init(
        project="normzoo-test", mode="offline", dir=tmp_path, settings=wandb.Settings(x_disable_stats=True)
    ) as run:
        trainer(setting, logger=WandbLogger(experiment=run)).fit(module, data)
    (path,) = tmp_path.rglob("*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    rows = [row for row in map(history, done.stdout.splitlines()) if row]
    blocks = {int(row["trainer/global_step"]): row["train/loss"] for row in rows if "train/loss" in row}
    epochs = [row for row in rows if "val/accuracy" in row]
    assert set(blocks) == {1, 3, 5, 7}, "one row for each block of two steps"
    assert all(0 < loss < 4 for loss in blocks.values())
    assert [int(row["epoch"]) for row in epochs] == [0, 1]
    assert all({"val/loss", "val/accuracy"} <= row.keys() for row in epochs)


def history(line: str) -> dict[str, Any]:
    """The metrics of a record, if it is one of a history."""
    record = json.loads(line)
    return record.get("history", {}).get("item", {})
