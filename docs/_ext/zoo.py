"""Write a page for every norm, the checks and the public names; a name without documentation fails the build."""

from __future__ import annotations

import inspect
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import check_all
import torch
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import normzoo as nz
from normzoo.checks import list_checks
from normzoo.layers.base import Paper, Traits
from normzoo.ops import Pattern
from normzoo.ops.picture import svg
from normzoo.registry import NormInfo

SHAPE = (32, 64, 16, 16)

STATUSES = {
    "passed": "passed",
    "failed": "failed",
    "expected_failure": "expected to fail",
    "not_applicable": "not applicable",
}

TRAITS = {
    "batch_dependent": "in training, samples of a batch influence each other",
    "causal": "in evaluation, no position sees a later one",
    "causal_in_training": "in training, no position sees a later one",
    "stateful": "keeps running statistics",
    "scale_invariant": "the scale of the input does not matter",
    "shift_invariant": "a constant added to the input does not matter",
    "includes_activation": "includes an activation",
    "stochastic": "draws random numbers in training",
}


def write(app: Sphinx) -> None:
    """All generated pages, before Sphinx reads its sources."""
    source = Path(app.srcdir)
    norms = [nz.info(name) for name in nz.list_norms()]
    undocumented = [f"norm {norm.name}" for norm in norms if not (norm.summary and norm.formula)]
    undocumented += [f"normzoo.{name}" for name in nz.__all__ if not inspect.getdoc(getattr(nz, name))]
    if undocumented:
        raise ExtensionError(f"without documentation: {', '.join(undocumented)}")
    for folder in ("norms", "norms/pictures"):
        (source / folder).mkdir(exist_ok=True)
    checks = json.loads((source / "checks.json").read_text(encoding="utf-8"))
    cost = measure([norm.name for norm in norms])
    for norm in norms:
        if norm.pattern is not None:
            (source / "norms" / "pictures" / f"{norm.name}.svg").write_text(svg(Pattern.parse(norm.pattern)))
        (source / "norms" / f"{norm.name}.rst").write_text(page(norm, cost.get(norm.name), checks), encoding="utf-8")
    (source / "norms" / "index.rst").write_text(index(norms), encoding="utf-8")
    (source / "norms" / "weights.rst").write_text(weights(), encoding="utf-8")
    (source / "norms" / "checks.rst").write_text(check_list(), encoding="utf-8")
    (source / "api.rst").write_text(api(), encoding="utf-8")


def title(text: str, line: str = "=") -> str:
    """A heading."""
    return f"{text}\n{line * len(text)}\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table, cells in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [header, *rows]:
        lines += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Text in which a star is a star."""
    return text.replace("*", "\\*")


def index(norms: list[NormInfo]) -> str:
    """The list of all norms, by family."""
    parts = [title("The norms")]
    for family in sorted({norm.family for norm in norms}):
        members = [norm for norm in norms if norm.family == family]
        rows = [[f":doc:`{n.name}`", str(n.paper.year) if n.paper else "", n.summary] for n in members]
        parts += [title(family.replace("_", " "), "-"), table(["norm", "year", "what it does"], rows)]
    parts.append(".. toctree::\n   :hidden:\n\n" + "\n".join(f"   {norm.name}" for norm in norms))
    return "\n".join(parts)


def page(norm: NormInfo, cost: float | None, checks: dict) -> str:
    """All that is known of one norm."""
    parts = [title(norm.name)]
    if norm.contrib:
        parts.append(".. note::\n   contrib: it passes the checks, but no number of its paper has been reproduced.\n")
    if norm.pattern is not None:
        parts.append(
            f"Moments: ``{norm.pattern}``. Elements of the same colour and number share a statistic.\n\n"
            f".. image:: pictures/{norm.name}.svg\n   :alt: {norm.pattern}\n"
        )
    parts.append(f".. autoclass:: {norm.norm.__module__}.{norm.norm.__qualname__}\n   :no-index-entry:\n")
    if norm.aliases:
        parts.append("Also known as " + ", ".join(f"``{alias}``" for alias in norm.aliases) + ".\n")
    if norm.traits is not None:
        parts += [title("Traits", "-"), traits(norm.traits)]
    parts += [title("Cost", "-"), costs(norm, cost)]
    if norm.paper is not None:
        parts += [title("How to cite", "-"), cite(norm.name, norm.paper)]
    parts += [title("Checks", "-"), checked(checks, norm.name)]
    return "\n".join(parts)


def traits(found: Traits) -> str:
    """The traits as a table."""
    rows = [[f"``{name}``", "yes" if getattr(found, name) else "no", text] for name, text in TRAITS.items()]
    return table(["trait", "", "meaning"], rows)


def costs(norm: NormInfo, cost: float | None) -> str:
    """Parameters and time."""
    parameters = "depends on options" if norm.parameters_per_channel is None else f"{norm.parameters_per_channel}"
    lines = [f"Parameters per channel: {parameters}."]
    if cost is not None:
        lines.append(
            f"A forward and backward pass of {SHAPE} in float32 takes {cost:.1f} times as long as reading and writing "
            "the same memory (a copy and an addition), on one thread of the machine that built this page "
            f"({platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')})."
        )
    return " ".join(lines) + "\n"


def cite(name: str, paper: Paper) -> str:
    """A BibTeX entry."""
    fields = {"title": paper.title, "author": paper.authors.replace(" & ", " and ").replace(" et al.", " and others")}
    fields |= {"year": str(paper.year)}
    if paper.arxiv:
        fields |= {"eprint": paper.arxiv, "archivePrefix": "arXiv"}
    if paper.venue:
        fields |= {"booktitle": paper.venue}
    key = re.sub(r"\W", "", paper.authors.split()[0]).lower() + str(paper.year) + name.replace("_", "")
    body = ",\n".join(f"     {field} = {{{value}}}" for field, value in fields.items())
    return f".. code-block:: bibtex\n\n   @{'inproceedings' if paper.venue else 'misc'}{{{key},\n{body}\n   }}\n"


def checked(checks: dict, name: str) -> str:
    """What the conformance kit said of it."""
    found = checks["norms"].get(name)
    if found is None:  # younger than the kept results
        _, found, _ = check_all.run(name)
    counts = ", ".join(f"{len(found[status])} {word}" for status, word in STATUSES.items())
    parts = [f"{counts} ({checks['date']}, torch {checks['torch']}; ``normzoo check {name}``).\n"]
    for status in ("failed", "expected_failure"):
        parts += [f"* ``{check}`` ({status.replace('_', ' ')}): {detail}" for check, detail in found[status].items()]
    parts.append("\nPassed: " + ", ".join(f"``{check}``" for check in found["passed"]) + ".\n")
    return "\n".join(parts)


def weights() -> str:
    """The norms of weights."""
    parts = [
        title("Weight norms"),
        "They change the weights of a layer instead of its activations, and go onto any model: "
        '``apply_weight_norm(model, "weight_standardization")``.\n',
    ]
    for name in nz.list_weight_norms():
        norm = nz.weight_norm_info(name).norm
        parts += [title(name, "-"), f".. autoclass:: {norm.__module__}.{norm.__qualname__}\n   :no-index-entry:\n"]
    return "\n".join(parts)


def check_list() -> str:
    """What the conformance kit looks at."""
    parts = [
        title("The checks"),
        "``normzoo check NORM`` runs them on any norm; ``normzoo.checks.parametrize_with_checks`` in your own tests.\n",
    ]
    for group in dict.fromkeys(check.group for check in list_checks()):
        rows = [[f"``{c.name}``", plain(c.guards), plain(c.mend)] for c in list_checks() if c.group == group]
        parts += [title(group, "-"), table(["check", "what it guards", "when it fails"], rows)]
    return "\n".join(parts)


def api() -> str:
    """Every public name."""
    parts = [title("Public names"), ".. currentmodule:: normzoo\n"]
    for name in sorted(nz.__all__):
        value = getattr(nz, name)
        kind = "autoexception" if isinstance(value, type) and issubclass(value, Exception) else None
        kind = kind or ("autoclass" if isinstance(value, type) else "autofunction")
        parts.append(f".. {kind}:: {value.__module__}.{value.__qualname__}\n")
    return "\n".join(parts)


def measure(names: list[str], repeats: int = 5) -> dict[str, float]:
    """Median time of forward and backward over that of a copy and an addition, interleaved, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dy, out = torch.randn_like(x), torch.empty_like(x)

    def floor() -> None:
        with torch.no_grad():
            out.copy_(x)
            torch.add(x, dy, out=out)

    def step(norm: torch.nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(norm(x), x, dy)

    calls: dict[str, Callable[[], object]] = {"": floor}
    for name in names:
        with torch.random.fork_rng(devices=[]):
            norm = nz.create(name, SHAPE[1])
        calls[name] = step(norm)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {name: median[name] / median[""] for name in names}


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages when the builder is ready."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
