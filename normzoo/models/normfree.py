"""Networks that do without norms: by their initial weights, by scales of their branches, by their activation.

They take ``norm="none"`` and no other: what stands in for the norms is part of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normzoo.errors import NormzooError
from normzoo.models.base import Inputs, Network, NormChoice, refuse_norm, register_model, whole_number, whole_numbers
from normzoo.models.dropout import Dropout
from normzoo.models.layer import activation_beside
from normzoo.weights.standardization import gain_of

# ---- residual networks for images of 32x32 ---------------------------------------------------------------------------


def _start(conv: nn.Conv2d, gain: float = 1.0) -> nn.Conv2d:
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    with torch.no_grad():
        conv.weight.mul_(gain)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _conv(before: int, after: int, size: int, stride: int = 1, *, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride=stride, padding=size // 2, bias=bias)


class NormFreeResNet(Network):
    """The frame of the residual networks of this file: three stages of blocks, the second and third at half the size.

    Args:
        norm: ``"none"``.
        inputs: ``(C, H, W)``; made for ``(3, 32, 32)``, any size from 4x4 on.
        outputs: width of the answer.
        depth: :math:`6n + 2` layers, for n blocks a stage.
        width: channels of the first stage.
        activation: a name in :data:`normzoo.models.layer.ACTIVATIONS`.
        dropout: probability of zero, before the last linear map.
    """

    family = "cnn"
    norm_free = True

    def __init__(
        self, norm: NormChoice, inputs: Inputs, outputs: int, depth: int, width: int, activation: str, dropout: float
    ) -> None:
        super().__init__(inputs, outputs)
        name = type(self).__name__
        refuse_norm(name, norm)
        if (whole_number("depth", depth, 8) - 2) % 6:
            raise NormzooError(f"depth={depth!r}; expected 6 n + 2: 8, 14, 20, 32, 44, 56, 110")
        _, *sides = inputs.shape
        if min(sides) < 4:
            raise NormzooError(
                f"{name} got images of {sides[0]}x{sides[1]}; it halves them twice and takes 4x4 or more"
            )
        self.blocks_per_stage = (depth - 2) // 6
        self.channels = tuple(whole_number("width", width) * 2**s for s in range(3))
        self.activation = activation_beside(None, activation)
        self.dropout = Dropout(dropout)
        self.stages = nn.ModuleList()
        self.head = nn.Linear(self.channels[-1], outputs)

    def stack(self, block: Callable[[int, int, int], nn.Module]) -> None:
        """Fill the stages with ``block(before, after, stride)``."""
        before = self.channels[0]
        for s, after in enumerate(self.channels):
            stage = nn.Sequential()
            for i in range(self.blocks_per_stage):
                stage.append(block(before, after, 2 if s and not i else 1))
                before = after
            self.stages.append(stage)

    def stem(self, x: Tensor) -> Tensor:
        """What the first block gets."""
        raise NotImplementedError

    def read(self, x: Tensor) -> Tensor:
        """``(N, C)`` for the last linear map, from what the last block gives."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class; a mask is refused."""
        x = self.stem(self.admit(x, mask))
        for stage in self.stages:
            x = stage(x)
        return self.head(self.dropout(self.read(x)))


def _scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


class FixupBlock(nn.Module):
    """Two convolutions of 3x3 of which the second starts at zero, with scalar biases and a scalar scale."""

    def __init__(self, before: int, after: int, stride: int, *, blocks: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv1 = _start(_conv(before, after, 3, stride, bias=False), blocks**-0.5)
        self.conv2 = _conv(after, after, 3, bias=False)
        nn.init.zeros_(self.conv2.weight)
        self.bias1a, self.bias1b, self.bias2a, self.bias2b = (_scalar(0.0) for _ in range(4))
        self.scale = _scalar(1.0)
        self.activation = activation
        self.stride = stride
        self.added_channels = after - before

    def forward(self, x: Tensor) -> Tensor:
        """``(N, before, H, W)`` to ``(N, after, H / stride, W / stride)``."""
        y = self.activation(self.conv1(x + self.bias1a) + self.bias1b)
        y = self.conv2(y + self.bias2a) * self.scale + self.bias2b
        if self.stride > 1 or self.added_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added_channels))
        return self.activation(x + y)


@register_model("fixup_resnet")
@register_model("fixup_resnet20", "The Fixup ResNet of 20 layers for images of 32x32.", depth=20)
@register_model("fixup_resnet32", "The Fixup ResNet of 32 layers for images of 32x32.", depth=32)
@register_model("fixup_resnet56", "The Fixup ResNet of 56 layers for images of 32x32.", depth=56)
@register_model("fixup_resnet110", "The Fixup ResNet of 110 layers for images of 32x32.", depth=110)
class FixupResNet(NormFreeResNet):
    r"""The ResNet for images of 32x32 with Fixup's initial weights in place of norms.

    .. math:: y = \phi(x + m\,W_2 * (\phi(W_1 * (x + b_1) + b_2) + b_3) + b_4)

    with scalar biases, which start at 0, and a scalar scale m, which starts at 1. In B blocks, :math:`W_1` starts as
    He's times :math:`B^{-1/2}` (:math:`B^{-1/(2m-2)}` for branches of m = 2 layers), :math:`W_2` and the last linear
    map start at zero. So every block starts as :math:`\phi(x)`, and the answer as zero.

    Args:
        norm: ``"none"``.
        inputs: ``(C, H, W)``; made for ``(3, 32, 32)``, any size from 4x4 on.
        outputs: width of the answer.
        depth: :math:`6n + 2`.
        width: channels of the first stage.
        activation: a name in :data:`normzoo.models.layer.ACTIVATIONS`.
        dropout: probability of zero, before the last linear map.

    Shape:
        ``(N, C, H, W)`` to ``(N, outputs)``.

    Deviations:
        He's variance counts what comes in (2 / fan-in), in the authors' code what goes out, and the stem starts as
        He's too. Shortcuts that halve the map take x, without the bias that their code adds. The authors train
        scalars at a tenth of the learning rate, which is the optimizer's business.

    Source:
        Zhang, Dauphin, Ma 2019, Fixup Initialization: Residual Learning Without Normalization, arXiv 1901.09321.
    """

    def __init__(
        self, *, norm: NormChoice = "none", inputs: Inputs, outputs: int, depth: int = 20, width: int = 16,
        activation: str = "relu", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(norm, inputs, outputs, depth, width, activation, dropout)
        self.conv = _start(_conv(inputs.shape[0], width, 3, bias=False))
        self.bias1, self.bias2 = _scalar(0.0), _scalar(0.0)
        blocks = 3 * self.blocks_per_stage
        self.stack(lambda a, b, s: FixupBlock(a, b, s, blocks=blocks, activation=self.activation))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def stem(self, x: Tensor) -> Tensor:
        """What the first block gets."""
        return self.activation(self.conv(x) + self.bias1)

    def read(self, x: Tensor) -> Tensor:
        """The mean over positions."""
        return x.mean((2, 3)) + self.bias2


class SkipInitBlock(nn.Module):
    """A pre-activation block whose branch has a learned scale."""

    def __init__(self, before: int, after: int, stride: int, *, start: float, activation: nn.Module) -> None:
        super().__init__()
        self.conv1 = _start(_conv(before, after, 3, stride, bias=True))
        self.conv2 = _start(_conv(after, after, 3, bias=True))
        self.shortcut = _start(_conv(before, after, 1, stride, bias=True)) if stride > 1 or before != after else None
        self.scale = _scalar(start)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """``(N, before, H, W)`` to ``(N, after, H / stride, W / stride)``."""
        y = self.activation(x)
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.scale * self.conv2(self.activation(self.conv1(y)))


@register_model("skipinit_resnet")
@register_model("skipinit_resnet20", "The SkipInit ResNet of 20 layers for images of 32x32.", depth=20)
@register_model("skipinit_resnet56", "The SkipInit ResNet of 56 layers for images of 32x32.", depth=56)
@register_model("skipinit_resnet110", "The SkipInit ResNet of 110 layers for images of 32x32.", depth=110)
class SkipInitResNet(NormFreeResNet):
    r"""The pre-activation ResNet for images of 32x32 with a learned scale of every branch in place of norms.

    .. math:: y = x + \alpha\,W_2 * \phi(W_1 * \phi(x)), \qquad \alpha = 0 \text{ at the start}

    Convolutions have biases and start as He's. Where a stage begins, the shortcut is a convolution of 1x1 on
    :math:`\phi(x)`.

    Args:
        norm: ``"none"``.
        inputs: ``(C, H, W)``; made for ``(3, 32, 32)``, any size from 4x4 on.
        outputs: width of the answer.
        depth: :math:`6n + 2`.
        width: channels of the first stage.
        start: initial :math:`\alpha`: 0, or about one over the root of the number of blocks, as the paper has too.
        activation: a name in :data:`normzoo.models.layer.ACTIVATIONS`.
        dropout: probability of zero, before the last linear map.

    Shape:
        ``(N, C, H, W)`` to ``(N, outputs)``.

    Deviations:
        The paper's networks on these images are wide ones (width 64 and more) with dropout; ``width`` and
        ``dropout`` are options here.

    Source:
        De, Smith 2020, Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks,
        arXiv 2002.10444.
    """

    def __init__(
        self, *, norm: NormChoice = "none", inputs: Inputs, outputs: int, depth: int = 20, width: int = 16,
        start: float = 0.0, activation: str = "relu", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(norm, inputs, outputs, depth, width, activation, dropout)
        self.conv = _start(_conv(inputs.shape[0], width, 3, bias=True))
        self.stack(lambda a, b, s: SkipInitBlock(a, b, s, start=float(start), activation=self.activation))

    def stem(self, x: Tensor) -> Tensor:
        """What the first block gets."""
        return self.conv(x)

    def read(self, x: Tensor) -> Tensor:
        """The mean over positions."""
        return self.activation(x).mean((2, 3))


# ---- NF-ResNet -------------------------------------------------------------------------------------------------------


@cache
def variance_gain(activation: str) -> float:
    r"""The factor that gives an activation of standard normal values variance one.

    .. math:: \gamma = \mathrm{Var}[\phi(z)]^{-1/2}, \qquad z \sim \mathcal N(0, 1)

    For ReLU it is :math:`\sqrt{2 / (1 - 1/\pi)}`.

    >>> round(variance_gain("relu"), 6) == round(math.sqrt(2 / (1 - 1 / math.pi)), 6)
    True
    """
    return gain_of(activation_beside(None, activation))


class GainedActivation(nn.Module):
    """An activation times its :func:`variance_gain`."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation_beside(None, activation)
        self.gain = variance_gain(activation)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return self.activation(x) * self.gain


class ScaledStandardConv2d(nn.Conv2d):
    r"""A convolution with scaled weight standardization, a learned gain and a bias.

    .. math:: \hat W_i = g_i \frac{W_i - \mu_i}{\sqrt{\max(N \sigma_i^2, \varepsilon)}}

    for each output channel i, over its N weights. Inputs whose channels are independent, with variance one and any
    mean, give outputs of variance one.

    Args:
        before: channels that come in.
        after: channels that go out.
        size: side of the kernel.
        stride: as in :class:`torch.nn.Conv2d`.
        eps: :math:`\varepsilon`.

    Source:
        Brock, De, Smith 2021, Characterizing signal propagation to close the performance gap in unnormalized ResNets,
        arXiv 2101.08692.
    """

    def __init__(self, before: int, after: int, size: int, stride: int = 1, *, eps: float = 1e-4) -> None:
        super().__init__(before, after, size, stride=stride, padding=size // 2)
        self.gain = nn.Parameter(torch.ones(after))
        self.eps = eps
        nn.init.normal_(self.weight, std=(before * size * size) ** -0.5)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def standardized(self) -> Tensor:
        """The weights that are used."""
        var, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        scale = (var * self.weight[0].numel()).clamp(min=self.eps).rsqrt()
        return (self.weight - mean) * scale * self.gain.view(-1, 1, 1, 1)

    def forward(self, input: Tensor) -> Tensor:
        """As :class:`torch.nn.Conv2d`."""
        return F.conv2d(input, self.standardized(), self.bias, self.stride, self.padding)


class NFBlock(nn.Module):
    """A pre-activation block that expects an input of variance ``1 / beta ** 2``."""

    def __init__(
        self, before: int, after: int, stride: int, *, alpha: float, beta: float, skip_init: bool,
        activation: nn.Module,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = ScaledStandardConv2d(before, after, 3, stride)
        self.conv2 = ScaledStandardConv2d(after, after, 3)
        changes = stride > 1 or before != after
        self.shortcut = ScaledStandardConv2d(before, after, 1, stride) if changes else None
        self.alpha, self.beta = alpha, beta
        self.scale = _scalar(0.0) if skip_init else None
        self.activation = activation

    def branch(self, x: Tensor) -> Tensor:
        """The branch, from ``x`` of variance one, activated."""
        return self.conv2(self.activation(self.conv1(x)))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, before, H, W)`` to ``(N, after, H / stride, W / stride)``."""
        u = self.activation(x * self.beta)
        x = x if self.shortcut is None else self.shortcut(u)
        y = self.branch(u) * self.alpha
        return x + (y if self.scale is None else self.scale * y)

    def extra_repr(self) -> str:
        """Both scales."""
        return f"alpha={self.alpha:g}, beta={self.beta:.4g}"


@register_model("nf_resnet")
@register_model("nf_resnet20", "The NF-ResNet of 20 layers for images of 32x32.", depth=20)
@register_model("nf_resnet56", "The NF-ResNet of 56 layers for images of 32x32.", depth=56)
@register_model("nf_resnet110", "The NF-ResNet of 110 layers for images of 32x32.", depth=110)
class NFResNet(NormFreeResNet):
    r"""The pre-activation ResNet for images of 32x32 whose scales keep track of the variance.

    .. math:: x_{l+1} = x_l + \alpha f_l(\beta_l x_l), \qquad \beta_l = \mathrm{Var}(x_l)^{-1/2}

    where the variance is the one to be expected at the start: it grows by :math:`\alpha^2` a block, and is one again
    after the shortcut convolution of 1x1 where a stage begins. All convolutions are
    :class:`ScaledStandardConv2d`, all activations are scaled by their :func:`variance_gain`.

    Args:
        norm: ``"none"``.
        inputs: ``(C, H, W)``; made for ``(3, 32, 32)``, any size from 4x4 on.
        outputs: width of the answer.
        depth: :math:`6n + 2`.
        width: channels of the first stage.
        alpha: :math:`\alpha`.
        skip_init: a learned scale of each branch besides, which starts at zero, as in the authors' code.
        activation: a name in :data:`normzoo.models.layer.ACTIVATIONS`.
        dropout: probability of zero, before the last linear map.

    Shape:
        ``(N, C, H, W)`` to ``(N, outputs)``.

    Deviations:
        Blocks are basic ones, of two convolutions of 3x3, as ResNets for these images have; the paper's have a
        bottleneck. Stochastic depth is left out. The activation follows :math:`\beta`, as in the paper; in the
        authors' code it comes before, which is the same for ReLU.

    Source:
        Brock, De, Smith 2021, Characterizing signal propagation to close the performance gap in unnormalized ResNets,
        arXiv 2101.08692. Train it with :func:`clip_adaptively_` at large batch sizes.
    """

    def __init__(
        self, *, norm: NormChoice = "none", inputs: Inputs, outputs: int, depth: int = 20, width: int = 16,
        alpha: float = 0.2, skip_init: bool = False, activation: str = "relu", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(norm, inputs, outputs, depth, width, activation, dropout)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise NormzooError(f"alpha={alpha!r}; expected a positive number, 0.2 in the paper")
        self.activation = GainedActivation(activation)
        self.conv = ScaledStandardConv2d(inputs.shape[0], width, 3)
        variance = 1.0

        def block(before: int, after: int, stride: int) -> NFBlock:
            nonlocal variance
            beta = variance**-0.5
            if stride > 1 or before != after:
                variance = 1.0
            variance += alpha**2
            return NFBlock(before, after, stride, alpha=alpha, beta=beta, skip_init=skip_init,
                           activation=self.activation)  # fmt: skip

        self.stack(block)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def stem(self, x: Tensor) -> Tensor:
        """What the first block gets."""
        return self.conv(x)

    def read(self, x: Tensor) -> Tensor:
        """The mean over positions."""
        return self.activation(x).mean((2, 3))


@torch.no_grad()
def clip_adaptively_(
    model: nn.Module, *, clipping: float = 0.01, eps: float = 1e-3, leave: Iterable[str] = ("head",)
) -> None:
    r"""Adaptive gradient clipping: bound the gradient of each unit by the size of its weights, in place.

    .. math:: g_i \leftarrow g_i \min\left(1, \lambda \frac{\max(\lVert w_i \rVert, \varepsilon)}{\lVert g_i \rVert}
        \right)

    A unit is a row of a matrix, the kernel of an output channel, or a whole vector or scalar. Call it between the
    backward pass and the optimizer's step.

    Args:
        model: the model, with gradients; parameters without are left out.
        clipping: :math:`\lambda`.
        eps: :math:`\varepsilon`; what starts at zero can move at all.
        leave: names of modules whose gradients are left alone: the last linear map, says the paper.

    Raises:
        NormzooError: for a module to leave alone that the model does not have.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 0.5)
        >>> layer(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> clip_adaptively_(layer, clipping=0.1, leave=())
        >>> round(layer.weight.grad.norm().item() / layer.weight.norm().item(), 4)
        0.1

    Source:
        Brock, De, Smith, Simonyan 2021, High-Performance Large-Scale Image Recognition Without Normalization,
        arXiv 2102.06171.
    """
    known = dict(model.named_modules())
    if missing := [name for name in leave if name not in known]:
        raise NormzooError(f"{type(model).__name__} has no module {missing[0]!r} to leave alone; give leave=()")
    left = {id(p) for name in leave for p in known[name].parameters()}
    for parameter in model.parameters():
        grad = parameter.grad
        if grad is None or id(parameter) in left:
            continue
        bound = clipping * _unit_norm(parameter).clamp(min=eps)
        grad.mul_((bound / _unit_norm(grad).clamp(min=1e-6)).clamp(max=1))


def _unit_norm(x: Tensor) -> Tensor:
    if x.squeeze().ndim <= 1:
        return torch.linalg.vector_norm(x)
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


# ---- SELU ------------------------------------------------------------------------------------------------------------


class AlphaDropout(Dropout):
    r"""Dropout to the lowest value of SELU, and back to mean zero and variance one.

    .. math:: y = a (m \odot x + (1 - m) \alpha') + b, \qquad m \sim \mathrm{Bernoulli}(q), \quad q = 1 - p

    with :math:`\alpha' = -\lambda \alpha \approx -1.7581`, :math:`a = (q + \alpha'^2 q (1 - q))^{-1/2}` and
    :math:`b = -a (1 - q) \alpha'`. Its random numbers are those of :class:`normzoo.models.Dropout`.

    Args:
        p: probability to be dropped.

    Source:
        Klambauer et al. 2017, Self-Normalizing Neural Networks, arXiv 1706.02515.
    """

    lowest: ClassVar[float] = -1.0507009873554804934193349852946 * 1.6732632423543772848170429916717

    def forward(self, x: Tensor) -> Tensor:
        """Drop in training, pass on in evaluation; any shape."""
        if not self.training or self.p == 0:
            return x
        kept = super().forward(torch.where(x == 0, 1, x.detach())) != 0  # what is zero was dropped
        keep = 1 - self.p
        a = (keep + self.lowest**2 * keep * self.p) ** -0.5
        return a * torch.where(kept, x, self.lowest) - a * self.p * self.lowest


@register_model("selu_mlp")
class SELUMLP(Network):
    r"""Fully connected layers that normalise themselves: SELU activations and LeCun's initial weights.

    .. math:: h_l = \mathrm{selu}(W_l h_{l-1} + b_l), \qquad
        \mathrm{selu}(x) = \lambda \begin{cases} x & x > 0 \\ \alpha (e^x - 1) & x \le 0 \end{cases}

    with :math:`\lambda \approx 1.0507`, :math:`\alpha \approx 1.6733`: mean 0 and variance 1 are then a stable fixed
    point from layer to layer. Weights start normal with variance 1 / fan-in, biases at zero. Inputs should have mean 0
    and variance 1.

    Args:
        norm: ``"none"``.
        inputs: any shape, flattened.
        outputs: width of the answer.
        widths: width of each hidden layer.
        dropout: probability to be dropped, by :class:`AlphaDropout`, after each hidden layer.

    Shape:
        ``(N, *inputs.shape)`` to ``(N, outputs)``.

    Source:
        Klambauer, Unterthiner, Mayr, Hochreiter 2017, Self-Normalizing Neural Networks, arXiv 1706.02515.
    """

    family = "mlp"
    norm_free = True

    def __init__(
        self, *, norm: NormChoice = "none", inputs: Inputs, outputs: int, widths: tuple[int, ...] = (128, 128),
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(inputs, outputs)
        refuse_norm(type(self).__name__, norm)
        sizes = (self.features, *whole_numbers("widths", widths))
        self.body = nn.Sequential()
        for before, after in pairwise(sizes):
            self.body.extend([_lecun(before, after), nn.SELU(), AlphaDropout(dropout)])
        self.head = _lecun(sizes[-1], outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class; a mask is refused."""
        return self.head(self.body(self.admit(x, mask).flatten(1)))


def _lecun(before: int, after: int) -> nn.Linear:
    linear = nn.Linear(before, after)
    nn.init.normal_(linear.weight, std=before**-0.5)
    nn.init.zeros_(linear.bias)
    return linear
