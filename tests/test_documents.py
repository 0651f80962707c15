"""The README and the pages are true: their code runs, tables are the registry's, commands exist."""

from __future__ import annotations

import importlib.util
import json
import re
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


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/register.md"])
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
