"""A norm as a user writes it, with a pattern that nobody has named, for the suite."""

from __future__ import annotations

from normzoo.layers.base import MomentNorm


class HaloNorm(MomentNorm):
    r"""Groups of channels share a statistic over the whole batch.

    .. math:: y = \gamma_c \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \varepsilon}} + \beta_c
    """

    moments = "b (g c) s -> g"
