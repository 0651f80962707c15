"""Norms that whiten, each against a closed form of its own, in float64."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import cholesky as scipy_cholesky
from scipy.linalg import sqrtm
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import normzoo as nz
from normzoo.layers.base import Norm, hold_statistics
from normzoo.layers.whitening import cholesky, group_count, newton_schulz, pca, zca

BATCH = ["zca_norm", "pca_norm", "cholesky_norm", "iter_norm", "whitening_coloring"]
EXACT = ["zca_norm", "pca_norm", "cholesky_norm", "whitening_coloring"]
ALL = [*BATCH, "switchable_whitening", "group_whitening"]


def make(spec: str, channels: int = 8, **options) -> Norm:
    return nz.create(spec, channels, dtype=torch.float64, **options)


def randomize(norm: Norm) -> Norm:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) - 0.5)
    return norm


def data(shape=(6, 8, 7), seed=0) -> torch.Tensor:
    """Correlated channels, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[1], shape[1], generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.einsum("ij,bj...->bi...", mix, x) + 3


def rows(x: torch.Tensor) -> np.ndarray:
    """Channels by samples and positions."""
    return x.detach().movedim(1, 0).flatten(1).numpy()


def back(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).view(like.shape[1], like.shape[0], *like.shape[2:]).movedim(0, 1)


def matrix_of(kind: str, cov: np.ndarray, eps: float) -> np.ndarray:
    """A whitening matrix, by SciPy and NumPy."""
    full = cov + eps * np.eye(len(cov))
    if kind == "zca":
        return np.linalg.inv(np.real(sqrtm(full)))
    if kind == "pca":
        values, axes = np.linalg.eigh(cov)
        order = np.argsort(-values)
        values, axes = values[order], axes[:, order]
        axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(len(cov))])
        return (axes / np.sqrt(values + eps)).T
    if kind == "cholesky":
        return np.linalg.inv(scipy_cholesky(full, lower=True))
    steps, size, w = int(kind), np.trace(full), np.eye(len(cov))
    for _ in range(steps):
        w = (3 * w - w @ w @ w @ full / size) / 2
    return w / np.sqrt(size)


KINDS = {
    "zca_norm": "zca", "pca_norm": "pca", "cholesky_norm": "cholesky", "whitening_coloring": "cholesky",
    "iter_norm": "5",
}  # fmt: skip


def whitened(kind: str, x: np.ndarray, groups: int, eps: float) -> np.ndarray:
    """Groups of the rows of ``x``, centred and whitened."""
    centred = x - x.mean(1, keepdims=True)
    parts = np.split(centred, groups)
    return np.concatenate([matrix_of(kind, part @ part.T / part.shape[1], eps) @ part for part in parts])


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ---- the closed forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("name", BATCH)
def test_output_is_the_closed_form(name: str, groups: int) -> None:
    norm = randomize(make(name, groups=groups))
    x = data()
    expected = back(whitened(KINDS[name], rows(x), groups, norm.eps), x)
    if name == "whitening_coloring":
        expected = torch.einsum("ij,bjs->bis", norm.coloring, expected) + norm.bias[:, None]
    else:
        expected = expected * norm.weight[:, None] + norm.bias[:, None]
    assert_close(norm(x), expected)


@pytest.mark.parametrize("name", EXACT)
def test_whitened_channels_have_the_identity_as_covariance(name: str) -> None:
    for groups in (1, 2):
        y = rows(make(name, groups=groups, eps=1e-12, affine=False)(data((16, 8, 9))))
        np.testing.assert_allclose(y.mean(1), 0, atol=1e-10)
        cov = y @ y.T / y.shape[1]
        for part in range(groups):
            size = 8 // groups
            block = slice(part * size, (part + 1) * size)
            np.testing.assert_allclose(cov[block, block], np.eye(size), atol=1e-8)


@pytest.mark.parametrize("name", ["zca_norm", "pca_norm"])
def test_eps_shrinks_each_direction_by_a_known_factor(name: str) -> None:
    eps, x = 0.3, data()
    y = rows(make(name, groups=1, eps=eps, affine=False)(x))
    values = np.linalg.eigvalsh(np.cov(rows(x), bias=True))
    np.testing.assert_allclose(np.linalg.eigvalsh(y @ y.T / y.shape[1]), np.sort(values / (values + eps)), atol=1e-10)


def test_pca_components_are_uncorrelated_and_ordered() -> None:
    x = data()
    w = pca(torch.from_numpy(np.cov(rows(x), bias=True)), 0.0).numpy()
    length = np.linalg.norm(w, axis=1)  # one over the standard deviation of a component
    assert (np.diff(length) > 0).all()
    axes = w / length[:, None]
    np.testing.assert_allclose(axes @ axes.T, np.eye(8), atol=1e-10)
    assert (axes[np.arange(8), np.abs(axes).argmax(1)] > 0).all()


def test_zca_moves_the_data_least() -> None:
    x = data()
    distance = {}
    for name in ("zca_norm", "pca_norm", "cholesky_norm"):
        y = make(name, groups=1, eps=0.0, affine=False)(x)
        distance[name] = float((y - (x - x.mean((0, 2), keepdim=True))).square().mean())
    assert distance["zca_norm"] < min(distance["pca_norm"], distance["cholesky_norm"])
    cov = torch.from_numpy(np.cov(rows(x), bias=True))
    w = zca(cov, 0.0)
    assert_close(w, w.mT)
    assert torch.linalg.eigvalsh(w).min() > 0
    turned = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    assert torch.trace(w @ cov) > torch.trace(turned @ w @ cov)  # what remains of the distance among all rotations


def test_cholesky_frees_a_channel_of_those_before_it() -> None:
    x = data()
    y = make("cholesky_norm", groups=1, affine=False)(x)
    changed = x.clone()
    changed[:, 5:] *= torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)[:, None]
    assert_close(make("cholesky_norm", groups=1, affine=False)(changed)[:, :5], y[:, :5])


def test_iter_norm_approaches_zca() -> None:
    x = data((16, 8, 9))
    exact = make("zca_norm", groups=1, eps=1e-5, affine=False)(x)

    def error(steps: int, x: torch.Tensor = x) -> float:
        return float((nz.create("iter_norm", 8, iterations=steps, affine=False)(x) - exact).abs().max())

    errors = [error(steps) for steps in range(1, 13)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    # eigenvalues from 0.14 to 25: five steps, the default, leave the smallest directions less than white
    assert errors[4] == pytest.approx(1.5404, abs=1e-4)
    assert errors[9] == pytest.approx(3.366e-3, abs=1e-5)
    assert error(40) < 1e-9
    assert error(40, x.float()) < 1e-3


def test_two_channels_by_hand() -> None:
    # covariance [[5, 4], [4, 5]]: eigenvalues 9 and 1 along (1, 1) and (1, -1)
    cov = torch.tensor([[5.0, 4.0], [4.0, 5.0]], dtype=torch.float64)
    assert_close(zca(cov, 0.0), torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64) / 3)
    root = 0.5**0.5
    assert_close(pca(cov, 0.0).abs(), torch.tensor([[root / 3, root / 3], [root, root]], dtype=torch.float64))
    assert_close(
        cholesky(cov, 0.0),
        torch.tensor([[5**-0.5, 0], [-4 / (5 * 1.8**0.5), 1 / 1.8**0.5]], dtype=torch.float64),
    )
    # one step of Newton-Schulz: (3 I - S / tr S) / (2 sqrt(tr S)), with trace 10
    assert_close(newton_schulz(cov, 0.0, 1), (3 * torch.eye(2) - cov / 10) / (2 * 10**0.5))


# ---- equivalences and invariances ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_one_channel_a_group_is_batch_norm(name: str) -> None:
    options = {} if name == "pca_norm" else {"average": "covariance"}
    norm = make(name, group_size=1, eps=1e-3, **options)
    batch_norm = torch.nn.BatchNorm1d(8, eps=1e-3, dtype=torch.float64)
    for seed in range(3):
        x, twin = data(seed=seed).requires_grad_(), data(seed=seed).requires_grad_()
        y, expected = norm(x), batch_norm(twin)
        assert_close(y, expected)
        y.sin().sum().backward()
        expected.sin().sum().backward()
        assert_close(x.grad, twin.grad)
    assert_close(norm.running_mean, batch_norm.running_mean)
    assert_close(norm.running_cov.flatten(), batch_norm.running_var)
    assert_close(norm.eval()(data(seed=9)), batch_norm.eval()(data(seed=9)))


def test_one_channel_a_group_is_batch_norm_for_the_iterations_as_well() -> None:
    x = data()  # the trace is the variance: the first step is there
    norm, batch_norm = make("iter_norm", group_size=1), make("batch_norm")
    assert_close(norm(x), batch_norm(x))


@pytest.mark.parametrize("name", ["zca_norm", "pca_norm", "cholesky_norm", "iter_norm"])
def test_shift_scale_and_rotation(name: str) -> None:
    x = data((16, 8, 9))
    apply = make(name, groups=1, eps=0.0, affine=False)
    y = apply(x)
    assert_close(apply(x + torch.arange(8.0, dtype=torch.float64)[:, None]), y, 1e-8)
    assert_close(apply(7 * x), y, 1e-8)
    generator = torch.Generator().manual_seed(2)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    turned = apply(torch.einsum("ij,bjs->bis", turn, x))
    if name in ("zca_norm", "iter_norm"):  # a matrix function turns with its argument
        assert_close(turned, torch.einsum("ij,bjs->bis", turn, y), 1e-8)
    if name == "pca_norm":  # principal components are where they were, up to their sign
        assert_close(turned.abs(), y.abs(), 1e-8)
    if name == "cholesky_norm":  # what comes before a channel may be mixed and scaled, if it stays before
        lower = torch.randn(8, 8, generator=generator, dtype=torch.float64).tril(-1) + torch.diag(torch.rand(8) + 0.5)
        assert_close(apply(torch.einsum("ij,bjs->bis", lower, x)), y, 1e-8)


@pytest.mark.parametrize("name", EXACT)
def test_what_is_invertible_changes_a_whitened_batch_by_a_rotation_at_most(name: str) -> None:
    x = data((16, 8, 9))
    scale = torch.linspace(0.2, 5, 8, dtype=torch.float64)[:, None]
    y, z = (rows(make(name, groups=1, eps=0.0, affine=False)(v)) for v in (x, x * scale))
    turn = z @ y.T / y.shape[1]
    np.testing.assert_allclose(turn @ turn.T, np.eye(8), atol=1e-8)
    np.testing.assert_allclose(turn @ y, z, atol=1e-8)


def test_white_input_stays_as_it_is() -> None:
    x = make("zca_norm", groups=1, eps=0.0, affine=False)(data())
    for name in ("zca_norm", "cholesky_norm"):
        assert_close(make(name, groups=1, eps=0.0, affine=False)(x), x, 1e-9)


def test_group_whitening_is_the_closed_form() -> None:
    x = data((3, 8, 7))
    for groups in (1, 2, 4):
        for iterations in (None, 5):
            norm = randomize(make("group_whitening", groups=groups, iterations=iterations))
            values = x.numpy().reshape(3, groups, -1)
            kind = "zca" if iterations is None else "5"
            expected = np.stack([
                _joint(kind, sample - sample.mean(1, keepdims=True), norm.eps) for sample in values
            ]).reshape(x.shape)  # fmt: skip
            assert_close(norm(x), torch.from_numpy(expected) * norm.weight[:, None] + norm.bias[:, None])


def _joint(kind: str, centred: np.ndarray, eps: float) -> np.ndarray:
    return matrix_of(kind, centred @ centred.T / centred.shape[1], eps) @ centred


def test_group_whitening_makes_groups_uncorrelated() -> None:
    y = make("group_whitening", groups=4, eps=0.0)(data((3, 8, 20))).view(3, 4, -1)
    assert_close(y @ y.mT / y.shape[-1], torch.eye(4, dtype=torch.float64).expand(3, 4, 4), 1e-9)


def test_group_whitening_with_one_group_is_joint_layer_norm() -> None:
    assert_close(make("group_whitening", groups=1)(data()), make("layer_norm_joint")(data()))
    with pytest.raises(nz.NormzooError, match="one value for each group"):
        make("group_whitening", groups=8)(data()[:, :, 0])


def test_group_whitening_chooses_no_more_groups_than_a_group_has_channels() -> None:
    chosen = {channels: make("group_whitening", channels).groups for channels in (7, 8, 12, 16, 64, 256)}
    assert chosen == {7: 1, 8: 2, 12: 3, 16: 4, 64: 8, 256: 16}


def test_groups_divide_the_channels() -> None:
    assert [group_count(c, "auto", None, 16) for c in (8, 16, 24, 64, 67)] == [1, 1, 2, 4, 67]
    assert make("whitening_coloring", group_size=4).groups == 2
    with pytest.raises(nz.NormzooError, match="does not divide"):
        make("zca_norm", groups=3)
    with pytest.raises(nz.NormzooError, match="both given"):
        make("whitening_coloring", groups=2, group_size=2)
    with pytest.raises(nz.NormzooError, match="iterations=0"):
        make("iter_norm", iterations=0)
    with pytest.raises(nz.NormzooError, match="did you mean 'covariance'"):
        make("zca_norm", average="covarianc")


# ---- switchable whitening --------------------------------------------------------------------------------------------


def forced(component: str, **options) -> Norm:
    """Switchable whitening with all of the share on one component."""
    norm = make("switchable_whitening", components=("bw", "iw", "bn", "in", "ln"), **options)
    with torch.no_grad():
        for weight in (norm.mean_weight, norm.cov_weight):
            weight.copy_(torch.full_like(weight, -1e3))
            weight[norm.components.index(component)] = 0
    return norm


def test_switchable_whitening_in_its_corners() -> None:
    x = data()
    options = {"group_size": 4, "eps": 1e-5}
    assert_close(forced("bw", **options)(x), make("iter_norm", **options)(x))
    each = torch.cat([make("iter_norm", **options)(sample) for sample in x.split(1)])
    assert_close(forced("iw", **options)(x), each)
    many = options | {"iterations": 40}  # a diagonal takes as many steps as any other covariance
    assert_close(forced("bn", **many)(x), make("batch_norm")(x), 1e-8)
    assert_close(forced("in", **many)(x), make("instance_norm")(x), 1e-8)
    assert_close(forced("ln", **many)(x), make("layer_norm_joint")(x), 1e-8)


@pytest.mark.parametrize("tied", [False, True])
def test_switchable_whitening_is_the_closed_form(tied: bool) -> None:
    names = ("iw", "bw", "ln", "in", "bn")
    norm = make("switchable_whitening", components=names, group_size=4, tied=tied)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
    x = data((3, 8, 7))
    share = lambda logits: np.exp(logits.detach().numpy()) / np.exp(logits.detach().numpy()).sum()  # noqa: E731
    p = share(norm.mean_weight)
    q = p if tied else share(norm.cov_weight)
    batch = np.cov(rows(x), bias=True)
    for sample, y in zip(x.numpy(), norm(x), strict=True):
        own = np.cov(sample, bias=True)
        means = {"iw": sample.mean(1), "bw": rows(x).mean(1), "ln": np.full(8, sample.mean())}
        means |= {"in": means["iw"], "bn": means["bw"]}
        covs = {"iw": own, "bw": batch, "ln": sample.var() * np.eye(8), "in": np.diag(np.diag(own))}
        covs["bn"] = np.diag(np.diag(batch))
        mu = sum(share * means[name] for share, name in zip(p, names, strict=True))
        cov = sum(share * covs[name] for share, name in zip(q, names, strict=True))
        expected = np.concatenate([
            matrix_of("5", cov[g : g + 4, g : g + 4], norm.eps) @ (sample - mu[:, None])[g : g + 4] for g in (0, 4)
        ])  # fmt: skip
        expected = torch.from_numpy(expected) * norm.weight[:, None] + norm.bias[:, None]
        assert_close(y, expected)


def test_switchable_whitening_has_the_traits_of_its_components() -> None:
    batch = make("switchable_whitening", components=("bw", "bn")).traits
    sample = make("switchable_whitening", components=("iw", "ln"))
    assert batch.batch_dependent
    assert batch.stateful
    assert batch.causal
    assert not batch.causal_in_training
    assert not sample.traits.batch_dependent
    assert not sample.traits.stateful
    assert not sample.traits.causal
    assert not list(sample.buffers())
    for wrong in ((), ("bw", "bw")):
        with pytest.raises(nz.NormzooError, match="expected some of"):
            make("switchable_whitening", components=wrong)
    with pytest.raises(nz.NormzooError, match="unknown component"):
        make("switchable_whitening", components=("bq",))


# ---- gradients -------------------------------------------------------------------------------------------------------


def spread(*values: float) -> torch.Tensor:
    """A covariance with these eigenvalues, turned."""
    generator = torch.Generator().manual_seed(4)
    turn = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return turn @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn.mT


def symmetric(x: torch.Tensor) -> torch.Tensor:
    return (x + x.mT) / 2


@pytest.mark.parametrize(
    "values", [(1.0, 2.0, 4.0, 0.5), (1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 0.5, 0.5), (1.0, 1.0 + 1e-9, 3.0, 0.1)]
)
@pytest.mark.parametrize("matrix", [zca, cholesky])
def test_derivatives_of_whitening_matrices(matrix, values: tuple[float, ...]) -> None:
    """Equal eigenvalues included."""
    cov = spread(*values).requires_grad_()
    function = lambda cov: matrix(symmetric(cov), 1e-3)  # noqa: E731
    assert gradcheck(function, [cov])
    assert gradgradcheck(function, [cov])


def test_derivatives_of_principal_components() -> None:
    cov = torch.stack([spread(1.0, 2.0, 4.0, 0.5), spread(1.0, 1.1, 0.2, 3.0)]).requires_grad_()
    function = lambda cov: pca(symmetric(cov), 1e-3)  # noqa: E731
    assert gradcheck(function, [cov])
    assert gradgradcheck(function, [cov])


def test_principal_components_with_equal_variance() -> None:
    """What does not depend on the basis of their subspace, has the right gradient: the inverse of the covariance."""
    cov = spread(2.0, 2.0, 0.5, 0.5).requires_grad_()
    w = pca(symmetric(cov), 1e-3)
    outside = torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4)
    (got,) = torch.autograd.grad((w.mT @ w * outside).sum(), cov)
    inverse = torch.linalg.inv(symmetric(cov) + 1e-3 * torch.eye(4, dtype=torch.float64))
    (expected,) = torch.autograd.grad((inverse * outside).sum(), cov)
    # the part of it that lies within a subspace and moves no eigenvalue apart is all that the convention gives up
    turn = torch.linalg.eigh(cov.detach()).eigenvectors
    got, expected = turn.mT @ got @ turn, turn.mT @ expected @ turn
    assert_close(got[:2, 2:], expected[:2, 2:], 1e-9)
    assert_close(got.diagonal(), expected.diagonal(), 1e-9)


def test_zca_gradient_is_that_of_the_matrix_function() -> None:
    """Daleckii and Krein: in the basis of the eigenvectors, minus one over the product and the sum of the roots."""
    cov = spread(2.0, 2.0, 0.5, 0.1).requires_grad_()
    outside = symmetric(torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4))
    (got,) = torch.autograd.grad((zca(cov, 0.0) * outside).sum(), cov)
    values, axes = torch.linalg.eigh(cov.detach())
    root = values.sqrt()
    kernel = -1 / (root[:, None] * root * (root[:, None] + root))
    assert_close(got, axes @ (kernel * (axes.mT @ outside @ axes)) @ axes.mT, 1e-9)


@pytest.mark.parametrize("name", ALL)
def test_gradients_in_training_and_evaluation(name: str) -> None:
    norm = make(name, 4)
    norm(data((5, 4, 3), seed=1))
    for mode in (True, False):
        state = copy.deepcopy(norm.train(mode))
        function = lambda x, norm=state: copy.deepcopy(norm)(x)  # noqa: E731
        x = data((5, 4, 3)).requires_grad_()
        assert gradcheck(function, [x])
        assert gradgradcheck(function, [x], fast_mode=True)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_finite_where_eigenvalues_are_equal(name: str) -> None:
    one_value = torch.full((4, 8, 3), 2.0)
    ordered = torch.eye(8).repeat(2, 1, 1)  # 16 samples whose covariance has equal eigenvalues
    for x in (one_value, torch.zeros(4, 8, 3), ordered):
        x = x.clone().requires_grad_()
        y = nz.create(name, 8)(x)
        y.sin().sum().backward()
        assert y.isfinite().all()
        assert x.grad.isfinite().all()


def test_a_second_backward_pass_gives_the_same() -> None:
    x = data().requires_grad_()
    y = make("iter_norm")(x)
    first, second = (torch.autograd.grad(y.sin().sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ALL)
def test_fewer_samples_than_channels(name: str) -> None:
    """A singular covariance: finite, and in float32 what it is in float64 where the data say something."""
    x = data((3, 8))
    y = make(name, affine=False)(x)
    assert y.isfinite().all()
    single = nz.create(name, 8, affine=False)(x.float().requires_grad_())
    single.sin().sum().backward()
    assert_close(single.detach().double(), y.detach(), 2e-2)
    huge = nz.create(name, 8, affine=False)(1e8 * x.float())  # rounding is larger than eps
    assert huge.isfinite().all()


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    ["zca_norm", "zca_norm(average='covariance')", "pca_norm", "cholesky_norm", "cholesky_norm(average='matrix')",
     "iter_norm", "iter_norm(average='covariance')", "whitening_coloring"],
)  # fmt: skip
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_against_a_loop(spec: str, momentum: float | None) -> None:
    norm = make(spec, groups=2, momentum=momentum)
    kind = KINDS[spec.partition("(")[0]]
    mean, kept = np.zeros(8), np.stack([np.eye(4)] * 2)
    for step in range(1, 5):
        x = data((5, 8, 4), seed=step)
        norm(x)
        weight = 1 / step if momentum is None else momentum
        values = rows(x)
        mean = mean + weight * (values.mean(1) - mean)
        for g, part in enumerate(np.split(values, 2)):
            new = np.cov(part) if norm.average == "covariance" else matrix_of(kind, np.cov(part, bias=True), norm.eps)
            kept[g] += weight * (new - kept[g])
    buffer = norm.running_cov if norm.average == "covariance" else norm.running_matrix
    assert_close(norm.running_mean, torch.from_numpy(mean))
    assert_close(buffer, torch.from_numpy(kept), 1e-9)
    assert norm.num_batches_tracked == 4
    matrices = [matrix_of(kind, k, norm.eps) for k in kept] if norm.average == "covariance" else kept
    x = data(seed=9)
    centred = np.split(rows(x) - mean[:, None], 2)
    expected = np.concatenate([w @ part for w, part in zip(matrices, centred, strict=True)])
    assert_close(norm.eval()(x), back(expected, x), 1e-8)
    norm.reset_running_stats()
    assert_close(norm(x), x if norm.average == "matrix" else norm(x))
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("name", [*BATCH, "switchable_whitening"])
def test_a_batch_counts_once_and_only_in_training(name: str) -> None:
    norm = make(name)
    x = data().requires_grad_()
    checkpoint(norm, x, use_reentrant=False).sum().backward()
    assert norm.num_batches_tracked == 1
    before = copy.deepcopy(norm.state_dict())
    with hold_statistics(norm):
        norm(data(seed=5))
    norm.eval()(data(seed=6))
    norm.train()(data()[:0])
    norm(data(), torch.zeros(6, 7, dtype=torch.bool))
    after = norm.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key != "num_batches_tracked")


@pytest.mark.parametrize("name", ALL)
def test_masked_positions_take_no_part(name: str) -> None:
    lengths = torch.tensor([7, 3, 5, 4, 6, 2])
    mask = torch.arange(7) < lengths[:, None]
    x = data()
    norm = randomize(make(name))
    y = copy.deepcopy(norm)(torch.where(mask[:, None], x, torch.nan), mask)
    assert not y.masked_select(~mask[:, None]).any()
    if name == "group_whitening":
        expected = torch.cat([norm(x[i : i + 1, :, :n])[0].T for i, n in enumerate(lengths)])
    elif name == "switchable_whitening":
        return  # each sample has statistics of its own beside those of the batch: the kit compares
    else:
        expected = norm(x.movedim(1, 2)[mask])
    assert_close(y.movedim(1, 2)[mask], expected, 1e-9)


@pytest.mark.parametrize("name", ALL)
def test_layouts_and_memory_agree(name: str) -> None:
    x = data((4, 8, 5, 3))
    first, last = make(name), make(name, channel_dim=-1)
    y = first(x)
    assert_close(last(x.movedim(1, -1)).movedim(-1, 1), y)
    shown = x.to(memory_format=torch.channels_last)
    z = make(name)(shown)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert_close(z, y)


def test_a_single_value_is_refused() -> None:
    for name in [*BATCH, "switchable_whitening"]:
        with pytest.raises(nz.NormzooError, match="one value per channel"):
            make(name)(torch.ones(1, 8, 1, dtype=torch.float64))


def test_whitening_coloring_gives_any_covariance() -> None:
    norm = make("whitening_coloring", eps=0.0)
    with torch.no_grad():
        norm.coloring.copy_(torch.linalg.cholesky(spread(*range(1, 9))))
    y = rows(norm(data((16, 8, 9))))
    np.testing.assert_allclose(y @ y.T / y.shape[1], spread(*range(1, 9)), atol=1e-9)
