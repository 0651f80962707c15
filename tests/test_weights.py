from __future__ import annotations

import copy
import functools
import inspect
import math
import pickle
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from normzoo.errors import NormzooError, OptionError
from normzoo.models import Inputs, create_model
from normzoo.registry import create
from normzoo.weights import (
    Filters,
    Reparametrization,
    apply_weight_norm,
    create_weight_norm,
    data_dependent_init,
    list_weight_norms,
    register_weight_norm,
    remove_weight_norm,
    weight_norm_info,
    weight_norms,
)
from normzoo.weights import registry as weights_registry
from normzoo.weights.standardization import activation_gain

MEMBERS = [name for name in list_weight_norms() if not name.endswith("_example")]
SPECTRAL = ["mean_spectral_norm", "sigma_reparam", "spectral_norm"]
WEIGHTS_ONLY = [name for name in MEMBERS if name not in ("cosine_norm", "mean_spectral_norm")]

LAYERS = {
    "linear": (lambda **k: nn.Linear(7, 4, **k), (5, 7)),
    "linear_wide": (lambda **k: nn.Linear(4, 7, **k), (2, 5, 4)),
    "conv1d": (lambda **k: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular", **k), (2, 3, 9)),
    "conv2d": (lambda **k: nn.Conv2d(3, 4, (3, 2), stride=2, padding="valid", bias=False, **k), (2, 3, 8, 7)),
    "conv2d_grouped": (lambda **k: nn.Conv2d(6, 8, 3, padding=1, groups=2, dilation=1, **k), (2, 6, 5, 5)),
    "conv2d_depthwise": (lambda **k: nn.Conv2d(4, 4, 3, groups=4, **k), (2, 4, 6, 6)),
    "conv3d": (lambda **k: nn.Conv3d(2, 3, 2, **k), (2, 2, 4, 4, 4)),
    "transposed1d": (lambda **k: nn.ConvTranspose1d(3, 5, 3, stride=2, **k), (2, 3, 6)),
    "transposed2d_grouped": (lambda **k: nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, **k), (2, 6, 4, 4)),
    "transposed3d": (lambda **k: nn.ConvTranspose3d(2, 3, 2, **k), (2, 2, 3, 3, 3)),
}


def layer_of(kind, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    return LAYERS[kind][0](dtype=dtype)


def input_of(kind, dtype=torch.float64, seed=1):
    return torch.randn(LAYERS[kind][1], dtype=dtype, generator=torch.Generator().manual_seed(seed))


def cases(members=MEMBERS, kinds=tuple(LAYERS)):
    """Each member on each layer that it is for."""
    return [
        pytest.param(member, kind, id=f"{member}-{kind}")
        for member in members
        for kind in kinds
        if not (member == "cosine_norm" and kind.startswith("transposed"))
    ]


def norm_of(layer, parameter="weight") -> Reparametrization:
    return weight_norms(layer)[parameter]


def original(layer) -> Tensor:
    return layer.parametrizations.weight.original


def filters_of(layer, weight) -> list[tuple[int, np.ndarray]]:
    """The weights that make each output channel, and its group, by the definition of the layers and nothing else."""
    w = np.asarray(weight.detach())
    groups = getattr(layer, "groups", 1)
    found = []
    for o in range(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels):
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            per = layer.out_channels // groups
            inputs = layer.in_channels // groups
            g = o // per
            found.append((g, w[g * inputs : (g + 1) * inputs, o % per].ravel()))
        else:
            found.append((o * groups // len(w), w[o].ravel()))
    return found


# ---- the registry ----------------------------------------------------------------------------------------------------


def test_the_members():
    assert {
        "centred_weight_norm", "cosine_norm", "mean_spectral_norm", "orthogonal_norm", "scaled_weight_standardization",
        "sigma_reparam", "spectral_norm", "weight_norm", "weight_standardization",
    } <= set(list_weight_norms())  # fmt: skip
    assert list_weight_norms("*standardization") == ["scaled_weight_standardization", "weight_standardization"]


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_is_documented(name):
    info = weight_norm_info(name)
    doc = inspect.cleandoc(info.norm.__doc__ or "")
    for section in ("Shape:", "Raises:", "Example:", "Deviations:", "Reference:"):
        assert f"\n{section}\n" in doc
    assert info.summary.endswith(".")
    assert "=" in info.formula
    assert info.paper is not None
    reference = doc.partition("Reference:")[2]
    assert str(info.paper.year) in reference
    assert (info.paper.arxiv or info.paper.venue or "nowhere") in reference
    assert " ".join(info.paper.title.split()) in " ".join(reference.split())
    for option in info.options:
        assert f"    {option}: " in doc
    assert info.source.partition(":")[0].endswith(".py")


def test_what_no_formula_of_its_paper_confirms_is_contrib():
    assert [name for name in MEMBERS if weight_norm_info(name).contrib] == ["mean_spectral_norm"]


def test_look_up_folds_names_and_knows_aliases():
    filters = Filters((4, 3))
    for spec in ("Spectral-Norm", "SPECTRALNORM", "sn", " spectral_norm( iterations = 3 ) "):
        assert type(create_weight_norm(spec, filters)).__name__ == "SpectralNorm"
    assert create_weight_norm("sn(iterations=3)", filters).iterations == 3
    assert "sn" in weight_norm_info("spectral_norm").aliases
    assert weight_norm_info("spectral_norm").options == {"iterations": 1, "eps": 1e-12}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spectral_nrom", "unknown weight norm 'spectral_nrom'; did you mean 'spectral_norm'"),
        ("zzz", "known: .*weight_standardization"),
        ("spectral_norm(iteration=3)", "spectral_norm has no option 'iteration'; did you mean 'iterations'"),
        ("spectral_norm(3)", "cannot read the options"),
        ("spectral_norm(iterations=open('x'))", "cannot read the options"),
        ("spectral_norm(iterations=0)", "iterations=0; expected a positive whole number"),
        ("spectral_norm(eps=0)", "eps=0; expected a positive number"),
        ("weight_standardization(variant='offical')", "expected 'paper' or 'official'"),
        ("weight_standardization(eps=-1)", "expected a number that is not negative"),
        ("scaled_weight_standardization(activation='relo')", "unknown activation 'relo'; did you mean 'relu'"),
        ("centred_weight_norm(scale=0)", "scale=0; expected a positive number"),
        ("torch.nn:Linear", "no weight norm|made|has no option|needs the option"),
        ("no_such_module:Thing", "there is no module"),
    ],
)
def test_bad_specs_are_refused_with_a_hint(spec, message):
    layer = nn.Linear(4, 3)
    with pytest.raises(NormzooError, match=message):
        apply_weight_norm(layer, spec)
    assert type(layer) is nn.Linear


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError):
        apply_weight_norm(nn.Linear(2, 2), "weight_norm(iterations=1)")
    with pytest.raises(OptionError):
        apply_weight_norm(nn.Linear(2, 2), "weight_norm(iterations=1)")


def test_a_users_weight_norm_is_a_formula(tmp_path, monkeypatch):
    for table in ("_weight_norms", "_names"):
        monkeypatch.setattr(weights_registry, table, dict(getattr(weights_registry, table)))
    file = tmp_path / "mine.py"
    file.write_text(
        textwrap.dedent("""
        from normzoo.weights import Reparametrization, register_weight_norm

        @register_weight_norm("mass_norm", aliases=("mass",))
        class MassNorm(Reparametrization):
            "Divide each filter by the sum of its absolute weights."
            def __init__(self, filters, *, power=1.0):
                super().__init__(filters)
                self.power = power
            def formula(self, rows):
                return rows / rows.abs().sum(-1, keepdim=True) ** self.power
        """)
    )
    for spec in (f"{file}:MassNorm", f"{file}:MassNorm(power=1.0)", "mass_norm", "Mass"):
        layer = apply_weight_norm(layer_of("transposed2d_grouped"), spec)
        for _, w in filters_of(layer, layer.weight):
            assert np.abs(w).sum() == pytest.approx(1)
    cls = weight_norm_info("mass_norm").norm
    assert not apply_weight_norm(nn.Linear(3, 2), functools.partial(cls, power=0.0)).weight.isnan().any()
    with pytest.raises(NormzooError, match="taken by the weight norm 'spectral_norm'"):
        register_weight_norm("Spectral_Norm", cls)
    with pytest.raises(NormzooError, match="is no name"):
        register_weight_norm("my norm", cls)


# ---- where they go ---------------------------------------------------------------------------------------------------


def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Sequential(nn.Linear(16, 5), nn.Linear(5, 2))
    )


def test_only_chooses_layers_by_their_names():
    assert list(weight_norms(apply_weight_norm(net(), "weight_norm"))) == ["0.weight", "4.0.weight", "4.1.weight"]
    assert list(weight_norms(apply_weight_norm(net(), "weight_norm", only="4.*"))) == ["4.0.weight", "4.1.weight"]
    assert list(weight_norms(apply_weight_norm(net(), "weight_norm", only=["0", "*.1.weight"]))) == [
        "0.weight", "4.1.weight",
    ]  # fmt: skip
    model = net()
    with pytest.raises(NormzooError, match=r"unknown layer '4\.2'; did you mean"):
        apply_weight_norm(model, "weight_norm", only=["0", "4.2"])
    assert not weight_norms(model)
    mixed = apply_weight_norm(apply_weight_norm(net(), "spectral_norm", only="0"), "weight_norm", only="4.*")
    assert [type(n).__name__ for n in weight_norms(mixed).values()] == ["SpectralNorm", "WeightNorm", "WeightNorm"]
    remove_weight_norm(mixed, only="4.*")
    assert list(weight_norms(mixed)) == ["0.weight"]


def test_what_cannot_be_normalised_is_refused_and_left_as_it_was():
    with pytest.raises(NormzooError, match="has no linear map, convolution or recurrent cell"):
        apply_weight_norm(nn.LSTM(2, 3), "weight_norm")
    layer = apply_weight_norm(nn.Linear(3, 2), "weight_norm")
    with pytest.raises(NormzooError, match="'weight' has WeightNorm already; remove that first"):
        apply_weight_norm(layer, "spectral_norm")
    with pytest.raises(NormzooError, match="no weight norm to remove"):
        remove_weight_norm(nn.Linear(3, 2))
    with pytest.raises(NormzooError, match="run a batch through a lazy layer first"):
        apply_weight_norm(nn.LazyLinear(3), "weight_norm")
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "other": nn.Linear(3, 3)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(NormzooError, match=r"'head.weight' are shared"):
        apply_weight_norm(tied, "weight_norm")
    assert not weight_norms(tied)
    apply_weight_norm(tied, "weight_norm", only="other")
    for member in ("cosine_norm", "mean_spectral_norm"):
        with pytest.raises(NormzooError, match="changes the output"):
            apply_weight_norm(nn.LSTMCell(2, 3), member)
    with pytest.raises(NormzooError, match="transposed"):
        apply_weight_norm(nn.ConvTranspose1d(2, 3, 3), "cosine_norm")


@pytest.mark.parametrize("member", MEMBERS)
def test_weights_that_would_never_learn_are_refused(member):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[1].weight)
    with pytest.raises(NormzooError, match=r"'1.weight' zero, and they would never learn"):
        apply_weight_norm(model, member)
    assert not weight_norms(model)


@pytest.mark.parametrize("member", ["centred_weight_norm", "orthogonal_norm", "scaled_ws", "weight_standardization"])
def test_a_filter_of_one_weight_cannot_be_centred(member):
    with pytest.raises(NormzooError, match="single number for each output"):
        apply_weight_norm(nn.Linear(1, 8), member)
    with pytest.raises(NormzooError, match="single number for each output"):
        apply_weight_norm(nn.Conv2d(4, 4, 1, groups=4), member)


def test_recurrent_cells_are_normalised_at_both_matrices():
    cell = apply_weight_norm(nn.LSTMCell(3, 4), "weight_norm")
    plain = copy.deepcopy(cell)
    remove_weight_norm(plain)
    assert list(weight_norms(cell)) == ["weight_ih", "weight_hh"]
    x = torch.randn(2, 3)
    torch.testing.assert_close(cell(x), plain(x))
    one = apply_weight_norm(nn.GRUCell(3, 4), "spectral_norm", only="weight_hh")
    assert list(weight_norms(one)) == ["weight_hh"]
    assert list(weight_norms(copy.deepcopy(one))) == ["weight_hh"]
    assert type(remove_weight_norm(one)) is nn.GRUCell


def test_attention_reads_its_normalised_projection():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    apply_weight_norm(attention, "spectral_norm", only="out_proj").eval()
    plain = remove_weight_norm(copy.deepcopy(attention))
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(attention(x, x, x)[0], plain(x, x, x)[0])


def test_the_parameter_stays_the_one_that_the_optimizer_has():
    for member in MEMBERS:
        layer = nn.Linear(4, 3)
        parameter = layer.weight
        apply_weight_norm(layer, member)
        assert original(layer) is parameter
        if member != "cosine_norm":
            assert remove_weight_norm(layer).weight is parameter


def test_frozen_weights_have_frozen_gains():
    layer = nn.Linear(4, 3)
    layer.weight.requires_grad_(False)
    apply_weight_norm(layer, "weight_norm")
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]


# ---- closed forms ----------------------------------------------------------------------------------------------------


def check_filters(member, kind, closed, *, setup=None):
    """Value and gradient of every filter against ``closed(w, upstream) -> (value, gradient)``."""
    layer = apply_weight_norm(layer_of(kind), member)
    if setup is not None:
        setup(layer)
    upstream = torch.randn(layer.weight.shape, dtype=torch.float64)
    value = layer.weight
    value.backward(upstream)
    learned, got, up, grad = (filters_of(layer, t) for t in (original(layer), value, upstream, original(layer).grad))
    for o, ((_, w), (_, y), (_, g), (_, d)) in enumerate(zip(learned, got, up, grad, strict=True)):
        want, want_grad = closed(w, g, o)
        np.testing.assert_allclose(y, want, rtol=0, atol=1e-10)
        np.testing.assert_allclose(d, want_grad, rtol=0, atol=1e-10)
    return layer, value, upstream


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_norm_is_the_papers_formula(kind):
    gains = np.random.default_rng(0).uniform(0.5, 2, 8)

    def setup(layer):
        norm_of(layer).gain.data = torch.tensor(gains[: norm_of(layer).filters.outputs])

    def closed(v, up, o):
        g, n = gains[o], np.linalg.norm(v)
        grad_g = up @ v / n  # equation 3 of the paper
        return g * v / n, g / n * up - g * grad_g / n**2 * v

    layer, value, upstream = check_filters("weight_norm", kind, closed, setup=setup)
    for o, ((_, v), (_, up)) in enumerate(
        zip(filters_of(layer, original(layer)), filters_of(layer, upstream), strict=True)
    ):
        assert norm_of(layer).gain.grad[o].item() == pytest.approx(up @ v / np.linalg.norm(v), abs=1e-10)
    for o, (_, w) in enumerate(filters_of(layer, value)):
        assert np.linalg.norm(w) == pytest.approx(gains[o], abs=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_centred_weight_norm_is_the_papers_formula(kind):
    def closed(v, up, o):
        c = v - v.mean()
        n = np.linalg.norm(c)
        unit = c / n
        grad = 1.5 * (up - unit * (unit @ up)) / n
        return 1.5 * unit, grad - grad.mean()

    layer, value, _ = check_filters("centred_weight_norm(scale=1.5)", kind, closed)
    for _, w in filters_of(layer, value):
        assert abs(w.sum()) < 1e-12
        assert np.linalg.norm(w) == pytest.approx(1.5)


def test_centred_weight_norm_starts_where_asked():
    layer = nn.Linear(6, 3)
    before = layer.weight.detach().clone()
    apply_weight_norm(layer, "centred_weight_norm")
    torch.testing.assert_close(layer.weight, before - before.mean(1, keepdim=True))
    fixed = apply_weight_norm(nn.Linear(6, 3), "centred_weight_norm(scale=1.414, learned=False)")
    assert [name for name, _ in fixed.named_parameters()] == ["bias", "parametrizations.weight.original"]
    torch.testing.assert_close(fixed.weight.norm(dim=1), torch.full((3,), 1.414))
    assert "parametrizations.weight.0.gain" in fixed.state_dict()


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_standardization_is_the_papers_formula(kind):
    def closed(w, up, o):
        n, c = len(w), w - w.mean()
        sigma = math.sqrt((c**2).mean() + 1e-3)
        return c / sigma, (up - up.mean()) / sigma - c * (up @ c) / (n * sigma**3)

    check_filters("weight_standardization(eps=1e-3)", kind, closed)


def test_weight_standardization_official_is_the_authors_code():
    layer = apply_weight_norm(layer_of("conv2d"), "weight_standardization(variant='official')")
    weight = original(layer)
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    want = centred / (centred.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
    torch.testing.assert_close(layer.weight, want, rtol=0, atol=1e-12)
    paper = apply_weight_norm(layer_of("conv2d"), "weight_standardization")
    assert (layer.weight - paper.weight).abs().max() > 1e-3


@pytest.mark.parametrize("kind", LAYERS)
def test_scaled_weight_standardization_is_the_papers_formula(kind):
    gamma = math.sqrt(2 / (1 - 1 / math.pi))
    gains = np.random.default_rng(0).uniform(0.5, 2, 8)

    def setup(layer):
        norm_of(layer).gain.data = torch.tensor(gains[: norm_of(layer).filters.outputs])

    def closed(w, up, o):
        n, c = len(w), w - w.mean()
        s, a = math.sqrt(n * w.var()), gamma * gains[o]
        return a * c / s, a * ((up - up.mean()) / s - c * (up @ c) / s**3)

    check_filters("scaled_weight_standardization(activation='relu', eps=0)", kind, closed, setup=setup)


def test_scaled_weight_standardization_bounds_small_variances():
    weight = torch.tensor([[1e-4, -1e-4, 0.0]], dtype=torch.float64)
    norm = create_weight_norm("scaled_weight_standardization(gain=False)", Filters((1, 3), dtype=torch.float64))
    torch.testing.assert_close(norm(weight), weight / 1e-2, rtol=0, atol=1e-14)  # the root of eps=1e-4
    assert not list(norm.parameters())


@pytest.mark.parametrize(("name", "value"), [("relu", 1.7139588594436646), ("gelu", 1.7015043497085571),
                                            ("silu", 1.7881293296813965), ("tanh", 1.5939117670059204)])  # fmt: skip
def test_activation_gains_are_those_of_the_authors_table(name, value):
    # theirs are estimates from samples: ReLU's has a closed form
    assert activation_gain(name) == pytest.approx(value, rel=1e-3)
    assert activation_gain("relu") == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), rel=1e-7)


def blocks(layer, weight) -> list[np.ndarray]:
    """The matrix of each group."""
    found = filters_of(layer, weight)
    return [np.stack([w for h, w in found if h == g]) for g in range(getattr(layer, "groups", 1))]


@pytest.mark.parametrize("kind", LAYERS)
def test_spectral_norm_is_one_and_has_the_papers_gradient(kind):
    layer = apply_weight_norm(layer_of(kind), "spectral_norm(iterations=200)")
    layer.weight  # noqa: B018  # reading takes the step
    matrices = blocks(layer, original(layer))
    sigmas = [np.linalg.svd(m)[1][0] for m in matrices]
    sigma, top = max(sigmas), int(np.argmax(sigmas))
    upstream = torch.randn_like(layer.weight)
    value = layer.weight
    value.backward(upstream)
    u, _, vh = np.linalg.svd(matrices[top])
    inner = sum((a * b).sum() for a, b in zip(blocks(layer, upstream), matrices, strict=True))
    rows = zip(
        blocks(layer, value), matrices, blocks(layer, upstream), blocks(layer, original(layer).grad), strict=True
    )
    for g, (got, w, up, grad) in enumerate(rows):
        np.testing.assert_allclose(got, w / sigma, rtol=0, atol=1e-10)
        want = up / sigma - (g == top) * inner / sigma**2 * np.outer(u[:, 0], vh[0])
        np.testing.assert_allclose(grad, want, rtol=0, atol=1e-9)
    assert max(np.linalg.svd(m)[1][0] for m in blocks(layer, value)) == pytest.approx(1, abs=1e-12)
    if kind == "linear":
        assert torch.linalg.svdvals(value)[0].item() == pytest.approx(1, abs=1e-12)


def test_spectral_norm_of_a_grouped_convolution_is_that_of_the_operator():
    layer = apply_weight_norm(nn.Conv2d(6, 8, 1, groups=2, bias=False, dtype=torch.float64), "sn(iterations=300)")
    layer(torch.zeros(1, 6, 1, 1, dtype=torch.float64))
    operator = torch.func.jacrev(lambda x: layer.eval()(x.view(1, 6, 1, 1)).flatten())(torch.zeros(6).double())
    assert torch.linalg.svdvals(operator)[0].item() == pytest.approx(1, abs=1e-10)


def test_the_estimate_is_good_when_applied():
    layer = nn.Linear(256, 256)
    sigma = torch.linalg.svdvals(layer.weight.detach())[0]
    apply_weight_norm(layer, "spectral_norm").eval()
    torch.testing.assert_close(original(layer) / layer.weight, sigma.expand(256, 256), rtol=2e-3, atol=0)


def test_sigma_reparam_is_a_scale_over_the_spectral_norm():
    layer = apply_weight_norm(layer_of("linear"), "sigma_reparam(iterations=100)")
    norm = norm_of(layer)
    assert norm.scale.shape == ()
    assert norm.scale.item() == 1
    norm.scale.data.fill_(2.5)
    w = original(layer).detach().numpy()
    u, s, vh = np.linalg.svd(w)
    upstream = torch.randn_like(layer.weight)
    value = layer.weight
    value.backward(upstream)
    np.testing.assert_allclose(value.detach(), 2.5 * w / s[0], atol=1e-10)
    up = upstream.numpy()
    np.testing.assert_allclose(
        original(layer).grad, 2.5 * (up / s[0] - (up * w).sum() / s[0] ** 2 * np.outer(u[:, 0], vh[0])), atol=1e-9
    )
    assert norm.scale.grad.item() == pytest.approx((up * w).sum() / s[0], abs=1e-10)


def test_sigma_reparam_official_starts_without_a_change():
    for kind in ("linear", "conv2d_grouped"):
        layer = layer_of(kind)
        before = layer.weight.detach().clone()
        apply_weight_norm(layer, "sigma_reparam(variant='official')").eval()
        torch.testing.assert_close(layer.weight, before)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("centred", [True, False])
def test_orthogonal_norm_is_the_inverse_root_in_the_end(kind, centred):
    layer = apply_weight_norm(layer_of(kind), f"orthogonal_norm(iterations=30, centred={centred}, scale=1.5)")
    weight = original(layer)
    upstream = torch.randn_like(weight)
    value = layer.weight
    value.backward(upstream)
    rows = norm_of(layer).filters.rows
    z = rows(weight.detach().clone()).requires_grad_()
    c = z - z.mean(-1, keepdim=True) if centred else z
    u, s, vh = torch.linalg.svd(c, full_matrices=False)
    rank = min(c.shape[-2], c.shape[-1] - (1 if centred else 0))  # centring takes a direction away
    for g in range(len(c)):
        polar = 1.5 * u[g, :, :rank] @ vh[g, :rank]
        torch.testing.assert_close(rows(value)[g], polar, rtol=0, atol=1e-10)
        assert s[g, rank - 1] > 1e-3
        if c.shape[-2] <= rank:
            gram = rows(value)[g] @ rows(value)[g].mT
            torch.testing.assert_close(gram, 2.25 * torch.eye(c.shape[-2]).double(), rtol=0, atol=1e-10)
        elif not centred:
            gram = rows(value)[g].mT @ rows(value)[g]
            torch.testing.assert_close(gram, 2.25 * torch.eye(c.shape[-1]).double(), rtol=0, atol=1e-10)
    if c.shape[-2] <= rank:  # the gradient of (ZZ')^{-1/2} Z, by eigenvectors
        value_, vectors = torch.linalg.eigh(c @ c.mT)
        whitened = 1.5 * (vectors * value_.rsqrt().unsqueeze(-2)) @ vectors.mT @ c
        (grad,) = torch.autograd.grad(whitened, z, rows(upstream))
        torch.testing.assert_close(rows(weight.grad), grad, rtol=0, atol=1e-8)


def test_orthogonal_norm_with_few_iterations_is_the_papers_algorithm():
    layer = apply_weight_norm(layer_of("linear"), "orthogonal_norm(iterations=3)")
    z = original(layer).detach().numpy()
    z = z - z.mean(1, keepdims=True)
    v = z / math.sqrt(np.linalg.norm(z @ z.T))
    b = np.eye(4)
    for _ in range(3):
        b = 1.5 * b - 0.5 * b @ b @ b @ (v @ v.T)
    np.testing.assert_allclose(layer.weight.detach(), b @ v, atol=1e-12)
    values = np.linalg.svd(v)[1]
    np.testing.assert_allclose(  # each singular value goes its own way towards one
        np.linalg.svd(layer.weight.detach().numpy())[1],
        _newton(values, 3),
        atol=1e-10,
    )


def _newton(values, iterations):
    b = np.ones_like(values)
    for _ in range(iterations):
        b = 1.5 * b - 0.5 * b**3 * values**2
    return np.sort(b * values)[::-1]


def test_orthogonal_norm_stays_where_the_papers_form_blows_up():
    torch.manual_seed(0)
    layer = apply_weight_norm(nn.Linear(64, 32), "orthogonal_norm(iterations=60)")
    torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(32), rtol=0, atol=1e-4)
    z = original(layer).detach().numpy()
    z = z - z.mean(1, keepdims=True)
    s = z @ z.T / np.linalg.norm(z @ z.T)
    b = np.eye(32, dtype=np.float32)
    with np.errstate(all="ignore"):
        for _ in range(60):
            b = 1.5 * b - 0.5 * b @ b @ b @ s
    assert not np.abs(b).max() < 1e3


def patches(layer, x) -> Tensor:
    """What each output of a convolution sees: ``(N, O, fan_in, positions)``."""
    size = layer.kernel_size
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    else:
        padding = 0 if layer.padding == "valid" else layer.padding[0]
    if len(size) == 1:
        x, size, padding = x.unsqueeze(2), (1, *size), (0, padding)
    found = F.unfold(x, size, padding=padding, stride=layer.stride[0])
    groups = found.unflatten(1, (layer.groups, -1))
    return groups.repeat_interleave(layer.out_channels // layer.groups, 1)


@pytest.mark.parametrize("kind", ["linear", "linear_wide", "conv1d", "conv2d", "conv2d_grouped", "conv2d_depthwise"])
def test_cosine_norm_is_the_cosine(kind):
    layer = apply_weight_norm(layer_of(kind), "cosine_norm")
    x = input_of(kind).requires_grad_()
    y = layer(x)
    w = original(layer)
    bias = None if not parametrize.is_parametrized(layer, "bias") else layer.parametrizations.bias.original
    if isinstance(layer, nn.Linear):
        want = F.cosine_similarity(x.unsqueeze(-2), w, dim=-1, eps=1e-12)
        want = want if bias is None else want + bias
    else:
        want = F.cosine_similarity(patches(layer, x), w.flatten(1).unsqueeze(-1), dim=2, eps=1e-12)
        want = (want if bias is None else want + bias.view(-1, 1)).view(y.shape)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-10)
    upstream = torch.randn_like(y)
    leaves = [x, w] + ([] if bias is None else [bias])
    for got, expected in zip(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_cosine_norm_bounds_what_goes_in():
    layer = apply_weight_norm(nn.Conv2d(3, 8, 3, padding=1, bias=False), "cosine_norm")
    x = torch.randn(4, 3, 9, 9) * torch.logspace(-6, 4, 4).view(-1, 1, 1, 1)
    y = layer(x)
    assert y.abs().max() <= 1 + 1e-5
    torch.testing.assert_close(y, layer(x * 7), rtol=1e-4, atol=1e-6)
    zero = torch.zeros(1, 3, 9, 9, requires_grad=True)
    layer(zero).sum().backward()
    assert (layer(zero) == 0).all()
    assert zero.grad.isfinite().all()
    biased = apply_weight_norm(nn.Linear(3, 2), "cosine_norm")
    assert torch.equal(biased(torch.zeros(1, 3))[0], biased.parametrizations.bias.original)
    with pytest.raises(NormzooError, match="cannot be baked into"):
        remove_weight_norm(nn.Sequential(apply_weight_norm(nn.Linear(3, 2), "weight_norm"), biased))
    assert weight_norms(biased)
    unbatched = apply_weight_norm(nn.Conv2d(2, 3, 3), "cosine_norm")
    x = torch.randn(2, 5, 5)
    torch.testing.assert_close(unbatched(x), unbatched(x[None])[0])


@pytest.mark.parametrize("kind", ["linear", "linear_wide", "conv2d", "conv2d_grouped", "transposed2d_grouped"])
def test_mean_spectral_norm_is_spectral_norm_and_mean_only_batch_norm(kind):
    layer = apply_weight_norm(layer_of(kind), "mean_spectral_norm(momentum=0.3)")
    spectral = apply_weight_norm(layer_of(kind), "spectral_norm")
    mean_only = create(
        "mean_only_batch_norm(momentum=0.3)", norm_of(layer).filters.outputs, dtype=torch.float64,
        channel_dim=-1 if kind.startswith("linear") else 1,
    )  # fmt: skip
    for step in range(4):
        x = input_of(kind, seed=step)
        y, want = layer(x), mean_only(spectral(x))
        torch.testing.assert_close(y, want, rtol=0, atol=1e-12)
        dims = tuple(d for d in range(y.ndim) if d != (y.ndim - 1 if kind.startswith("linear") else 1))
        assert y.mean(dims).abs().max() < 1e-10
    layer.eval(), mean_only.eval(), spectral.eval()
    torch.testing.assert_close(layer(x), mean_only(spectral(x)), rtol=0, atol=1e-12)
    norm_of(layer).mean.bias.data.normal_()
    want = layer(x)
    remove_weight_norm(layer)
    assert layer.bias is not None
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-12)


# ---- equality with torch ---------------------------------------------------------------------------------------------


# torch has one gain for two outputs of different groups
@pytest.mark.parametrize("kind", [k for k in LAYERS if k != "transposed2d_grouped"])
def test_weight_norm_is_torchs(kind):
    ours, theirs = layer_of(kind), layer_of(kind)
    apply_weight_norm(ours, "weight_norm")
    parametrizations.weight_norm(theirs, dim=1 if kind.startswith("transposed") else 0)
    for parameters in (ours, theirs):
        parameters.optimizer = torch.optim.SGD(parameters.parameters(), lr=0.1)
    for step in range(4):
        x = input_of(kind, seed=step)
        for layer in (ours, theirs):
            layer.optimizer.zero_grad()
            layer(x).square().sum().backward()
            layer.optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(norm_of(ours).gain, theirs.parametrizations.weight.original0.flatten())
    torch.testing.assert_close(original(ours), theirs.parametrizations.weight.original1)


@pytest.mark.parametrize("kind", [k for k in LAYERS if k not in ("conv2d_grouped", "conv2d_depthwise",
                                                                 "transposed2d_grouped")])  # fmt: skip
@pytest.mark.parametrize("iterations", [1, 3])
def test_spectral_norm_is_torchs(kind, iterations):
    ours = apply_weight_norm(layer_of(kind), f"spectral_norm(iterations={iterations})")
    theirs = parametrizations.spectral_norm(layer_of(kind), n_power_iterations=iterations)
    norm, reference = norm_of(ours), theirs.parametrizations.weight[0]
    norm.u.copy_(reference._u)
    norm.v.copy_(reference._v)
    for layer in (ours, theirs):
        layer.optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for step in range(5):  # one forward pass for each step, where both iterate once
        x = input_of(kind, seed=step)
        for layer in (ours, theirs):
            layer.optimizer.zero_grad()
            layer.loss = layer(x).square().sum()
            layer.loss.backward()
            layer.optimizer.step()
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(norm.u.flatten(), reference._u, rtol=0, atol=1e-9)
    torch.testing.assert_close(norm.v.flatten(), reference._v, rtol=0, atol=1e-9)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-10)


# ---- invariance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("member", "shift"),
    [
        ("centred_weight_norm(scale=1.0)", True),
        ("orthogonal_norm", True),
        ("orthogonal_norm(centred=False)", False),
        ("scaled_weight_standardization", True),
        ("sigma_reparam(iterations=200)", False),
        ("spectral_norm(iterations=200)", False),
        ("weight_norm", False),
        ("weight_standardization(eps=0)", True),
    ],
)
def test_the_output_does_not_depend_on_the_scale_or_mean_of_the_weights(member, shift, kind):
    layer = apply_weight_norm(layer_of(kind), member)
    x = input_of(kind)
    y = layer(x)
    with torch.no_grad():
        original(layer).mul_(3.0).add_(0.7 if shift else 0.0)
    torch.testing.assert_close(layer(x), y, rtol=1e-7, atol=1e-8)
    with torch.no_grad():
        original(layer).add_(torch.randn_like(original(layer)))
    assert (layer(x) - y).abs().max() > 1e-3


def variances(member: str, layers, x) -> list[float]:
    """The variance of what each layer gives, through the gain that its spec names."""
    found = []
    with torch.no_grad():
        for layer in layers:
            apply_weight_norm(layer, member)
            y = layer(x)
            found.append(y.var().item())
            x = y.relu()
    return found


def test_scaled_weight_standardization_keeps_the_variance_through_20_layers():
    torch.manual_seed(0)
    linear = [nn.Linear(512, 512, bias=False) for _ in range(20)]
    conv = [nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular", bias=False) for _ in range(20)]
    for layers, x in ((linear, torch.randn(256, 512)), (conv, torch.randn(8, 64, 8, 8))):
        first = copy.deepcopy(layers[0])
        rest = layers[1:]
        kept = variances("scaled_weight_standardization", [first], x)
        with torch.no_grad():
            kept += variances("scaled_weight_standardization(activation='relu')", rest, first(x).relu())
        assert max(kept) < 1.1, kept
        assert min(kept) > 0.9, kept
    plain = [nn.Linear(512, 512, bias=False) for _ in range(20)]
    with torch.no_grad():
        x, gamma = torch.randn(256, 512), activation_gain("relu")
        for layer in plain:  # the same lengths without centring: the mean of ReLU is carried on
            nn.init.normal_(layer.weight, std=512**-0.5)
            y = layer(x)
            x = gamma * y.relu()
    assert y.var() > 100


def test_data_dependent_init_gives_mean_zero_and_variance_one():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 14 * 14, 5),
    )  # fmt: skip
    for layer in (model[0], model[2], model[4], model[6]):
        nn.init.normal_(layer.weight, std=0.05)
    apply_weight_norm(model, "weight_norm", only=["0", "2", "6"])
    apply_weight_norm(model, "scaled_weight_standardization", only="4")
    x = torch.randn(32, 3, 8, 8) * 5 + 2
    with data_dependent_init(model):
        inside = model(x)
        model(x * 3)  # only the first batch counts
    outputs = {}
    for i in (0, 2, 4, 6):
        model[i].register_forward_hook(lambda layer, args, y, i=i: outputs.__setitem__(i, y.detach()))
    torch.testing.assert_close(model(x), inside, rtol=1e-4, atol=1e-4)
    for i, y in outputs.items():
        dims = [d for d in range(y.ndim) if d != 1]
        torch.testing.assert_close(y.var(dims, correction=0), torch.ones(y.shape[1]), rtol=1e-3, atol=1e-3)
        if i != 4:
            assert y.mean(dims).abs().max() < 1e-4
    assert (norm_of(model, "0.weight").gain != 0.05).all()
    with pytest.raises(NormzooError, match="no layer with a gain"), data_dependent_init(nn.Linear(2, 2)):
        pass


# ---- state -----------------------------------------------------------------------------------------------------------


def spectral_state(layer):
    return {k: v.clone() for k, v in layer.state_dict().items() if k.rpartition(".")[2] in ("u", "v")}


@pytest.mark.parametrize("member", SPECTRAL)
def test_power_iteration_steps_once_for_each_change_of_the_weights(member):
    layer = apply_weight_norm(layer_of("conv2d_grouped"), member)
    x = input_of("conv2d_grouped")
    layer(x)
    before = spectral_state(layer)
    for _ in range(3):  # evaluated again, in training: nothing has changed
        layer(x)
        layer.weight  # noqa: B018
    assert all(torch.equal(v, before[k]) for k, v in spectral_state(layer).items())
    with torch.no_grad():
        original(layer).add_(torch.randn_like(original(layer)))
    layer.eval()
    first = layer(x)
    torch.testing.assert_close(layer(x), first, rtol=0, atol=0)
    assert all(torch.equal(v, before[k]) for k, v in spectral_state(layer).items())
    layer.train()
    norm_of(layer).hold = True
    layer(x)
    assert all(torch.equal(v, before[k]) for k, v in spectral_state(layer).items())
    norm_of(layer).hold = False
    layer(x)
    after = spectral_state(layer)
    assert not any(torch.equal(v, before[k]) for k, v in after.items())
    u, v = before["parametrizations.weight.0.u"], before["parametrizations.weight.0.v"]
    for g, w in enumerate(map(torch.tensor, blocks(layer, original(layer)))):
        u_g = w @ v[g]
        u_g = u_g / u_g.norm()
        v_g = w.T @ u_g
        torch.testing.assert_close(after["parametrizations.weight.0.u"][g], u_g)
        torch.testing.assert_close(after["parametrizations.weight.0.v"][g], v_g / v_g.norm())
    assert u.shape == after["parametrizations.weight.0.u"].shape


def test_power_iteration_follows_the_weights_in_training():
    torch.manual_seed(0)
    layer = apply_weight_norm(nn.Linear(12, 9, dtype=torch.float64), "spectral_norm")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
    x, y = torch.randn(32, 12).double(), torch.randn(32, 9).double()
    for _ in range(100):
        optimizer.zero_grad()
        F.mse_loss(layer(x), y).backward()
        optimizer.step()
        assert abs(torch.linalg.svdvals(layer.weight.detach())[0].item() - 1) < 0.01


@pytest.mark.parametrize(("member", "kind"), cases(kinds=("linear", "conv2d_grouped")))
def test_two_forwards_then_backward(member, kind):
    layer = apply_weight_norm(layer_of(kind), member)
    real, fake = input_of(kind, seed=1), input_of(kind, seed=2)
    (layer(real).square().sum() - layer(fake).sum()).backward()
    both = original(layer).grad.clone()
    layer.zero_grad()
    layer(real).square().sum().backward()
    (-layer(fake).sum()).backward()
    torch.testing.assert_close(original(layer).grad, both)
    assert both.abs().max() > 0
    layer.zero_grad()
    held = layer.eval()(real).square().sum()  # the vectors of evaluation are saved for the backward pass
    with torch.no_grad():
        original_value = original(layer).clone()
    copy_ = copy.deepcopy(layer).train()
    with torch.no_grad():
        original(copy_).mul_(-2)
    copy_(fake)
    held.backward()
    assert torch.equal(original(layer), original_value)


def test_a_step_between_forward_and_backward_does_not_disturb_spectral_norm():
    layer = apply_weight_norm(layer_of("linear"), "spectral_norm").eval()
    loss = layer(input_of("linear")).square().sum()
    layer.train()
    norm_of(layer).seen.zero_()
    layer(input_of("linear"))  # moves the buffers in place
    loss.backward()
    assert original(layer).grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("member", MEMBERS)
def test_checkpointing_changes_nothing(member, reentrant):
    plain = nn.Sequential(layer_of("linear", seed=3), nn.Tanh(), nn.Linear(4, 4, dtype=torch.float64))
    apply_weight_norm(plain, member)
    saved = copy.deepcopy(plain)
    x = input_of("linear").requires_grad_()
    for step in range(3):
        for model in (plain, saved):
            model.zero_grad()
            y = model(x) if model is plain else checkpoint(model, x, use_reentrant=reentrant)
            (y.square().sum() + step * y.sum()).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.01 * p.grad)
    for (name, a), (other, b) in zip(plain.state_dict().items(), saved.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def trained(member, kind, dtype=torch.float64):
    """A layer after a few steps."""
    layer = apply_weight_norm(layer_of(kind, dtype), member)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        layer(input_of(kind, dtype, step)).square().sum().backward()
        optimizer.step()
    return layer


@pytest.mark.parametrize(("member", "kind"), cases())
def test_a_layer_trains_copies_pickles_saves_and_is_baked(member, kind):
    layer = trained(member, kind)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    x = input_of(kind, seed=9)
    layer.eval()
    want = layer(x)

    fresh = apply_weight_norm(layer_of(kind, seed=5), member).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), want)

    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin).__name__ == type(layer).__name__
        assert not twin.training
        assert list(twin.state_dict()) == list(layer.state_dict())
        assert torch.equal(twin(x), want)
        with torch.no_grad():
            original(twin).add_(torch.randn_like(original(twin)))
        assert not torch.equal(twin(x), want)
        assert torch.equal(layer(x), want)
        again = copy.deepcopy(pickle.loads(pickle.dumps(twin)))
        assert torch.equal(again(x), twin(x))
        if member != "cosine_norm":
            remove_weight_norm(twin)
            assert torch.equal(layer(x), want)  # torch's copies share the class, and would lose their weight here

    if member == "cosine_norm":
        return
    baked = remove_weight_norm(layer.train())
    assert type(baked) is type(layer_of(kind))
    assert set(baked.state_dict()) == {"weight"} | ({"bias"} if baked.bias is not None else set())
    torch.testing.assert_close(baked.eval()(x), want, rtol=1e-12, atol=1e-12)
    assert not baked._forward_hooks
    baked(x).sum().backward()
    assert torch.equal(pickle.loads(pickle.dumps(baked))(x), baked(x))


def test_torch_save_and_weight_averages(tmp_path):
    model = apply_weight_norm(net(), "spectral_norm").eval()
    x = torch.randn(2, 1, 4, 4)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), model(x))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = apply_weight_norm(net(), "spectral_norm").eval()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(x), model(x))
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    remove_weight_norm(average.module)
    torch.testing.assert_close(average(x), model(x))


@pytest.mark.parametrize("member", MEMBERS)
def test_assigning_weights(member):
    layer = apply_weight_norm(nn.Linear(6, 3, bias=False), member).eval()
    layer.weight = torch.randn(3, 6)
    fresh = nn.Linear(6, 3, bias=False)
    fresh.weight.data = original(layer).detach().clone()
    apply_weight_norm(fresh, member).eval()
    torch.testing.assert_close(layer.weight, fresh.weight)
    if member == "weight_norm":
        torch.testing.assert_close(layer.weight, original(layer))


def test_applying_draws_no_random_numbers_and_is_reproducible():
    for member in MEMBERS:
        state = torch.random.get_rng_state()
        a, b = (layer_of("conv2d") for _ in range(2))
        torch.random.set_rng_state(state)
        apply_weight_norm(a, member)
        assert torch.equal(torch.random.get_rng_state(), state)
        apply_weight_norm(b, member)
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- systems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("member", "kind"), cases(kinds=("linear", "conv2d_grouped")))
def test_half_precision(member, kind, dtype):
    layer = trained(member, kind, torch.float32)
    x = input_of(kind, torch.float32)
    for scale in (1.0, 1e-3):  # squares of the small weights are zero in float16
        with torch.no_grad():
            original(layer).mul_(scale)
        half = copy.deepcopy(layer).to(dtype)
        assert half.weight.dtype == dtype
        exact = copy.deepcopy(half).float()  # the same rounded parameters
        if "standardization" not in member or scale == 1:
            torch.testing.assert_close(half.weight.float(), exact.weight, rtol=1e-2, atol=1e-3)
        assert half.weight.abs().max() > 1e-3 * exact.weight.abs().max()
        y = half(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), exact(x), rtol=0.1, atol=0.1)
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in half.parameters())
        for name, buffer in half.named_buffers():
            if buffer.is_floating_point() and not name.endswith("gain"):
                assert buffer.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        weight = layer.weight
    torch.testing.assert_close(weight, layer.weight)


@pytest.mark.parametrize(
    ("member", "kind"), [*cases(kinds=("linear",)), *cases(["spectral_norm", "cosine_norm"], ("conv2d_grouped",))]
)
def test_compiles_to_one_graph(member, kind):
    torch._dynamo.reset()
    plain = nn.Sequential(layer_of(kind), nn.Tanh())
    apply_weight_norm(plain, member)
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            x = input_of(kind, seed=step)
            for model, call in ((plain, plain), (twin, compiled)):
                model.zero_grad()
                call(x).square().sum().backward()
                with torch.no_grad():
                    for p in model.parameters():
                        p.sub_(0.1 * p.grad)
    for a, b in zip(plain.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("member", MEMBERS)
def test_functional_call_per_sample_gradients_and_export(member):
    layer = apply_weight_norm(layer_of("linear"), member).eval()
    x = input_of("linear")
    state = dict(layer.named_parameters())

    def loss(state, sample):
        return torch.func.functional_call(layer, state, (sample.unsqueeze(0),)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(grads[name].sum(0), p.grad)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize(("member", "kind"), cases(kinds=("linear", "conv2d_grouped", "transposed2d_grouped")))
def test_gradients_once_and_twice(member, kind):
    layer = apply_weight_norm(layer_of(kind), member).eval()  # in evaluation, where nothing moves between calls
    norm = norm_of(layer)

    def weights(w):
        return norm(w)

    w = original(layer).detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(weights, (w,), fast_mode=True)
    assert torch.autograd.gradgradcheck(weights, (w,), fast_mode=True)


@pytest.mark.parametrize("member", MEMBERS)
def test_the_memory_format_of_the_weights_is_kept(member):
    layer = apply_weight_norm(nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), member)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    plain = nn.Conv2d(4, 6, 3)
    plain.weight.data = original(layer).detach().contiguous()
    plain.bias.data = layer.state_dict()[next(k for k in layer.state_dict() if "bias" in k)]
    apply_weight_norm(plain, member)
    assert plain.weight.is_contiguous()
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), plain(x))
    assert layer(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("member", MEMBERS)
def test_weights_on_the_meta_device(member):
    layer = apply_weight_norm(nn.Linear(4, 3, device="meta"), member)
    assert layer.weight.is_meta
    assert layer.weight.shape == (3, 4)


# ---- the benchmark models --------------------------------------------------------------------------------------------

MODELS = {
    "cnn": ("batch_norm", Inputs((1, 8, 8)), lambda: torch.randn(16, 1, 8, 8)),
    "lstm": ("layer_norm", Inputs((6, 4)), lambda: torch.randn(16, 6, 4)),
    "transformer": ("layer_norm", Inputs((5,), vocabulary=7), lambda: torch.randint(7, (16, 5))),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("member", MEMBERS)
def test_the_benchmark_models_train_with_normalised_weights(member, name):
    torch.manual_seed(0)
    norm, inputs, data = MODELS[name]
    model = create_model(name, norm=norm, inputs=inputs, outputs=3, width=16) if name != "cnn" else create_model(
        name, norm=norm, inputs=inputs, outputs=3
    )  # fmt: skip
    # no output of their own to change: the two matrices of a recurrent cell
    only = "head*" if name == "lstm" and member not in WEIGHTS_ONLY else None
    apply_weight_norm(model, member, only=only)
    normalised = list(weight_norms(model))
    if only is None:
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert set(normalised) >= {f"{n}.weight" for n in linear}
        assert ("layers.0.cell.weight_hh" in normalised) == (name == "lstm")
    x, y = data(), torch.randint(3, (16,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with parametrize.cached():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    model.eval()
    want = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), want)
    if member != "cosine_norm":
        torch.testing.assert_close(remove_weight_norm(model)(x), want, rtol=1e-4, atol=1e-5)
        assert not weight_norms(model)
