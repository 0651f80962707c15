"""Write what the README derives from the project: the table of norms. `make readme` runs it."""

from __future__ import annotations

from pathlib import Path

from normzoo.registry import info, list_norms

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- norms: written by `make readme` -->", "<!-- end of norms -->"


def table() -> str:
    """The registered norms as a Markdown table."""
    lines = [
        "| norm | what shares a statistic | in training | causal | paper |",
        "|---|---|---|---|---|",
    ]
    for name in list_norms():
        row = info(name)
        traits, paper = row.traits, row.paper
        pattern = f"`{row.pattern}`" if row.pattern else ""
        sees = "" if traits is None else "the batch" if traits.batch_dependent else "the sample"
        causal = "" if traits is None else "yes" if traits.causal else "no"
        source = ""
        if paper is not None:
            link = f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.venue
            source = f"{paper.authors} {paper.year}, {link}"
        lines.append(f"| `{name}` | {pattern} | {sees} | {causal} | {source} |")
    return "\n".join(lines)


def written(text: str) -> str:
    """The README with the present table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(written(text), encoding="utf-8")
