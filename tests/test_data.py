from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normzoo.data import configure_data, create_data, data_info, list_data
from normzoo.data.base import IGNORED
from normzoo.data.digits import Digits, split
from normzoo.data.loader import TensorLoader
from normzoo.data.text import ALPHABET, Text, corpus, decode, encode
from normzoo.errors import NormzooError

PAIRS = [(name, family) for name in list_data() for family in data_info(name).families]


def indices(loader: TensorLoader) -> list[list[int]]:
    return [batch["x"].tolist() for batch in loader]


def flat(lists: Iterable[Iterable[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def numbered(count: int) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(count), "y": torch.arange(count) * 10}


# ---- the loader --------------------------------------------------------------------------------------------------


def test_the_order_depends_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    one = TensorLoader(numbered(50), 8, shuffle=True, seed=3)
    first, second = indices(one), indices(one)
    torch.manual_seed(2)
    torch.rand(7)
    other = TensorLoader(numbered(50), 8, shuffle=True, seed=3)
    assert indices(other) == first
    assert indices(other) == second
    assert first != second
    assert indices(TensorLoader(numbered(50), 8, shuffle=True, seed=4)) != first
    other.set_epoch(0)
    assert indices(other) == first


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    indices(TensorLoader(numbered(50), 8, shuffle=True))
    for name, family in PAIRS:
        create_data(name, family=family, batch_size=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_batches_are_complete_and_rows_stay_together():
    loader = TensorLoader(numbered(50), 8, shuffle=True)
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    assert all(len(batch["x"]) == 8 for batch in batches)
    assert all(torch.equal(batch["y"], batch["x"] * 10) for batch in batches)
    seen = torch.cat([batch["x"] for batch in batches]).tolist()
    assert len(set(seen)) == 48


def test_a_part_of_the_data_is_drawn_anew_in_every_epoch():
    loader = TensorLoader(numbered(1000), 8, shuffle=True, samples=80)
    first, second = (set(flat(indices(loader))) for _ in range(2))
    assert len(loader) == 10
    assert len(first) == len(second) == 80
    assert len(first & second) < 40


@given(count=st.integers(1, 60), batch_size=st.integers(1, 9), world=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_evaluation_meets_every_sample_once_whatever_the_number_of_processes(count: int, batch_size: int, world: int):
    if count < world:
        with pytest.raises(NormzooError, match="cannot be shared"):
            TensorLoader(numbered(count), batch_size, rank=0, world=world)
        return
    shares = [indices(TensorLoader(numbered(count), batch_size, rank=rank, world=world)) for rank in range(world)]
    assert sorted(flat(flat(shares))) == list(range(count))
    assert len({len(share) for share in shares}) == 1, "a rank with fewer batches would leave the others waiting"
    assert all(batch for share in shares for batch in share), "an empty batch has no statistics"


@given(count=st.integers(1, 60), batch_size=st.integers(1, 5), world=st.integers(1, 4), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_processes_together_see_the_batch_of_one_process(count: int, batch_size: int, world: int, epoch: int):
    if count < batch_size * world:
        with pytest.raises(NormzooError, match="smaller batch_size"):
            TensorLoader(numbered(count), batch_size, shuffle=True, world=world)
        return
    whole = TensorLoader(numbered(count), batch_size * world, shuffle=True)
    ranks = [TensorLoader(numbered(count), batch_size, shuffle=True, rank=rank, world=world) for rank in range(world)]
    for loader in (whole, *ranks):
        loader.set_epoch(epoch)
    together = [flat(parts) for parts in zip(*(indices(rank) for rank in ranks), strict=True)]
    assert together == indices(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 2, "rank": 2, "world": 2}, "rank must be"),
        ({"batch_size": 2, "samples": 4}, "shuffle=True"),
        ({"batch_size": 11, "shuffle": True}, "there are 10"),
    ],
)
def test_the_loader_refuses(arguments: dict, message: str):
    with pytest.raises(NormzooError, match=message):
        TensorLoader(numbered(10), **arguments)
    with pytest.raises(NormzooError, match="same first dimension"):
        TensorLoader({"x": torch.zeros(3), "y": torch.zeros(4)}, 1)


# ---- all data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_data_keep_their_promises(name: str, family: str):
    data = create_data(name, family=family, batch_size=16, seed=5)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert tuple(batch["x"].shape[1:]) == data.inputs.shape
        assert batch["x"].is_floating_point() == (data.inputs.vocabulary == 0)
        if data.kind == "regression":
            assert batch["y"].shape == (len(batch["x"]), data.outputs)
        else:
            assert batch["y"].shape == (batch["x"].shape if data.inputs.per_position else batch["x"].shape[:1])
            asked = batch["y"][batch["y"] != IGNORED]
            assert 0 <= asked.min() <= asked.max() < data.outputs
        if data.inputs.vocabulary:
            assert 0 <= batch["x"].min() <= batch["x"].max() < data.inputs.vocabulary
    assert data.facts["val_samples"] >= 200, "too few to choose by"
    assert data.facts["test_samples"] >= 200


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_the_seed_decides_the_order_and_nothing_else(name: str, family: str):
    one, other = (create_data(name, family=family, batch_size=16, seed=seed) for seed in (0, 1))
    for part in ("train", "val", "test"):
        for key, tensor in getattr(one.parts, part).items():
            assert torch.equal(tensor, getattr(other.parts, part)[key])
    batches = [next(iter(data.train_dataloader()))["x"] for data in (one, other, one)]
    assert torch.equal(batches[0], batches[2])
    assert not torch.equal(batches[0], batches[1])


@pytest.mark.parametrize("name", list_data())
def test_no_training_sample_is_evaluated_on(name: str):
    parts = create_data(name, family=data_info(name).families[0], batch_size=16).parts
    if name == "text":  # windows are views: their characters must not overlap
        spans = [
            (part["x"].data_ptr(), part["x"].data_ptr() + 8 * (part["x"].stride(0) * (len(part["x"]) - 1) + 64))
            for part in (parts.train, parts.val, parts.test)
        ]
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
        return
    rows = [{tuple(row) for row in part["x"].flatten(1).tolist()} for part in (parts.train, parts.val, parts.test)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not rows[one] & rows[other]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, "did you mean 'digits'"),
        ("zzz", {}, "known: adding, digits, recall, text"),
        ("adding", {"lenght": 30}, "did you mean 'length'"),
        ("adding", {"length": 3}, "at least 4; got 3"),
        ("adding", {"length": 30.0}, "whole number"),
        ("adding", {"train_samples": True}, "whole number"),
        ("recall", {"vocabulary": 6}, "even vocabulary of at least 8"),
        ("recall", {"vocabulary": 17}, "even vocabulary"),
        ("recall", {"queries": 5}, "more than pairs=4"),
        ("digits", {"size": 2}, "at least 4"),
        ("digits", {"train_samples": 0}, "at least 1"),
        ("text", {"length": 1}, "at least 2"),
    ],
)
def test_bad_names_and_options_are_refused(name: str, options: dict, message: str):
    with pytest.raises(NormzooError, match=message):
        configure_data(name, **options)


def test_tensors_that_cannot_be_made_are_refused():
    with pytest.raises(NormzooError, match="patches of 3"):
        create_data("digits", family="transformer", batch_size=8, patch=3)
    with pytest.raises(NormzooError, match="there are only 1085"):
        create_data("digits", family="cnn", batch_size=8, train_samples=2000)
    with pytest.raises(NormzooError, match="no view for models of family 'cnn'"):
        create_data("text", family="cnn", batch_size=8)
    with pytest.raises(NormzooError, match="another text"):
        create_data("text", family="rnn", batch_size=8, text_hash="0" * 16)
    with pytest.raises(NormzooError, match="does not fit"):
        create_data("text", family="rnn", batch_size=8, length=200_000)


# ---- digits ------------------------------------------------------------------------------------------------------


def test_digits_are_split_by_class_disjoint_and_whole():
    from sklearn.datasets import load_digits

    label = torch.tensor(load_digits().target)
    parts = split(label)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1797))
    for part, share in zip(parts, (0.6, 0.2, 0.2), strict=True):
        counts = torch.bincount(label[part], minlength=10)
        assert torch.all((counts - share * torch.bincount(label)).abs() < 1.5)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    original = load_digits()
    train, _, test = split(torch.tensor(original.target))
    pixels = torch.tensor(original.images, dtype=torch.float32)
    parts = Digits().parts("cnn")
    expected = (pixels - pixels[train].mean()) / pixels[train].std()
    assert torch.allclose(parts.test["x"].squeeze(1), expected[test], atol=1e-6)
    assert torch.equal(parts.test["y"], torch.tensor(original.target)[test])


def test_digits_are_scaled_by_the_training_part_alone():
    parts = Digits().parts("mlp")
    assert abs(parts.train["x"].mean()) < 1e-6
    assert abs(parts.train["x"].std() - 1) < 1e-6
    assert abs(parts.test["x"].mean()) > 1e-6


def test_all_views_show_the_same_image():
    image, flat, rows, patches = (Digits().parts(f).val["x"] for f in ("cnn", "mlp", "rnn", "transformer"))
    assert torch.equal(image.flatten(1), flat)
    assert torch.equal(image.squeeze(1), rows)
    assert torch.equal(image[:, 0, 2:4, 4:6].flatten(1), patches[:, 4 * 1 + 2])


@pytest.mark.parametrize("size", [28, 32])
def test_digits_of_another_size_are_still_digits(size: int):
    small, large = Digits().parts("cnn").train["x"], Digits(size=size).parts("cnn").train["x"]
    assert large.shape[1:] == (1, size, size)
    shrunk = torch.nn.functional.interpolate(large, size=(8, 8), mode="area")
    assert torch.corrcoef(torch.stack([small.flatten(), shrunk.flatten()]))[0, 1] > 0.9


def test_fewer_digits_stay_balanced_and_evaluation_stays():
    few, all_of_them = Digits(train_samples=50).parts("mlp"), Digits().parts("mlp")
    assert torch.bincount(few.train["y"]).tolist() == [5] * 10
    assert torch.equal(few.test["y"], all_of_them.test["y"])


# ---- the adding problem ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", [False, True])
def test_the_sum_of_the_marked_values(variable: bool):
    part = configure_data("adding", length=21, variable=variable, train_samples=3000).parts("rnn").train
    value, marker = part["x"].unbind(-1)
    assert torch.allclose((value * marker).sum(1, keepdim=True), part["y"])
    assert torch.all(marker.sum(1) == 2)
    mask = part.get("mask", torch.ones_like(value, dtype=torch.bool))
    half = (mask.sum(1) // 2).unsqueeze(1)
    early = torch.arange(21) < half
    assert torch.all((marker * early).sum(1) == 1), "one marker in each half of what is real"
    assert torch.all(part["x"][~mask] == 0)
    assert value[mask].min() >= 0
    assert value[mask].max() <= 1


def test_lengths_vary_only_when_asked():
    mask = configure_data("adding", length=20, variable=True).parts("rnn").train["mask"]
    length = mask.sum(1)
    assert set(length.tolist()) == set(range(10, 21))
    assert torch.equal(mask, torch.arange(20) < length.unsqueeze(1)), "padding is at the end"
    assert "mask" not in configure_data("adding", length=20).parts("rnn").train


def test_answering_the_mean_has_an_error_of_one_sixth():
    y = configure_data("adding", train_samples=40_000, length=4).parts("rnn").train["y"]
    assert abs((y - 1).square().mean() - 1 / 6) < 0.005


# ---- associative recall ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"pairs": 6, "queries": 3, "vocabulary": 20}, {"pairs": 1, "vocabulary": 2}])
def test_whoever_remembers_answers_everything(options: dict):
    data = configure_data("recall", train_samples=300, **options)
    part = data.parts("transformer").train
    pairs = data.pairs
    for x, y in zip(part["x"].tolist(), part["y"].tolist(), strict=True):
        memory = dict(zip(x[: 2 * pairs : 2], x[1 : 2 * pairs : 2], strict=True))
        assert len(memory) == pairs, "keys differ"
        assert all(target == IGNORED for target in y[: 2 * pairs])
        assert [memory[key] for key in x[2 * pairs :]] == y[2 * pairs :]
        assert max(memory) < data.vocabulary / 2 <= min(memory.values())


def test_the_keys_alone_do_not_give_the_answer_away():
    part = configure_data("recall", train_samples=8000).parts("rnn").train
    asked = part["y"] != IGNORED
    joint = torch.zeros(8, 8).index_put_((part["x"][asked], part["y"][asked] - 8), torch.tensor(1.0), accumulate=True)
    assert (joint / joint.sum(1, keepdim=True)).max() < 0.2


# ---- text --------------------------------------------------------------------------------------------------------


def test_text_is_english_and_its_symbols_can_be_read_back():
    text = corpus()
    assert len(text) > 300_000
    assert decode(encode(text[:2000])) == text[:2000]
    assert decode(encode("naïve “quotes” – ☃\n")) == 'na?ve "quotes" - ?\n'
    counts = torch.bincount(encode(text), minlength=len(ALPHABET)).double()
    share = counts / counts.sum()
    entropy = -(share * share.clamp(min=1e-12).log2()).sum()
    assert 4 < entropy < 5 < math.log2(len(ALPHABET)), "bits a character, by frequency alone"
    assert "the statement" in text


def test_targets_are_the_next_characters_in_every_part():
    parts = Text(length=32).parts("transformer")
    for part in (parts.train, parts.val, parts.test):
        assert torch.equal(part["x"][:50, 1:], part["y"][:50, :-1])
    assert torch.equal(parts.val["y"][:-1, -1], parts.val["x"][1:, 0]), "evaluation windows follow each other"


def test_a_result_is_filed_under_its_text():
    found = Text().concrete()
    assert found.text_hash is not None
    assert Text().concrete() == found
    facts = create_data("text", family="rnn", batch_size=8, text_hash=found.text_hash).facts
    assert facts["text_sha256"] == found.text_hash
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["train_samples"] == 4096


def test_describing_data_needs_no_lightning():
    script = (
        "import sys, normzoo.data as d; [d.configure_data(n).concrete() for n in d.list_data()]; "
        "assert 'pytorch_lightning' not in sys.modules and 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
