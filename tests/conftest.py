"""One thread for each test process: several of them share the cores, and results agree only at equal counts."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
