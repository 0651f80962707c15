"""Weight norms: normalizations of the weights of a layer, in a registry of their own."""

from __future__ import annotations

from normzoo.weights import cosine as cosine
from normzoo.weights import length as length
from normzoo.weights import orthogonal as orthogonal
from normzoo.weights import spectral as spectral
from normzoo.weights import standardization as standardization
from normzoo.weights.apply import apply_weight_norm as apply_weight_norm
from normzoo.weights.apply import data_dependent_init as data_dependent_init
from normzoo.weights.apply import remove_weight_norm as remove_weight_norm
from normzoo.weights.apply import weight_norms as weight_norms
from normzoo.weights.base import Filters as Filters
from normzoo.weights.base import Reparametrization as Reparametrization
from normzoo.weights.registry import WeightNormInfo as WeightNormInfo
from normzoo.weights.registry import create_weight_norm as create_weight_norm
from normzoo.weights.registry import list_weight_norms as list_weight_norms
from normzoo.weights.registry import register_weight_norm as register_weight_norm
from normzoo.weights.registry import resolve_weight_norm as resolve_weight_norm
from normzoo.weights.registry import weight_norm_info as weight_norm_info
