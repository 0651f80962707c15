"""Every norm of the project, one line for each file: importing this registers them all."""

from __future__ import annotations

from normzoo.layers import batch as batch
from normzoo.layers import batch_calibrated as batch_calibrated
from normzoo.layers import batch_domain as batch_domain
from normzoo.layers import batch_extended as batch_extended
from normzoo.layers import batch_memory as batch_memory
from normzoo.layers import batch_moments as batch_moments
from normzoo.layers import batch_stream as batch_stream
from normzoo.layers import conditional as conditional
from normzoo.layers import cross as cross
from normzoo.layers import evonorm as evonorm
from normzoo.layers import local as local
from normzoo.layers import mixture as mixture
from normzoo.layers import modes as modes
from normzoo.layers import none as none
from normzoo.layers import pointwise as pointwise
from normzoo.layers import positional as positional
from normzoo.layers import rms as rms
from normzoo.layers import sample as sample
from normzoo.layers import temporal as temporal
from normzoo.layers import whitening as whitening
