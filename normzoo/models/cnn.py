"""Convolutional networks: small ones, the classical small ones, and the ResNet for images of 32x32."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from normzoo.errors import NormzooError
from normzoo.models.base import (
    Inputs,
    Network,
    NormChoice,
    Sites,
    one_of,
    register_model,
    whole_number,
    whole_numbers,
)
from normzoo.models.dropout import Dropout
from normzoo.models.layer import Layer, NormPosition, activation_beside

_SMALLEST_MAP = 4  # a map is not pooled below this side, so that statistics over positions keep a meaning


@register_model("cnn")
@register_model(
    "cnn_28",
    "For images of 28x28: norm on the input, conv 32, norm, pool, conv 64, norm, pool, dense 128, norm, dense.",
    convs=(32, 64),
    dense=(128,),
    norm_input=True,
    norm_dense=True,
)
@register_model(
    "cnn_32",
    "For images of 32x32: conv 64, ReLU, norm, pool, conv 128, ReLU, norm, pool, dense 1000, dense.",
    convs=(64, 128),
    dense=(1000,),
    norm_input=False,
    norm_dense=False,
    norm_position="after",
)
class ConvNet(Network):
    """Convolutions of 3x3 with a norm and an activation each, dense layers, and a linear map to the answer.

    Each convolution keeps the size of its map; maps are then halved by max pooling, while they stay at least 4 wide:
    8x8 ends at 4x4, 28x28 at 7x7 after two convolutions. Convolutions and dense layers have a bias whatever the norm,
    so that all norms share the same other parameters. Weights start as torch's.

    Sites: ``input``, ``conv1``, ``conv2``, …, ``dense1``, … . A norm whose statistics stay within one position
    (layer norm) refuses the site ``input`` of an image with one channel, of which rms norm would leave the signs; one
    whose statistics stay within one channel (instance norm) refuses the dense sites. Give those sites another:
    ``{"input": "none", "*": "layer_norm"}``.

    Args:
        norm: a norm, or a mapping from sites to norms.
        inputs: ``(C, H, W)`` of any size.
        outputs: width of the answer.
        convs: channels of each convolution.
        dense: width of each hidden dense layer.
        norm_input: whether the image itself is normalised.
        norm_dense: whether hidden dense layers have a norm.
        activation: a name in :data:`normzoo.models.layer.ACTIVATIONS`.
        norm_position: ``"before"`` or ``"after"`` the activation.
        dropout: probability of zero, after each hidden layer.

    Shape:
        ``(N, C, H, W)`` to ``(N, outputs)``.
    """

    family = "cnn"

    def __init__(
        self,
        *,
        norm: NormChoice,
        inputs: Inputs,
        outputs: int,
        convs: tuple[int, ...] = (32, 64, 64),
        dense: tuple[int, ...] = (),
        norm_input: bool = False,
        norm_dense: bool = False,
        activation: str = "relu",
        norm_position: NormPosition = "before",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(inputs, outputs)
        channels, height, width = inputs.shape
        layer = partial(Layer, activation=activation, norm_position=norm_position, dropout=dropout)
        self.body = nn.Sequential()
        with Sites(norm, channel_dim=1) as norm_at:
            self.input_norm = norm_at("input", channels) if norm_input else None
            for i, after in enumerate(whole_numbers("convs", convs), 1):
                conv = nn.Conv2d(channels, after, 3, padding=1)
                self.body.add_module(f"conv{i}", layer(conv, norm_at(f"conv{i}", after)))
                channels = after
                if min(height, width) >= 2 * _SMALLEST_MAP:
                    self.body.add_module(f"pool{i}", nn.MaxPool2d(2))
                    height, width = height // 2, width // 2
            self.body.add_module("flatten", nn.Flatten())
            features = channels * height * width
            for i, after in enumerate(whole_numbers("dense", dense), 1):
                hidden = norm_at(f"dense{i}", after) if norm_dense else None
                self.body.add_module(f"dense{i}", layer(nn.Linear(features, after), hidden))
                features = after
        self.head = nn.Linear(features, outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class; a mask is refused."""
        x = self.admit(x, mask)
        if self.input_norm is not None:
            x = self.input_norm(x)
        return self.head(self.body(x))


Shortcut = Literal["A", "B"]


def _conv(before: int, after: int, size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, size, stride=stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


class ResidualBlock(nn.Module):
    """Two convolutions of 3x3, each with a norm, around which the input is added."""

    def __init__(
        self, before: int, after: int, norm_at: Sites, site: str, *, stride: int, shortcut: str, activation: str
    ) -> None:
        super().__init__()
        self.conv1 = _conv(before, after, 3, stride)
        self.norm1 = norm_at(f"{site}.norm1", after)
        self.conv2 = _conv(after, after, 3)
        self.norm2 = norm_at(f"{site}.norm2", after)
        self.inner_activation = activation_beside(self.norm1, activation)
        self.activation = activation_beside(None, activation)
        self.stride = stride
        self.added_channels = after - before
        self.shortcut = None
        if shortcut == "B" and (stride > 1 or before != after):
            self.shortcut = nn.Sequential(_conv(before, after, 1, stride), norm_at(f"{site}.shortcut", after))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, before, H, W)`` to ``(N, after, H / stride, W / stride)``."""
        y = self.inner_activation(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride > 1 or self.added_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added_channels))
        return self.activation(x + y)


@register_model("resnet")
@register_model("resnet20", "The ResNet of 20 layers for images of 32x32.", depth=20)
@register_model("resnet32", "The ResNet of 32 layers for images of 32x32.", depth=32)
@register_model("resnet44", "The ResNet of 44 layers for images of 32x32.", depth=44)
@register_model("resnet56", "The ResNet of 56 layers for images of 32x32.", depth=56)
@register_model("resnet110", "The ResNet of 110 layers for images of 32x32.", depth=110)
class ResNet(Network):
    r"""The residual network for images of 32x32, of :math:`6n + 2` layers.

    A convolution of 3x3, three stages of n blocks with 16, 32 and 64 channels of which the second and third begin by
    halving the map, the mean over positions, and a linear map to the answer.

    .. math:: y = \phi(x + \mathrm{norm}_2(W_2 * \phi(\mathrm{norm}_1(W_1 * x))))

    Convolutions have no bias, whatever the norm: that is the network of the literature, and all norms share the same
    other parameters. With ``norm="none"`` the only bias is the last one. Convolutions start as in He et al. 2015,
    normal with variance 2 / fan-in.

    Sites: ``stem``, ``stages.0.0.norm1``, ``stages.0.0.norm2``, … and ``stages.1.0.shortcut`` with shortcuts B
    (patterns ``"norm2"``, ``"stages.2.*"``).

    Args:
        norm: a norm, or a mapping from sites to norms.
        inputs: ``(C, H, W)``; made for ``(3, 32, 32)``, any size from 4x4 on.
        outputs: width of the answer.
        depth: :math:`6n + 2`.
        width: channels of the first stage.
        shortcut: where a stage begins, ``"A"`` takes every second position and adds channels of zero, ``"B"`` is a
            convolution of 1x1 with a norm.
        activation: a name in :data:`normzoo.models.layer.ACTIVATIONS`.
        dropout: probability of zero, before the last linear map.

    Shape:
        ``(N, C, H, W)`` to ``(N, outputs)``.

    Source:
        He, Zhang, Ren, Sun 2016, Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2.
    """

    family = "cnn"

    def __init__(
        self,
        *,
        norm: NormChoice,
        inputs: Inputs,
        outputs: int,
        depth: int = 20,
        width: int = 16,
        shortcut: Shortcut = "A",
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(inputs, outputs)
        if (whole_number("depth", depth, 8) - 2) % 6:
            raise NormzooError(f"depth={depth!r}; expected 6 n + 2: 8, 14, 20, 32, 44, 56, 110")
        whole_number("width", width)
        one_of("shortcut", shortcut, ("A", "B"))
        channels, *sides = inputs.shape
        if min(sides) < 4:
            raise NormzooError(
                f"ResNet got images of {sides[0]}x{sides[1]}; it halves them twice and takes 4x4 or more"
            )
        self.conv = _conv(channels, width, 3)
        self.stages = nn.ModuleList()
        with Sites(norm, channel_dim=1) as norm_at:
            self.norm = norm_at("stem", width)
            before = width
            for s in range(3):
                blocks = nn.Sequential()
                for i in range((depth - 2) // 6):
                    after, stride = width * 2**s, 2 if s and not i else 1
                    blocks.append(
                        ResidualBlock(before, after, norm_at, f"stages.{s}.{i}",
                                      stride=stride, shortcut=shortcut, activation=activation)
                    )  # fmt: skip
                    before = after
                self.stages.append(blocks)
        self.activation = activation_beside(self.norm, activation)
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(before, outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class; a mask is refused."""
        x = self.activation(self.norm(self.conv(self.admit(x, mask))))
        for stage in self.stages:
            x = stage(x)
        return self.head(self.dropout(x.mean((2, 3))))
