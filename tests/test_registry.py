"""Names, specs, files, entry points, strangers."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import normzoo as nz
from normzoo import registry
from normzoo.layers.foreign import ForeignNorm
from normzoo.layers.sample import GroupNorm

USER_FILE = """
    import torch
    from torch import nn
    import normzoo as nz

    class PeakNorm(nn.Module):
        "Divide by the largest magnitude over channels."
        def __init__(self, num_features, eps=1e-5):
            super().__init__()
            self.eps = eps
            self.weight = nn.Parameter(torch.ones(num_features))
        def forward(self, x):
            y = x / (x.abs().amax(1, keepdim=True) + self.eps)
            return y * self.weight.view(1, -1, *[1] * (x.ndim - 2))

    class HaloNorm(nz.MomentNorm):
        moments = "b (g c) s -> g"

    number = 3
    study = nz.Study("x", norms=["batch_norm"], tasks=["digits/cnn"]) if False else None
"""


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "my_file.py"
    path.write_text(textwrap.dedent(USER_FILE))
    return path


@pytest.fixture
def scratch_registry():
    norms, names = dict(registry._norms), dict(registry._names)
    yield
    registry._norms.clear()
    registry._names.clear()
    registry._norms.update(norms)
    registry._names.update(names)


def test_look_up_ignores_case_and_separators():
    for spec in ("GroupNorm", "group-norm", "GROUP_NORM", "gn"):
        assert isinstance(nz.create(spec, 16), GroupNorm)


def test_options_in_specs_and_partials():
    for spec in ("group_norm(groups=8)", functools.partial(GroupNorm, groups=8)):
        norm = nz.create(spec, 16, channel_dim=-1)
        assert norm.sizes == {"g": 8}
        assert norm.channel_dim == -1
    assert nz.create("batch_norm(momentum=None, affine=False)", 4).momentum is None
    with pytest.raises(nz.NormzooError, match="given both"):
        nz.create("group_norm(groups=8)", 16, groups=4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("bach_norm", "did you mean 'batch_norm'"), ("zzz", r"known: .*batch_norm.* in all"),
     ("group_norm(group=8)", "did you mean 'groups'"), ("group_norm(8)", "name=literal"),
     ("group_norm(groups=print(1))", "name=literal"), ("group_norm(groups=8", "unknown norm"), ("", "empty"),
     ("no_such_module:Norm", "no module"), ("no_such_file.py:Norm", "no file"), ("math:sinn", "unknown norm in math"),
     (3, "no norm"), ("torch.nn:GroupNorm", "needs the option"), ("peak.py", r"as in 'peak\.py:MyNorm'"),
     (functools.partial(nn.LayerNorm, normalized_shape=16), "cannot be made from a width alone")],
)  # fmt: skip
def test_bad_specs_are_answered(spec, message, capsys):
    with pytest.raises(nz.NormzooError, match=message):
        nz.create(spec, 16)
    assert capsys.readouterr().out == ""  # nothing was evaluated


def test_a_class_that_takes_no_width_is_refused():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()

    with pytest.raises(nz.NormzooError, match=r"Fixed cannot be made from a width alone.* it takes \(\)"):
        nz.create(Fixed, 16)


def test_register_as_decorator_and_call(scratch_registry):
    @nz.register("halo_norm", aliases=("halo",))
    class HaloNorm(nz.MomentNorm):
        moments = "b (g c) s -> g"

    assert isinstance(nz.create("Halo(groups=2)", 8), HaloNorm)
    assert nz.register("plain", nn.LayerNorm) is nn.LayerNorm
    assert "plain" in nz.list_norms("pl*")
    nz.register("halo_norm", HaloNorm)  # the same once more is no mistake
    with pytest.raises(nz.NormzooError, match="taken by 'batch_norm'"):
        nz.register("BatchNorm", nn.LayerNorm)
    with pytest.raises(nz.NormzooError, match="no name"):
        nz.register("my norm", nn.LayerNorm)


def test_entry_points(scratch_registry, monkeypatch):
    entry = importlib.metadata.EntryPoint("visitor_norm", "torch.nn:LayerNorm", registry.ENTRY_POINTS)
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [entry] if group == registry.ENTRY_POINTS else []
    )
    monkeypatch.setattr(registry, "_loaded", False)
    assert nz.create("visitor_norm", 4, channel_dim=-1)(torch.randn(2, 5, 4)).shape == (2, 5, 4)


def test_files(user_file, monkeypatch):
    norm = nz.create(f"{user_file}:PeakNorm(eps=0.5)", 4)
    assert norm.module.eps == 0.5
    assert isinstance(nz.create(f"{user_file}:HaloNorm(groups=2)", 4), nz.MomentNorm)
    monkeypatch.chdir(user_file.parent)
    assert type(nz.create("my_file.py:PeakNorm", 4).module) is type(norm.module)  # one file is one module
    with pytest.raises(nz.NormzooError, match="did you mean 'PeakNorm'"):
        nz.create("my_file.py:PeekNorm", 4)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\ndef f(:\n    pass", "{file}, line 2 raised SyntaxError: invalid syntax\n    def f(:\n          ^"),
        ("import torch_\n", "{file}, line 1 raised ModuleNotFoundError: No module named 'torch_'\n"),
        ("import sys\n\nsys.exit('no')", "{file}, line 3 raised SystemExit: no\n"),
        ("import unfinished", "{folder}/unfinished.py, line 1 raised SyntaxError: '(' was never closed\n    x = (\n"),
        ("import normzoo as nz\nnz.create('bach_norm', 4)", "{file}, line 2: unknown norm 'bach_norm'"),
        ("eval('1 +')", "{file}, line 1 raised SyntaxError: "),
        ("\0", "{file} raised SyntaxError: source code string cannot contain null bytes"),
    ],
)
def test_a_file_that_raises_shows_its_own_lines_alone(tmp_path, text, told):
    file = tmp_path / "broken.py"
    file.write_text(text)
    (tmp_path / "unfinished.py").write_text("x = (\n")
    for _ in range(2):  # nothing of it stays behind
        with pytest.raises(nz.NormzooError) as error:
            nz.create(f"{file}:Norm", 4)
        assert str(error.value).startswith(told.format(file=file, folder=tmp_path))
        assert str(Path(registry.__file__).parent) not in str(error.value)
        assert "importlib" not in str(error.value)
    assert not [name for name in sys.modules if name.startswith("normzoo_file_broken")]


def test_of_what_a_file_calls_its_neighbours_are_shown(tmp_path, monkeypatch):
    (tmp_path / "helper_of_a_norm.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear('a', 3)\n")
    (tmp_path / "calls_it.py").write_text("import helper_of_a_norm\n\nhelper_of_a_norm.make()\n")
    monkeypatch.syspath_prepend(tmp_path)
    for spec in (f"{tmp_path / 'calls_it.py'}:Norm", "calls_it:Norm"):
        with pytest.raises(nz.NormzooError, match="line 4 raised TypeError") as error:
            nz.create(spec, 4)
        files = [line.split('"')[1] for line in str(error.value).splitlines() if line.startswith("  File")]
        assert files == [str(tmp_path / "calls_it.py"), str(tmp_path / "helper_of_a_norm.py")]
        assert "nn.Linear('a', 3)" in str(error.value)


def test_canonical_names_are_found_by_another_process(user_file):
    specs = ["gn(groups=4)", f"{user_file}:PeakNorm", "torch.nn:LayerNorm(eps=0.1)"]
    names = [registry.canonical(spec) for spec in specs]
    assert names[0] == "group_norm(groups=4)"
    assert registry.canonical(functools.partial(GroupNorm, groups=4)) == names[0]
    peak, _ = registry.resolve(names[1])
    assert registry.canonical(peak) == names[1]
    assert [registry.label(name) for name in names] == ["group_norm(groups=4)", "PeakNorm", "LayerNorm(eps=0.1)"]
    code = f"import normzoo as nz\nfor name in {names!r}: nz.create(name, 8)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", timeout=120)


def test_what_cannot_be_named_is_refused():
    class Local(nn.Module):
        pass

    for spec in (lambda width: nn.LayerNorm(width, eps=0.1), Local, functools.partial(GroupNorm, 8)):
        with pytest.raises(nz.NormzooError, match=r"top level|positional"):
            registry.canonical(spec)
    with pytest.raises(nz.NormzooError, match="no literal"):
        registry.canonical(functools.partial(GroupNorm, groups=torch.tensor(8)))


def test_source_hash_knows_the_code_and_not_the_comments(user_file):
    def digest(text: str) -> str | None:
        path = user_file.with_name(f"version{abs(hash(text))}.py")
        path.write_text(textwrap.dedent(text))
        return registry.source_hash(f"{path}:PeakNorm")

    original = digest(USER_FILE)
    assert original is not None
    assert digest(USER_FILE + "\n    # a remark\n") == original
    assert digest(USER_FILE.replace("1e-5", "1e-6")) != original
    assert registry.source_hash("batch_norm") is None
    assert registry.source_hash("torch.nn:LayerNorm") is None


def test_info_tells_what_a_page_needs():
    for name in nz.list_norms():
        info = nz.info(name)
        assert info.summary.endswith(".")
        assert "y =" in info.formula
        assert info.traits is not None
        assert info.source.rpartition(":")[0].endswith(".py")
        assert "channel_dim" in info.options
        if info.paper is not None:
            assert str(info.paper.year) in info.norm.__doc__
            assert (info.paper.arxiv or info.paper.venue) in info.norm.__doc__
        assert (info.paper is None) == (name == "none")
    assert nz.info("rms_norm").parameters_per_channel == 1


# ---- strangers -------------------------------------------------------------------------------------------------------

LAYOUTS = [((4, 16, 5, 6), 1), ((4, 16, 7), 1), ((4, 16), 1), ((4, 7, 16), -1), ((4, 5, 6, 16), -1), ((4, 16), -1)]


@pytest.mark.parametrize(("shape", "channel_dim"), LAYOUTS)
@pytest.mark.parametrize("stranger", [nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d])
def test_torch_layers_work_in_every_layout(stranger, shape, channel_dim):
    ours = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}.get(stranger.__name__, "batch_norm")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    norm = nz.create(stranger, 16, channel_dim=channel_dim)
    assert isinstance(norm, ForeignNorm)
    torch.testing.assert_close(norm(x), nz.create(ours, 16, channel_dim=channel_dim)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "channel_dim"), LAYOUTS)
def test_a_plain_module_of_a_user_works_in_every_layout(user_file, shape, channel_dim):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    norm = nz.create(f"{user_file}:PeakNorm(eps=0.0)", 16, channel_dim=channel_dim)
    torch.testing.assert_close(norm(x), x / x.abs().amax(channel_dim, keepdim=True))


def test_a_stranger_never_sees_padding_and_says_that_it_takes_no_mask():
    norm = nz.create(nn.LayerNorm, 4, channel_dim=-1)
    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    x[~mask] = float("nan")
    with pytest.warns(UserWarning, match="takes no mask"):
        y = norm(x, mask)
    assert (y[~mask] == 0).all()
    torch.testing.assert_close(y[mask], nn.LayerNorm(4)(x[mask]))


def test_a_stranger_that_takes_a_mask_gets_it():
    class Masked(nn.Module):
        def __init__(self, num_features, channel_dim=1):
            super().__init__()
            self.seen = None

        def forward(self, x, mask=None):
            self.seen = mask
            return x

    norm = nz.create(Masked, 4, channel_dim=-1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    norm(torch.randn(2, 3, 4), mask)
    assert norm.module.seen is mask


def test_a_stranger_that_fits_nowhere_is_refused_with_what_was_tried():
    class Fussy(nn.Module):
        def __init__(self, num_features):
            super().__init__()

        def forward(self, x):
            raise RuntimeError("only on Sundays")

    with pytest.raises(nz.NormzooError, match="only on Sundays") as error:
        nz.create(Fussy, 4)(torch.randn(2, 4, 3))
    assert "channels last" in str(error.value)
    assert "channel_dim" in str(error.value)
    with pytest.raises(nz.NormzooError, match=r"expected an nn\.Module"):
        nz.create(lambda width: width, 4)


def test_making_and_probing_a_stranger_consumes_no_random_numbers():
    class Random(nn.Module):
        def __init__(self, num_features):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(num_features))

        def forward(self, x):
            return x * self.weight

    before = torch.random.get_rng_state()
    norm = nz.create(Random, 4, channel_dim=-1)
    norm(torch.ones(2, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
