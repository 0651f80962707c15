"""The README and the pages are true: their code runs, tables are the registry's, commands exist."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from normzoo import cli
from normzoo.registry import list_norms

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_table_is_the_registrys():
    """Every row is what the registry says now; norms added since `make readme` may be missing."""
    source = importlib.util.spec_from_file_location("readme", REPOSITORY / "docs" / "readme.py")
    readme = importlib.util.module_from_spec(source)
    source.loader.exec_module(readme)
    written = TEXT.partition(readme.BEGIN)[2].partition(readme.END)[0].strip().splitlines()
    assert len(written) > 10
    assert set(written) <= set(readme.table().splitlines())


@pytest.mark.parametrize("page", ["README.md", "docs/register.md"])
def test_the_python_runs(page, tmp_path):
    """Every block that names a file is written to it; all run, one after the other, in its folder."""
    found = blocks("python", (REPOSITORY / page).read_text(encoding="utf-8"))
    assert found
    script = ""
    for block in found:
        named = re.match(r"# (\S+\.py)\n", block)
        if named:
            (tmp_path / named[1]).write_text(block)
        script += block
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_first_page_says_how_to_begin_and_where_to_go():
    """It takes the README's words; what it asks for is there, and pages that it names exist."""
    page = (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    taken = ""
    for options in re.findall(r"```{include} ../README.md\n(.*?)```", page, re.DOTALL):
        marks = dict(re.findall(r'^:(start-after|end-before): "(.*)"$', options, re.MULTILINE))
        assert all(TEXT.count(mark) == 1 for mark in marks.values()), marks
        part = TEXT.partition(marks["start-after"])[2] if "start-after" in marks else TEXT
        taken += part.partition(marks["end-before"])[0]
    for wanted in ("# normzoo\n", "$ make demo", "$ normzoo run experiments/quickstart.py", "nz.create("):
        assert wanted in taken
    assert "](" not in taken, "links of the README lead nowhere from here"
    generated = {"norms/index", "norms/checks", "norms/weights"}
    named = set(re.findall(r"{doc}`([^`]+)`", page))
    assert named >= generated | {"register", "speed"}
    for name in named - generated:
        assert (REPOSITORY / "docs" / f"{name}.md").exists(), name


def test_formulas_do_not_scroll_down():
    """Furo's box of a formula scrolls in both directions unless a style of ours, which is in use, says otherwise."""
    settings = runpy.run_path(str(REPOSITORY / "docs" / "conf.py"))
    (folder,) = settings["html_static_path"]
    style = "".join((REPOSITORY / "docs" / folder / file).read_text() for file in settings["html_css_files"])
    assert re.search(r"\.math-wrapper {[^}]*overflow-y: hidden;", style)


def test_the_kept_results_of_the_checks_are_of_norms_that_pass():
    results = json.loads((REPOSITORY / "docs" / "checks.json").read_text(encoding="utf-8"))
    assert set(results["norms"]) <= set(list_norms()), "run `make check-all`"
    for name, found in results["norms"].items():
        assert found["passed"], name
        assert not found["failed"], name


@pytest.mark.parametrize("command", re.findall(r"^\$ normzoo (.*?)(?:\s+#.*)?$", TEXT, re.MULTILINE))
def test_the_commands_exist(command, capsys):
    verb = shlex.split(command)[0]
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    for option in re.findall(r"--[a-z-]+", command):
        assert option in out, option


def test_the_files_it_links_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links
    for link in links:
        assert (REPOSITORY / link).exists(), link


def test_quickstart_is_what_the_readme_says():
    path = REPOSITORY / "experiments" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(module.study.cells()) == 150
