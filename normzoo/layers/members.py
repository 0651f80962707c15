"""Every norm of the project, one line for each file: importing this registers them all."""

from __future__ import annotations

from normzoo.layers import batch as batch
from normzoo.layers import none as none
from normzoo.layers import sample as sample
