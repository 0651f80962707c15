"""The placements of norms in a Transformer: each against its formula, written out here a second time."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normzoo.errors import NormzooError, OptionError
from normzoo.layers.base import Norm, parameter_roles
from normzoo.models import Inputs, Network, create_model, list_placements, renormalize_
from normzoo.models.placements import UnitLinear
from normzoo.models.transformer import PLACEMENTS, find_placement

DEPTH, WIDTH, HEADS = 4, 8, 2
PER_POSITION = Inputs((5, 3), per_position=True)


def build(placement: str, norm="layer_norm", seed: int = 0, inputs: Inputs = PER_POSITION, **options) -> Network:
    options = {"width": WIDTH, "heads": HEADS, "depth": DEPTH, "mlp_ratio": 2, "outputs": 4} | options
    norm = "none" if placement == "rezero" else norm
    torch.manual_seed(seed)
    return create_model("transformer", norm=norm, inputs=inputs, placement=placement, **options)


def shuffled(model: Network) -> Network:
    """Weights away from their start, in float64, so that no term is idle."""
    generator = torch.Generator().manual_seed(7)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=torch.float64, generator=generator), alpha=0.3)
    return model


def values(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the formulas, once more -----------------------------------------------------------------------------------------


def norm_of(layer: nn.Module, x: Tensor) -> Tensor:
    kind = type(layer).__name__
    if kind == "LayerNorm":
        x = x - x.sum(-1, keepdim=True) / x.shape[-1]
    else:
        assert kind == "RMSNorm"
    x = x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + layer.eps) ** 0.5
    weight, bias = layer.weight, getattr(layer, "bias", None)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True) ** 0.5


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attention(a: nn.Module, x: Tensor, sphere: bool = False) -> Tensor:
    """One head after the other."""
    size = WIDTH // HEADS
    bias = torch.zeros(3 * WIDTH, dtype=x.dtype) if sphere else a.qkv.bias
    weight = unit(a.qkv.weight) if sphere else a.qkv.weight
    q, k, v = ((x @ w.T + b).split(size, -1) for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True))
    heads = []
    for h in range(HEADS):
        parts = {"query": q[h], "key": k[h], "value": v[h]}
        for name in parts:
            if name in a.norms:
                parts[name] = norm_of(a.norms[name], parts[name])
            if sphere and name != "value":
                scale = a.query_key_scale.weight * math.sqrt(WIDTH)
                parts[name] = parts[name] * scale[h * size : (h + 1) * size]
        scores = parts["query"] @ parts["key"].mT / math.sqrt(size)
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
        y = scores.softmax(-1) @ parts["value"]
        heads.append(y if a.head_scale is None else y * a.head_scale[h])
    y = torch.cat(heads, -1)
    y = norm_of(a.norms["out"], y) if "out" in a.norms else y
    return y @ unit(a.out.weight.T) if sphere else y @ a.out.weight.T + a.out.bias


def mlp(m: nn.Sequential, x: Tensor, sphere: bool = False) -> Tensor:
    if sphere:
        return gelu(m[1].weight * (x @ unit(m[0].weight).T)) @ unit(m[-1].weight.T)
    y = gelu(x @ m[0].weight.T + m[0].bias)
    y = norm_of(m[3], y) if isinstance(m[3], Norm) else y
    return y @ m[-1].weight.T + m[-1].bias


def formula(name: str, model: Network, x: Tensor) -> Tensor:
    """What the head reads, from the embedding."""
    n, depth = norm_of, len(model.blocks)
    d = x
    for i, b in enumerate(model.blocks, 1):
        r, s = b.attention_residual, b.mlp_residual
        sphere = name == "ngpt"
        A, M = (lambda y: attention(b.attention, y, sphere)), (lambda y: mlp(b.mlp, y, sphere))  # noqa: B023
        match name:
            case "pre" | "sub_ln":
                x = x + A(n(r.norm, x))
                x = x + M(n(s.norm, x))
            case "post":
                x = n(r.norm, x + A(x))
                x = n(s.norm, x + M(x))
            case "sandwich" | "peri_ln":
                x = x + n(r.after, A(n(r.before, x)))
                x = x + n(s.after, M(n(s.before, x)))
            case "res_post":
                x = x + n(r.norm, A(x))
                x = x + n(s.norm, M(x))
            case "normformer":
                x = x + n(r.after, A(n(r.norm, x)))
                x = x + M(n(s.norm, x))
            case "deepnorm":
                x = n(r.norm, (2 * depth) ** 0.25 * x + A(x))
                x = n(s.norm, (2 * depth) ** 0.25 * x + M(x))
            case "layernorm_scaling":
                x = x + A(n(r.norm, x) / math.sqrt(i))
                x = x + M(n(s.norm, x) / math.sqrt(i))
            case "keel" if i == 1:
                x = x + A(n(r.before, x))
                x = n(s.after, x + M(n(s.before, x)))
            case "keel":
                x = n(r.after, 2 * depth * x + A(n(r.before, x)))
                x = n(s.after, 2 * depth * x + M(n(s.before, x)))
            case "b2t":
                h = n(r.norm, x + A(x))
                x = n(s.norm, x + h + M(h))
            case "residual_dual":
                d, x = d + A(x), n(r.norm, x + A(x))
                d, x = d + M(x), n(s.norm, x + M(x))
            case "mix_ln" if i <= depth / 4:
                x = n(r.norm, x + A(x))
                x = n(s.norm, x + M(x))
            case "mix_ln":
                x = x + A(n(r.norm, x))
                x = x + M(n(s.norm, x))
            case "hybrid_norm":
                x = x + A(x)
                x = n(s.norm, x) + M(n(s.norm, x))
            case "hybrid_norm(star=True)":
                x = x + A(n(r.norm, x) if i == 1 else x)
                x = x + M(n(s.norm, x)) if i == 1 else n(s.norm, x) + M(n(s.norm, x))
            case "rezero":
                x = x + r.scale * A(x)
                x = x + r.scale * M(x)
            case "layer_scale":
                x = x + r.scale * A(n(r.norm, x))
                x = x + s.scale * M(n(s.norm, x))
            case "ngpt":
                for p, f in ((r, A), (s, M)):
                    rate = (p.rate.weight * 0.05 * math.sqrt(WIDTH)).abs()
                    x = n(p.sum, (1 - rate) * x + rate * n(p.branch, f(x)))
            case _:
                raise AssertionError(name)
    if name == "residual_dual":
        return x + n(model.final_norm, d)
    return x if model.final_norm is None else n(model.final_norm, x)


ALL = sorted(set(list_placements()) | {"hybrid_norm(star=True)"})


@pytest.mark.parametrize("norm", ["layer_norm", {"*attention*": "rms_norm", "*": "layer_norm"}])
@pytest.mark.parametrize("placement", ALL)
def test_a_placement_is_its_formula(placement, norm):
    model = shuffled(build(placement, norm))
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, Norm)}
    if placement != "rezero":
        assert kinds == ({"LayerNorm"} if norm == "layer_norm" else {"LayerNorm", "RMSNorm"})
    x = values(3, 5, 3)
    h = x @ model.embedding.weight.T + model.embedding.bias + model.positions
    h = h if model.embedding_norm is None else norm_of(model.embedding_norm, h)
    y = formula(placement, model, h)
    if placement == "ngpt":
        cosines = y @ unit(model.head.map.weight).T / math.sqrt(WIDTH)
        expected = model.head.scale.weight * math.sqrt(WIDTH) * cosines
    else:
        expected = y @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


SITES = {
    "pre": ("attention", "mlp", "final"),
    "post": ("attention", "mlp"),
    "sandwich": ("attention.before", "attention.after", "mlp.before", "mlp.after", "final"),
    "peri_ln": ("attention.before", "attention.after", "mlp.before", "mlp.after", "final"),
    "res_post": ("attention", "mlp", "final"),
    "normformer": ("attention.before", "attention.after", "mlp", "mlp.hidden", "final"),
    "deepnorm": ("attention", "mlp"),
    "sub_ln": ("attention", "attention.out", "mlp", "mlp.hidden", "final"),
    "layernorm_scaling": ("attention", "mlp", "final"),
    "b2t": ("attention", "mlp"),
    "residual_dual": ("attention", "mlp", "final"),
    "mix_ln": ("attention", "mlp", "final"),
    "hybrid_norm": ("attention.query", "attention.key", "attention.value", "mlp", "final"),
    "layer_scale": ("attention", "mlp", "final"),
    "ngpt": ("attention.query", "attention.key", "attention.branch", "attention.sum", "mlp.branch", "mlp.sum",
             "embedding"),
    "rezero": (),
}  # fmt: skip


@pytest.mark.parametrize("placement", list_placements())
def test_the_sites_are_those_that_are_documented(placement):
    if placement == "rezero":
        return
    whole = ("final", "embedding")
    if placement == "keel":
        names = [f"blocks.{i}.{b}.{p}" for i in range(DEPTH) for b in ("attention", "mlp") for p in ("before", "after")]
        names.remove("blocks.0.attention.after")
    else:
        sites = SITES[placement]
        names = [f"blocks.{i}.{s}" for i in range(DEPTH) for s in sites if s not in whole]
        names += [s for s in sites if s in whole]
    # without "*", a site that is missing here and a name that is no site are both errors
    model = build(placement, dict.fromkeys(names, "rms_norm"))
    assert sum(isinstance(m, Norm) for m in model.modules()) == len(names)
    doc = PLACEMENTS[placement].__doc__ or ""
    assert sum(f"``{name}``" in doc for name in names) >= 2


def test_ngpt_is_the_authors_network_on_the_unit_sphere():
    """Their conventions: states of length one, softmax of root d times cosines, root d before the activation."""
    model = shuffled(build("ngpt", "rms_norm(affine=False, eps=0.0)"))
    x = values(3, 5, 3)
    h = unit(x @ model.embedding.weight.T + model.embedding.bias + model.positions)
    size = WIDTH // HEADS
    for b in model.blocks:
        a, m = b.attention, b.mlp
        q, k, v = (h @ unit(w).T for w in a.qkv.weight.chunk(3))
        s_qk = a.query_key_scale.weight * (1 / WIDTH**-0.5)
        y = []
        for i in range(HEADS):
            part = slice(i * size, (i + 1) * size)
            scores = (s_qk[part] * unit(q[..., part])) @ (s_qk[part] * unit(k[..., part])).mT * math.sqrt(size)
            scores = scores + torch.full((5, 5), float("-inf")).triu(1)
            y.append(scores.softmax(-1) @ v[..., part])
        h_a = unit(torch.cat(y, -1) @ unit(a.out.weight.T))
        rate = (b.attention_residual.rate.weight * (0.05 / WIDTH**-0.5)).abs()
        h = unit(h + rate * (h_a - h))
        u = m[1].weight * math.sqrt(WIDTH) * (h @ unit(m[0].weight).T)
        h_m = unit(gelu(u) @ unit(m[-1].weight.T))
        rate = (b.mlp_residual.rate.weight * (0.05 / WIDTH**-0.5)).abs()
        h = unit(h + rate * (h_m - h))
    expected = model.head.scale.weight * (1 / WIDTH**-0.5) * (h @ unit(model.head.map.weight).T)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


# ---- what every placement must keep ----------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("placement", ALL)
def test_a_causal_decoder_does_not_see_what_comes(placement, masked):
    inputs = Inputs((5,), vocabulary=9, per_position=True)
    model = shuffled(build(placement, inputs=inputs))
    x = torch.randint(9, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(x, dtype=torch.bool) if masked else None
    y = model(x, mask)
    for t in range(4):
        other = x.clone()
        other[:, t + 1 :] = (other[:, t + 1 :] + 1) % 9
        z = model(other, mask)
        torch.testing.assert_close(z[:, : t + 1], y[:, : t + 1], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(z[:, t + 1], y[:, t + 1])


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
@pytest.mark.parametrize("placement", ALL)
def test_padding_reaches_nothing(placement, norm):
    lengths = (6, 4, 1)
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    x = values(3, 6, 3)
    x[~mask] = float("nan")
    results = []
    inputs = Inputs((7, 3))
    for given, real in ((x, mask), (x.nan_to_num(5.0), mask), (F.pad(x, (0, 0, 0, 1), value=math.inf),
                                                               F.pad(mask, (0, 1)))):  # fmt: skip
        model = shuffled(build(placement, norm, inputs=inputs, depth=2, pool="mean"))
        y = model(given, real)
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        results.append((y, dict(model.named_buffers())))
    for y, buffers in results[1:]:
        torch.testing.assert_close(y, results[0][0], rtol=1e-10, atol=1e-10)
        for name, value in buffers.items():
            torch.testing.assert_close(value, results[0][1][name], rtol=1e-10, atol=1e-10, msg=name)
    if norm == "layer_norm":
        for i, length in enumerate(lengths):
            torch.testing.assert_close(y[i], model(x[i : i + 1, :length])[0], rtol=1e-10, atol=1e-10)


class Stranger(nn.Module):
    """A plain module, as a user writes one, that draws random numbers when it is made."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x / (1 + x.abs().mean(-1, keepdim=True))


@pytest.mark.parametrize("placement", [p for p in list_placements() if p != "rezero"])
def test_weights_that_are_no_norms_start_the_same_with_every_norm(placement):
    reference = dict(build(placement, "none").named_parameters())
    for norm in ("batch_norm", "rms_norm", Stranger):
        model = build(placement, norm)
        norms = set(parameter_roles(model))
        rest = {n: p for n, p in model.named_parameters() if n not in norms}
        assert norms
        assert rest.keys() == reference.keys()
        assert all(torch.equal(p, reference[n]) for n, p in rest.items())
        y = model(values(3, 5, 3).float())
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("placement", [p for p in list_placements() if p not in ("pre", "ngpt")])
def test_weights_start_the_same_with_every_placement(placement):
    pre, model = build("pre"), build(placement)
    gain = {"deepnorm": (8 * DEPTH) ** -0.25, "sub_ln": math.sqrt(math.log(2 * DEPTH))}.get(placement, 1.0)
    assert torch.equal(model.head.weight, pre.head.weight)
    for a, b in zip(model.blocks, pre.blocks, strict=True):
        for ours, theirs in (
            (a.mlp[0], b.mlp[0]),
            (a.mlp[-1], b.mlp[-1]),
            (a.attention.out, b.attention.out),
        ):
            torch.testing.assert_close(ours.weight, gain * theirs.weight, rtol=1e-6, atol=0)
        (q, k, v), (q2, k2, v2) = a.attention.qkv.weight.chunk(3), b.attention.qkv.weight.chunk(3)
        assert torch.equal(q, q2)
        assert torch.equal(k, k2)
        torch.testing.assert_close(v, gain * v2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("placement", ALL)
def test_copies_states_and_half_precision(placement):
    model = build(placement, "batch_norm", depth=2, dropout=0.1)
    x = values(3, 5, 3).float()
    model(x)
    fresh = build(placement, "batch_norm", depth=2, dropout=0.1, seed=5)
    fresh.load_state_dict(model.state_dict())
    y = model.eval()(x)
    assert torch.equal(y, fresh.eval()(x))
    assert torch.equal(y, copy.deepcopy(model)(x))
    half = model.train().bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


@pytest.mark.parametrize("placement", list_placements())
def test_a_placement_is_one_graph(placement):
    model = build(placement, "none", depth=2)
    x = values(3, 5, 3).float()
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


# ---- names and options -----------------------------------------------------------------------------------------------


def test_names_and_aliases():
    assert set(SITES) | {"keel"} == set(list_placements())
    for name in ("Mix-LN", "mixln", "MIX_LN"):
        assert find_placement(name).func is PLACEMENTS["mix_ln"]
    assert find_placement("ResiDual").func is PLACEMENTS["residual_dual"]
    assert find_placement(" keel( alpha = 3 ) ").keywords == {"alpha": 3}
    with pytest.raises(NormzooError, match="unknown placement 'sandwhich'; did you mean 'sandwich'"):
        build("sandwhich")
    with pytest.raises(OptionError, match="the placement 'mix_ln' has no option 'alfa'; did you mean 'alpha'"):
        build("mix_ln(alfa=0.5)")
    with pytest.raises(OptionError, match="the placement 'pre' has no option 'alpha'"):
        build("pre(alpha=1)")
    for spec in ("mix_ln(0.5)", "mix_ln(alpha=)", "mix_ln(alpha=len([]))", "mix_ln(**{})"):
        with pytest.raises(NormzooError, match="cannot read the options"):
            build(spec)
    with pytest.raises(NormzooError, match="unknown placement"):
        build("mix_ln(alpha=0.5")
    for spec in ("mix_ln(alpha=2)", "mix_ln(alpha='a')", "deepnorm(beta='a')", "keel(alpha=1e999)"):
        with pytest.raises(NormzooError, match=r"expected (a finite number|the fraction)"):
            build(spec)


def test_rezero_takes_no_norm():
    with pytest.raises(NormzooError, match=r"placement='rezero' has no norms, and got norm='layer_norm'; give norm="):
        create_model("transformer", norm="layer_norm", inputs=PER_POSITION, outputs=3, placement="rezero")
    model = create_model(
        "transformer", norm="layer_norm", inputs=PER_POSITION, outputs=3, placement="rezero", embedding_norm=True
    )
    assert type(model.embedding_norm).__name__ == "LayerNorm"  # that site it has


def test_how_many_blocks_are_post_norm():
    for alpha, depth, expected in ((0.25, 4, 1), (0.25, 3, 0), (0.7, 10, 7), (0.0, 4, 0), (1.0, 4, 4), (0.25, 12, 3)):
        model = build(f"mix_ln(alpha={alpha})", depth=depth)
        post = [block.attention_residual.post for block in model.blocks]
        assert post == [True] * expected + [False] * (depth - expected)
        assert post == [block.mlp_residual.post for block in model.blocks]


def test_constants_of_the_papers():
    model = build("deepnorm", depth=18)  # the values of an encoder of 18 layers
    assert model.blocks[0].attention_residual.alpha == pytest.approx(2.4495, abs=1e-4)
    assert model.blocks[0].attention_residual.beta == pytest.approx(0.2887, abs=1e-4)
    assert build("deepnorm(alpha=3, beta=0.5)").blocks[1].mlp_residual.alpha == 3
    for depth, init in ((12, 0.1), (18, 0.1), (24, 1e-5), (25, 1e-6)):
        assert torch.equal(build("layer_scale", depth=depth).blocks[0].mlp_residual.scale.detach(),
                           torch.full((WIDTH,), init))  # fmt: skip
    assert build("keel").blocks[1].mlp_residual.alpha == 2 * DEPTH
    assert build("keel").blocks[0].mlp_residual.alpha == 1


def test_corners():
    """One placement is another where its option says so."""
    x = values(3, 5, 3)

    for one, other in (
        ("mix_ln(alpha=0)", "pre"),
        ("layer_scale(init=1)", "pre"),
        ("deepnorm(alpha=1, beta=1)", "post"),
        ("sandwich", "peri_ln"),
    ):
        torch.testing.assert_close(
            build(one).double()(x), build(other).double()(x), rtol=1e-12, atol=1e-12, msg=f"{one} {other}"
        )
    for one, other in (("sandwich", "pre"), ("peri_ln", "pre"), ("sandwich", "res_post")):
        norms = {"*.after" if other == "pre" else "*.before": "none", "*": "rms_norm"}
        torch.testing.assert_close(build(one, norms).double()(x), build(other, "rms_norm").double()(x))
    hidden = build("normformer", {"*.after": "none", "*.hidden": "none", "*": "rms_norm"}).double()
    torch.testing.assert_close(hidden(x), build("pre", "rms_norm").double()(x))
    ends = {"blocks.*.before": "none", "*": "rms_norm"}
    post = build("post", {"blocks.0.attention": "none", "*": "rms_norm"}).double()
    torch.testing.assert_close(build("keel(alpha=1)", ends).double()(x), post(x))


# ---- what the papers say of the start --------------------------------------------------------------------------------


def slope(xs: list[int], ys: list[float]) -> float:
    x, y = torch.tensor(xs).double().log(), torch.tensor(ys).double().log()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def last_gradient(placement: str, depth: int) -> float:
    """Size of the gradient of the last block's last matrix, at the start."""
    sizes = []
    for seed in range(5):
        inputs = Inputs((8,), vocabulary=20, per_position=True)
        model = build(placement, seed=seed, depth=depth, width=32, heads=4, inputs=inputs, outputs=20, causal=False)
        x = torch.randint(20, (8, 8), generator=torch.Generator().manual_seed(seed))
        F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        sizes.append(model.blocks[-1].mlp[-1].weight.grad.norm().item())
    return sum(sizes) / len(sizes)


def test_the_last_gradient_over_depth():
    """Xiong et al. 2020: it does not shrink with depth under post-norm, and does as 1 / sqrt(L) under pre-norm."""
    depths = [2, 6, 12, 24]
    pre, post = ([last_gradient(p, n) for n in depths] for p in ("pre", "post"))
    assert -0.7 <= slope(depths, pre) <= -0.25
    assert slope(depths, post) >= 0
    assert post[-1] > 3 * pre[-1]


def stream_variances(placement: str, depth: int = 12) -> list[float]:
    """Variance of what enters each block, and leaves the last."""
    seen = []
    model = build(placement, depth=depth, width=64, heads=4, seed=3)
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, y: seen.append((args[0].var().item(), y.var().item())))
    with torch.no_grad():
        model(values(16, 5, 3).float())
    return [seen[0][0], *(after for _, after in seen)]


def test_the_variance_of_the_stream_over_depth():
    peri = stream_variances("peri_ln")
    for i, variance in enumerate(peri):  # Kim et al. 2025: one more for each of two branches
        assert variance - peri[0] == pytest.approx(2 * i, rel=0.25)
    pre, scaled = stream_variances("pre"), stream_variances("layernorm_scaling")
    assert scaled[-1] - scaled[0] < 0.5 * (pre[-1] - pre[0])  # Sun et al. 2025: a harmonic sum rather than a linear one
    post = stream_variances("post")
    assert all(variance == pytest.approx(1, rel=0.02) for variance in post[1:])


def update_of_a_step(placement: str, depth: int) -> float:
    """How far one small step of SGD moves the answer, by the weights that the theorem is about, per learning rate."""
    moved, rate = [], 1e-5
    for seed in range(3):
        inputs = Inputs((4,), vocabulary=20)
        model = build(placement, seed=seed, depth=depth, width=32, heads=4, inputs=inputs, outputs=8, causal=False)
        model.double().requires_grad_(False)
        weights = []
        for block in model.blocks:
            qkv = block.attention.qkv.weight.requires_grad_()
            weights += [(qkv, slice(64, 96)), *((m.weight.requires_grad_(), slice(None)) for m in
                                                (block.attention.out, block.mlp[0], block.mlp[-1]))]  # fmt: skip
        x = torch.randint(20, (8, 4), generator=torch.Generator().manual_seed(seed))
        before = model(x)
        F.cross_entropy(before, x[:, 0] % 8).backward()
        with torch.no_grad():
            for weight, rows in weights:
                weight[rows] -= rate * weight.grad[rows]
            moved.append((model(x) - before).norm(dim=-1).mean().item() / rate)
    return sum(moved) / len(moved)


def test_the_update_of_deepnorm_is_bounded_over_depth():
    """Wang et al. 2022: bounded by a constant under DeepNorm, growing with depth under post-norm."""
    depths = [2, 8, 32]
    deep, post = ([update_of_a_step(p, n) for n in depths] for p in ("deepnorm", "post"))
    assert slope(depths, deep) < 0.15
    assert slope(depths, post) > 0.6


def test_rezero_starts_as_the_identity():
    model = build("rezero", depth=30).double()
    x = values(2, 5, WIDTH).requires_grad_()
    y = x
    for block in model.blocks:
        y = block(y, None, None, True)
    assert torch.equal(y, x)
    scales = [n for n, _ in model.named_parameters() if n.endswith("scale")]
    assert len(scales) == 30  # one for the two branches of a block
    y.square().sum().backward()
    assert torch.equal(x.grad, 2 * x)
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith("blocks"))


def test_keel_keeps_the_gradient_of_the_residual_over_depth():
    """Chen and Wei 2026, equations 15 and 19: along the residual it falls as 2^(-L/2) under post-norm, not here."""

    def kept(placement: str, depth: int) -> float:
        model = build(placement, "rms_norm", depth=depth, width=64, heads=4).double()
        x, weight = values(4, 5, 64).requires_grad_(), values(4, 5, 64, seed=2)
        y = x
        for block in model.blocks:
            attend, transform = block.branches(None, None, True)
            y = block.attention_residual(y, lambda z: attend(z).detach(), None)  # noqa: B023
            y = block.mlp_residual(y, lambda z: transform(z).detach(), None)  # noqa: B023
        (y * weight).sum().backward()
        return (x.grad.norm() / weight.norm()).item()

    keel = [kept("keel", depth) for depth in (6, 12, 24)]  # what is lost is lost in the first block, which has alpha 1
    assert keel == pytest.approx([keel[0]] * 3, rel=0.1)
    assert keel[0] > 0.5
    assert kept("post", 12) < 0.1
    assert kept("post", 24) < kept("post", 12) / 10


# ---- nGPT: on the sphere ---------------------------------------------------------------------------------------------


def test_ngpt_stays_on_the_sphere_through_training():
    model = build("ngpt", "rms_norm(affine=False)")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    states = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, y: states.append(y))
    for step in range(3):
        x = values(3, 5, 3, seed=step).float()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        weights = [m for m in model.modules() if isinstance(m, UnitLinear)]
        assert len(weights) == 4 * DEPTH + 1
        assert max((m.weight.norm(dim=m.dim) - 1).abs().max().item() for m in weights) > 1e-3
        before = model(x)
        renormalize_(model)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
        for m in weights:
            torch.testing.assert_close(m.weight.norm(dim=m.dim), torch.ones(m.weight.shape[1 - m.dim]))
        assert {m.dim for m in weights} == {0, 1}
    for y in states:
        torch.testing.assert_close(y.norm(dim=-1) / math.sqrt(WIDTH), torch.ones(3, 5), rtol=1e-4, atol=1e-4)
    assert not any(n.endswith("bias") for n, _ in model.named_parameters() if n.startswith(("blocks", "head")))


def test_ngpt_starts_with_cosines():
    model = build("ngpt", "rms_norm(affine=False)", outputs=50)
    assert model(values(3, 5, 3).float()).abs().max() <= 1 + 1e-5
