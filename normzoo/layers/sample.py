"""Norms whose statistics are taken within each sample: no state, training and evaluation are the same."""

from __future__ import annotations

import torch  # noqa: F401  (the examples use it)

from normzoo.layers.base import MomentNorm, Paper
from normzoo.registry import register


@register("layer_norm", aliases=("ln",))
class LayerNorm(MomentNorm):
    r"""Standardise each position over its channels, as in Transformers and ConvNeXt.

    .. math:: y = \gamma_c \frac{x - \mu_{b,s}}{\sqrt{\sigma_{b,s}^2 + \varepsilon}} + \beta_c, \qquad
              \mu_{b,s}, \sigma_{b,s}^2 \text{ over channels}

    Equals ``torch.nn.LayerNorm(C)`` on ``(N, *S, C)``. For all units of a sample together see ``layer_norm_joint``.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: for a single channel.

    Example:
        >>> LayerNorm(8, channel_dim=-1)(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])

    Reference:
        Ba, Kiros and Hinton 2016, Layer Normalization, arXiv 1607.06450.
    """

    moments = "b c s -> b s"
    paper = Paper("Ba, Kiros & Hinton", 2016, "Layer Normalization", "1607.06450")


@register("layer_norm_joint", aliases=("layer_norm_chw",))
class LayerNormJoint(MomentNorm):
    r"""Standardise each sample over all its units, channels and positions together.

    .. math:: y = \gamma_c \frac{x - \mu_b}{\sqrt{\sigma_b^2 + \varepsilon}} + \beta_c, \qquad
              \mu_b, \sigma_b^2 \text{ over channels and positions}

    Layer norm as the paper applies it to convolutional nets, with gain and bias for each channel (group norm with one
    group) instead of for each unit, so that it does not depend on the size of the maps.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: for a single channel at a single position.

    Example:
        >>> LayerNormJoint(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Reference:
        Ba, Kiros and Hinton 2016, Layer Normalization, arXiv 1607.06450, section 6.7.
    """

    moments = "b c s -> b"
    paper = Paper("Ba, Kiros & Hinton", 2016, "Layer Normalization", "1607.06450")


@register("instance_norm", aliases=("in",))
class InstanceNorm(MomentNorm):
    r"""Standardise each channel of each sample over its positions.

    .. math:: y = \gamma_c \frac{x - \mu_{b,c}}{\sqrt{\sigma_{b,c}^2 + \varepsilon}} + \beta_c, \qquad
              \mu_{b,c}, \sigma_{b,c}^2 \text{ over positions}

    Affine by default, like every norm here; ``torch.nn.InstanceNorm*d`` is not.

    Shape:
        ``(N, C, *S)`` or ``(N, *S, C)`` to the same, with more than one position.

    Raises:
        NormzooError: for a single position, as after global pooling.

    Example:
        >>> InstanceNorm(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Reference:
        Ulyanov, Vedaldi and Lempitsky 2016, Instance Normalization: The Missing Ingredient for Fast Stylization,
        arXiv 1607.08022.
    """

    moments = "b c s -> b c"
    paper = Paper("Ulyanov, Vedaldi & Lempitsky", 2016, "Instance Normalization", "1607.08022")


@register("group_norm", aliases=("gn",))
class GroupNorm(MomentNorm):
    r"""Standardise groups of channels of each sample over their channels and positions.

    .. math:: y = \gamma_c \frac{x - \mu_{b,g}}{\sqrt{\sigma_{b,g}^2 + \varepsilon}} + \beta_c, \qquad
              \mu_{b,g}, \sigma_{b,g}^2 \text{ over the channels of group } g \text{ and positions}

    One group is ``layer_norm_joint``, a group for each channel is ``instance_norm``. The paper uses 32 groups;
    ``groups="auto"`` takes the largest divisor of ``C`` up to 32 that leaves at least four channels a group.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the groups do not divide the channels.
        NormzooError: for groups of a single value.

    Example:
        >>> GroupNorm(64)
        GroupNorm(64, eps=1e-05, groups=16)
        >>> GroupNorm(64, group_size=8)(torch.randn(2, 64, 5, 5)).shape
        torch.Size([2, 64, 5, 5])

    Reference:
        Wu and He 2018, Group Normalization, arXiv 1803.08494.
    """

    moments = "b (g c) s -> b g"
    paper = Paper("Wu & He", 2018, "Group Normalization", "1803.08494")


@register("rms_norm", aliases=("rms",))
class RMSNorm(MomentNorm):
    r"""Divide each position by the root mean square of its channels; no centring, no bias.

    .. math:: y = \gamma_c \frac{x}{\sqrt{\tfrac1C\sum_c x_c^2 + \varepsilon}}

    ``torch.nn.RMSNorm`` takes the machine epsilon of the input's dtype for :math:`\varepsilon`; here it is ``1e-6``.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> RMSNorm(8, channel_dim=-1)(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])

    Reference:
        Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """

    moments = "b c s -> b s"
    centred = False
    defaults = {"eps": 1e-6}
    paper = Paper("Zhang & Sennrich", 2019, "Root Mean Square Layer Normalization", "1910.07467")
