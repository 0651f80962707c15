"""Is it fast? Norms against torch's layers, compiled code and the memory itself, interleaved in one process.

>>> from normzoo.bench import Case, Effort, Subject, measure_case
>>> rows = measure_case(Case((64, 256), "tokens"), [Subject("layer_norm")], effort=Effort(rounds=2))
>>> sorted({row.contender for row in rows})
['floor', 'formula', 'normzoo', 'torch.nn']
"""

from __future__ import annotations

from normzoo.bench.accuracy import Errors, measure_accuracy
from normzoo.bench.case import Case
from normzoo.bench.measure import Subject, measure_case
from normzoo.bench.pages import Gain, measure_pages
from normzoo.bench.recurrent import Recurrent, measure_recurrent
from normzoo.bench.result import Row, as_csv
from normzoo.bench.timing import Effort

__all__ = [
    "Case",
    "Effort",
    "Errors",
    "Gain",
    "Recurrent",
    "Row",
    "Subject",
    "as_csv",
    "measure_accuracy",
    "measure_case",
    "measure_pages",
    "measure_recurrent",
]
