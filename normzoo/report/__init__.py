"""The comparison, from the result files alone: statistics, tables, figures and the page, without torch.

Nothing is imported before one of these is called.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["load_frame", "make_report", "print_table"]


def load_frame(directory: str | os.PathLike[str]) -> pd.DataFrame:
    """The results of a study as a tidy table, one row a finished cell: done, diverged and failed ones alike.

    The columns are those of `normzoo.report.frame.load`.

    Args:
        directory: the study's folder, ``runs/quickstart``.

    Raises:
        NormzooError: when the folder is no study, or no cell has a result.
    """
    from normzoo.report.frame import load

    return load(directory).frame()


def make_report(directory: str | os.PathLike[str]) -> Path:
    """Write ``report.md``, its figures, ``results.csv`` and ``results.parquet`` into ``report/`` in a study's folder.

    The same result files give the same report, byte for byte.

    Args:
        directory: the study's folder, ``runs/quickstart``.

    Returns:
        The path of ``report.md``.

    Raises:
        NormzooError: when the folder is no study, no cell has a result, or the report cannot be written.
    """
    from normzoo.report.markdown import write_report

    return write_report(directory)


def print_table(directory: str | os.PathLike[str]) -> None:
    """Print the comparison: one table a task, what was held fixed, and how to read the intervals.

    Args:
        directory: the study's folder, ``runs/quickstart``.

    Raises:
        NormzooError: when the folder is no study, or no cell has a result.
    """
    from normzoo.report.table import print_comparison

    print_comparison(directory)
