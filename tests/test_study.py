from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import normzoo as nz
from normzoo import registry, tasks
from normzoo.errors import NormzooError
from normzoo.study import Cell, Study, grid, load_study_file, store
from normzoo.study.progress import Progress, best_so_far
from normzoo.study.runner import Summary
from normzoo.study.spec import flatten, foresee

NORMS = ["batch_norm", "group_norm(groups=2)", "rms_norm"]


def study(**changes) -> Study:
    return Study(**{"name": "s", "norms": NORMS, "tasks": ["digits/mlp"], "seeds": range(2)} | changes)


# ------------------------------------------------------------------------------------------------------------ studies


def test_a_study_expands_to_every_combination_once():
    cells = study(tasks=["digits/mlp", "digits/cnn"], settings=grid(lr=[0.1, 0.2])).cells()
    assert len(cells) == len({cell.id for cell in cells}) == 2 * 2 * 3 * 2
    assert [cell.seed for cell in cells[:6]] == [0, 0, 0, 1, 1, 1]  # the norms of one seed, side by side
    assert {cell.setting.lr for cell in cells} == {0.1, 0.2}
    groups = {}
    for cell in cells:
        groups.setdefault(cell.group, set()).add(cell.seed)
    assert len(groups) == 12
    assert all(seeds == {0, 1} for seeds in groups.values())


def test_grid_takes_lists_and_single_values():
    assert grid() == [{}]
    assert grid(lr=(0.1, 0.2), optimizer="sgd", model={"depth": 2})[1] == {
        "lr": 0.2,
        "optimizer": "sgd",
        "model": {"depth": 2},
    }


def test_norms_may_be_classes_partials_and_a_mapping():
    from normzoo.layers.sample import GroupNorm

    found = study(norms={"ours": functools.partial(GroupNorm, groups=2), "torch's": nn.InstanceNorm2d}).labels
    assert found == {"ours": "group_norm(groups=2)", "torch's": "torch.nn.modules.instancenorm:InstanceNorm2d"}
    assert study(norms=["GroupNorm(groups=2)", "RMS-norm"]).labels == {
        "GroupNorm(groups=2)": "group_norm(groups=2)",
        "RMS-norm": "rms_norm",
    }


def test_the_baseline_is_batch_norm_or_the_first_or_the_one_that_is_named():
    assert study().baseline == "batch_norm"
    assert study(norms=["rms_norm", "none"]).baseline == "rms_norm"
    assert study(norms={"a": "none", "b": "batch_norm"}).baseline == "b"
    assert study(baseline="RMSNorm").baseline == "rms_norm"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../evil"}, "letters, digits"),
        ({"name": ""}, "letters, digits"),
        ({"norms": []}, "at least one norm"),
        ({"norms": "batch_norm"}, r"write \['batch_norm'\]"),
        ({"norms": ["bach_norm"]}, "did you mean 'batch_norm'"),
        ({"norms": ["group_norm(grops=2)"]}, "did you mean 'groups'"),
        ({"norms": ["batch_norm", "BatchNorm"]}, "given twice"),
        ({"norms": [lambda n: nn.Identity()]}, "cannot be named"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": "digits/mlp"}, "list of names"),
        ({"tasks": ["digits/cn"]}, "did you mean 'cnn'"),
        ({"tasks": ["digit/cnn"]}, "did you mean 'digits'"),
        ({"tasks": ["digits/rnn", "digits/lstm"]}, "given twice"),
        ({"settings": grid(learning_rate=0.1)}, "learning_rate"),
        ({"settings": grid(epoch=1)}, "did you mean 'epochs'"),
        ({"settings": []}, "settings is empty"),
        ({"settings": [0.1]}, "must be a mapping"),
        ({"settings": grid(lr=[0.1, 0.1])}, "two settings are the same"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": range(0)}, "at least one seed"),
        ({"seeds": 3}, r"range\(3\)"),
        ({"seeds": [0, 0]}, "given twice"),
        ({"seeds": [-1]}, "from 0"),
        ({"seeds": [1.0]}, "whole number"),
        ({"baseline": "layer_norm"}, "not among the norms"),
        ({"baseline": "bath_norm"}, "did you mean 'batch_norm'"),
        ({"threads": 0}, "threads"),
        ({"accelerator": "cudo"}, "did you mean 'cuda'"),
    ],
)
def test_bad_input_is_one_clear_message(changes, message):
    with pytest.raises(NormzooError, match=message):
        study(**changes)


def test_an_empty_choice_is_refused():
    with pytest.raises(NormzooError, match=r"grid\(lr=\[\]\)"):
        grid(lr=[])


# ---------------------------------------------------------------------------------------------------------------- ids


@functools.cache
def cell() -> Cell:
    return study().cells()[0]


def test_an_id_depends_on_what_decides_the_result_and_on_nothing_else():
    own = cell()
    same = [
        dataclasses.replace(own, study="another"),
        dataclasses.replace(own, label_of_norm="another"),
        dataclasses.replace(own, imports=("/somewhere.py",)),
        study(name="t", norms=["rms_norm", "batch_norm"], seeds=[7, 0], baseline="rms_norm").cells()[3],
    ]
    assert {each.id for each in same} == {own.id}
    other = [
        dataclasses.replace(own, norm="rms_norm"),
        dataclasses.replace(own, task="digits/cnn"),
        dataclasses.replace(own, seed=1),
        dataclasses.replace(own, threads=2),
        dataclasses.replace(own, accelerator="cuda"),
        dataclasses.replace(own, source_hash="0"),
        dataclasses.replace(own, setting=dataclasses.replace(own.setting, lr=0.5)),
        dataclasses.replace(own, setting=dataclasses.replace(own.setting, data={"size": 16})),
    ]
    ids = [own.id, *(each.id for each in other)]
    assert len(set(ids)) == len(ids)
    assert own.group == other[2].group  # another seed
    assert own.key == other[5].key  # another source


def test_an_id_does_not_depend_on_where_a_norms_file_lies():
    first, second = (
        dataclasses.replace(cell(), norm=f"{folder}/mine.py:Mine(a=1)", source_hash="0") for folder in ("/a", "C:\\b")
    )
    assert first.id == second.id
    assert first.id != dataclasses.replace(first, norm="/a/mine.py:Mine(a=2)").id


@settings(deadline=None)
@given(st.permutations(list(range(6))))
def test_the_order_of_options_does_not_count(order):
    options = [("a", 1), ("b", 2.5), ("c", None), ("d", "x"), ("e", True), ("f", (1, 2))]
    own = cell()
    mixed = dict(options[i] for i in order)
    first, second = (
        dataclasses.replace(own, setting=dataclasses.replace(own.setting, model=m)) for m in (dict(options), mixed)
    )
    assert first.id == second.id


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=3).filter(lambda t: "." not in t), st.floats(allow_nan=False)))
def test_flattening_loses_nothing(options):
    assert flatten({"model": options}) == {f"model.{key}": value for key, value in options.items()}


def test_settings_that_json_cannot_say_are_refused_by_name():
    own = cell()
    odd = dataclasses.replace(own, setting=dataclasses.replace(own.setting, model={"width": float("inf")}))
    with pytest.raises(NormzooError, match=r"model\.width"):
        _ = odd.id


def test_ids_are_the_same_in_another_process_which_loads_no_lightning():
    program = """
        import sys, json, normzoo as nz
        from normzoo.study import runner, store
        study = nz.Study("s", norms=["batch_norm", "group_norm(groups=2)", "rms_norm"], tasks=["digits/mlp"], seeds=[0])
        cells = study.cells()
        study.record(cells), cells[0].header()
        print(json.dumps([[cell.id for cell in cells], sorted({"pytorch_lightning", "wandb"} & set(sys.modules))]))
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        check=True,
        text=True,
    )
    ids, heavy = json.loads(out.stdout)
    assert ids == [each.id for each in study(seeds=[0]).cells()]
    assert heavy == []


def test_reading_results_loads_no_torch():
    program = "import sys, normzoo.study.store, normzoo.study.runner; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert out.stdout.strip() == "False"


# -------------------------------------------------------------------------------------------------------- study files


@pytest.fixture
def own_registry(monkeypatch):
    """What a study file registers is forgotten with the test."""
    registry.list_norms()
    for name in ("_norms", "_names", "_files"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


def write(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


def test_what_will_fail_is_foreseen_once_for_each_combination(monkeypatch):
    built = []
    check = tasks.check_compatible
    monkeypatch.setattr(tasks, "check_compatible", lambda *what: (built.append(what[:2]), check(*what)))
    cells = study(
        norms=["group_norm(groups=7)", "group_norm(groups=8)"],
        tasks=["digits/transformer"],
        settings=grid(lr=[0.1, 0.2], width=[48, 56]),
        seeds=range(3),
    ).cells()
    outlook = foresee(cells)
    assert len(built) == 4, "neither the seed nor the learning rate makes another model"
    assert (len(cells), outlook.failing) == (24, 6)
    assert str(outlook).startswith("6 cells will fail, as the model cannot be built:\n- digits/transformer with group_")
    outlook.check()  # which is no reason not to run the others
    assert (str(foresee(study().cells())), foresee(study().cells()).failing) == ("", 0)


@pytest.mark.usefixtures("own_registry")
def test_a_study_file_is_the_first_thing_a_training_runs(tmp_path):
    file = write(
        tmp_path / "good.py",
        """
        import normzoo as nz

        @nz.register("test_study_halo")
        class Halo(nz.MomentNorm):
            moments = "b (g c) s -> g"

        study = also = nz.Study("good", norms=[Halo, "test_study_halo(groups=2)"], tasks=["digits/mlp"], seeds=[0])
        """,
    )
    found = load_study_file(file)
    cells = found.cells()
    assert [each.imports for each in cells] == [(str(file),)] * 2
    assert [each.norm for each in cells] == ["test_study_halo", "test_study_halo(groups=2)"]
    assert all(each.source_hash for each in cells)
    built = study(norms=["test_study_halo"]).cells()[0]  # whoever builds the study, the norm's file is known
    assert built.imports == (str(file),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no study"),
        (
            """
            import normzoo as nz
            a = nz.Study("a", norms=["none"], tasks=["digits/mlp"])
            b = nz.Study("b", norms=["none"], tasks=["digits/mlp"])
            """,
            r"several studies \(a, b\)",
        ),
        ("\nimport normzoo as nz\nnz.Study('a', norms=['bach_norm'], tasks=['digits/mlp'])", "line 3: unknown norm"),
        ("x = 1\ny = 1 / 0", "line 2 raised ZeroDivisionError: division by zero\n(.*\n)*.*y = 1 / 0"),
        ("x = (", "line 1 raised SyntaxError"),
        ("import sys\nsys.exit(3)", "line 2 raised SystemExit"),
        ("import nothing_of_that_name", "line 1 raised ModuleNotFoundError"),
    ],
)
def test_a_bad_study_file_is_one_clear_message(tmp_path, text, message):
    with pytest.raises(NormzooError, match=message):
        load_study_file(write(tmp_path / "bad.py", text))


def test_a_missing_study_file_is_one_clear_message(tmp_path):
    for path in (tmp_path / "none.py", tmp_path, write(tmp_path / "study.txt", "")):
        with pytest.raises(NormzooError, match="is no study file"):
            load_study_file(path)


# ---------------------------------------------------------------------------------------------------------- the store


def row_of(each: Cell, status: str = "done", **found) -> dict:
    return store.make_result(each.header(), status, **{"metrics": {"val/accuracy": 0.5}} | found)


def put(directory: Path, each: Cell, **found) -> Path:
    folder = store.prepare_cell(directory, each.header())
    store.write_json_atomic(folder / store.RESULT, row_of(each, **found))
    return folder / store.RESULT


def test_results_come_back_in_order_with_the_labels_of_now(tmp_path):
    mine = study()
    cells = mine.cells()
    store.open_study(tmp_path, mine.record(cells))
    for each in reversed(cells[:3]):
        put(tmp_path, each, status="diverged" if each is cells[0] else "done", metrics={"val/loss": float("nan")})
    rows = store.load_results(tmp_path)
    assert [row["id"] for row in rows] == [each.id for each in cells[:3]]
    assert rows[0]["metrics"] == {"val/loss": None}
    assert rows[0]["nonfinite"] == ["val/loss"]
    assert store.overview(tmp_path) == {"done": 2, "diverged": 1, "failed": 0, "unfinished": 3}
    assert store.is_done(tmp_path, cells[0].id)
    assert not store.is_done(tmp_path, cells[3].id)
    renamed = study(norms={"BN": "batch_norm", "GN": "group_norm(groups=2)", "RMS": "rms_norm"})
    store.open_study(tmp_path, renamed.record(renamed.cells()))
    assert [row["label"] for row in store.load_results(tmp_path)] == ["BN", "GN", "RMS"]


FOREIGN = {
    "empty": lambda whole: b"",
    "a list": lambda whole: b"[]",
    "an empty object": lambda whole: b"{}",
    "no text": lambda whole: b"\xff\x00",
    "another status": lambda whole: whole.replace(b'"done"', b'"great"'),
    "another cell": lambda whole: whole.replace(cell().id.encode(), b"0" * 16),
    "no seed": lambda whole: whole.replace(b'"seed"', b'"sed"'),
}


@settings(deadline=None)
@given(st.floats(0, 1) | st.sampled_from(sorted(FOREIGN)))
def test_a_torn_or_foreign_result_is_skipped_by_name(tmp_path_factory, damage):
    directory = tmp_path_factory.mktemp("torn")
    path = put(directory, cell())
    whole = path.read_bytes().rstrip()
    torn = FOREIGN[damage](whole) if isinstance(damage, str) else whole[: int(damage * (len(whole) - 1))]
    path.write_bytes(torn)
    with pytest.warns(store.StoreWarning, match=r"result\.json"):
        assert store.load_result(directory, cell().id) is None


def test_torn_lines_of_a_curve_are_skipped_by_number_and_closed_by_the_next_append(tmp_path):
    folder = store.prepare_cell(tmp_path, cell().header())
    path = folder / store.METRICS
    store.append_line(path, {"step": 0, "train/loss": 1.0})
    with path.open("ab") as file:
        file.write(b'{"step": 1, "tr\xff')
    store.append_line(path, {"step": 2, "train/loss": float("-inf")})
    with pytest.warns(store.StoreWarning, match=r"metrics\.jsonl, line 2"):
        rows = store.load_metrics(tmp_path, cell().id)
    assert rows == [{"step": 0, "train/loss": 1.0}, {"step": 2, "train/loss": None, "nonfinite": ["train/loss"]}]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.json"
    store.write_json_atomic(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(OSError, match="No space left"):
            store.write_json_atomic(path, {"a": 2})
    assert store.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_attempt_starts_empty(tmp_path):
    put(tmp_path, cell())
    folder = store.cell_dir(tmp_path, cell().id)
    store.append_line(folder / store.METRICS, {"step": 0})
    (folder / ".result.json.1.tmp").write_text("left by a crash")
    store.prepare_cell(tmp_path, cell().header(attempt=2))
    assert [path.name for path in folder.iterdir()] == [store.CONFIG]
    config = store.load_config(tmp_path, cell().id)
    assert config is not None
    assert config["attempt"] == 2


def test_running_more_cells_keeps_the_others_and_a_new_source_supersedes_the_old(tmp_path):
    one, two = study(norms=["batch_norm"]), study(norms=["rms_norm"], seeds=[0])
    store.open_study(tmp_path, one.record(one.cells()))
    store.open_study(tmp_path, two.record(two.cells()))
    found = store.load_study(tmp_path)
    assert found["cells"] == [each.id for each in (*one.cells(), *two.cells())]
    assert found["norms"] == ["batch_norm", "rms_norm"]
    assert found["seeds"] == [0, 1]
    changed = [dataclasses.replace(each, source_hash="new") for each in two.cells()]
    store.open_study(tmp_path, two.record(changed))
    assert store.load_study(tmp_path)["cells"] == [*(each.id for each in one.cells()), changed[0].id]


def test_a_folder_belongs_to_one_study_and_is_told_apart_from_others(tmp_path):
    mine, other = study(), study(name="other")
    with pytest.raises(NormzooError, match="is no study folder"):
        store.load_study(tmp_path)
    store.open_study(tmp_path, mine.record(mine.cells()))
    with pytest.raises(NormzooError, match="holds the study 's'"):
        store.open_study(tmp_path, other.record(other.cells()))
    (tmp_path / store.STUDY).write_text('{"name": "s", "cel')
    with pytest.warns(store.StoreWarning), pytest.raises(NormzooError, match="torn"):
        store.load_study(tmp_path)
    with pytest.warns(store.StoreWarning):
        store.open_study(tmp_path, mine.record(mine.cells()))
    assert len(store.load_study(tmp_path)["cells"]) == 6


def test_what_varies_is_noted():
    mine = study(settings=grid(lr=[0.1, 0.2], size=[8, 16]), tasks=["digits/mlp", "digits/cnn"])
    assert mine.record(mine.cells())["varied"] == ["lr", "data.size"]
    assert study().record(study().cells())["varied"] == []


def test_a_folder_is_held_by_one(tmp_path):
    first, second = store.lock(tmp_path), store.lock(tmp_path)
    with first, pytest.raises(NormzooError, match=f"by process {os.getpid()} on "):
        second.__enter__()
    with store.lock(tmp_path):
        assert (tmp_path / store.LOCK).read_text().startswith("process")


# ----------------------------------------------------------------------------------------------------------- progress


def test_progress_counts_and_estimates():
    cells = study(tasks=["digits/mlp", "digits/cnn"]).cells()
    console = Console(width=120, record=True, file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115
    with Progress(cells, [], 2, console=console) as progress:
        assert progress.time_left() is None
        values = [0.5, 0.6, 0.65, 0.9, None]
        for each, value in zip(cells, values, strict=False):
            progress.start(each)
            done = {"status": "done", "metrics": {"val/accuracy": value}, "seconds": {"total": 2.0}}
            failed = {"status": "failed", "metrics": {}, "error": {"type": "ValueError", "message": "no\nway"}}
            progress.finish(each, row_of(each, **(done if value else failed)))
        progress.start(cells[5])
        # 8 of 12 cells are left... less one failed: 1 of the first task, 6 of the second, 2 s each, by two workers.
        assert progress.time_left() == pytest.approx((1 + 6) * 2 / 2)
        console.print(progress.table())
    console.file.close()
    text = console.export_text()
    assert "[ 1/12] digits/mlp  batch_norm  seed 0  val/accuracy 0.5  2.0 s" in text
    assert "FAILED: ValueError: no\n" in text
    assert "5 of 12 cells, about 7 s left" in text
    row = next(line for line in text.splitlines() if line.startswith("│ digits/mlp"))
    assert [part.strip() for part in row.strip("│").split("│")] == [
        "digits/mlp",
        "4/6",
        "1",
        "1",
        "",
        "batch_norm accuracy 0.7",
    ]


def test_the_best_is_the_smallest_where_small_is_good():
    first, second = (dict(row_of(each), mode="min") for each in study(norms=["none", "rms_norm"], seeds=[0]).cells())
    second |= {"metrics": {"val/accuracy": 0.25}}
    assert best_so_far([first, second]) == "rms_norm accuracy 0.25"
    assert best_so_far([]) == ""


@pytest.mark.parametrize(
    ("counts", "code"),
    [
        ({"done": 3}, 0),
        ({"diverged": 1}, 3),
        ({"diverged": 1, "failed": 1}, 1),
        ({"unfinished": 1, "signal": 2}, 130),
        ({"unfinished": 1, "signal": 15, "failed": 1}, 143),
        ({"unfinished": 1, "problem": "full"}, 1),
    ],
)
def test_exit_codes(counts, code):
    summary = Summary(
        **{"directory": Path("d"), "done": 0, "diverged": 0, "failed": 0, "unfinished": 0, "skipped": 0, "seconds": 1.0}
        | counts
    )
    assert summary.exit_code == code


def test_the_public_names():
    assert nz.Study is Study
    assert nz.grid is grid
