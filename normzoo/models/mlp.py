"""Fully connected networks."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from normzoo.models.base import Inputs, Network, NormChoice, Sites, register_model, whole_numbers
from normzoo.models.layer import Layer, NormPosition


@register_model("mlp")
@register_model(
    "mlp_784", "One hidden layer, 784-256-10 on images of 28x28: linear, norm, activation, linear.", widths=(256,)
)
@register_model(
    "mlp_decay9",
    "Five hidden layers of 100 units; the norms' running averages decay by 0.9 a step (momentum 0.1 in torch's sense).",
    widths=(100,) * 5,
    momentum=0.1,
)
class MLP(Network):
    r"""Fully connected layers, each a linear map, a norm and an activation, and a linear map to the answer.

    .. math:: h_l = \mathrm{dropout}(\phi(\mathrm{norm}_l(W_l h_{l-1} + b_l)))

    The linear maps have a bias whatever the norm, so that all norms share the same other parameters; a norm that
    centres each channel over the batch makes it idle. Weights start as torch's.

    Sites: ``layer1``, ``layer2``, … (pattern ``"layer*"``).

    Args:
        norm: a norm, or a mapping from sites to norms.
        inputs: any shape, flattened.
        outputs: width of the answer.
        widths: width of each hidden layer.
        activation: a name in :data:`normzoo.models.layer.ACTIVATIONS`.
        norm_position: ``"before"`` or ``"after"`` the activation.
        dropout: probability of zero, after each hidden layer.
        momentum: weight of the new value in the running averages of the norms that have them; ``None`` leaves theirs.

    Shape:
        ``(N, *inputs.shape)`` to ``(N, outputs)``.
    """

    family = "mlp"

    def __init__(
        self,
        *,
        norm: NormChoice,
        inputs: Inputs,
        outputs: int,
        widths: tuple[int, ...] = (128, 128),
        activation: str = "relu",
        norm_position: NormPosition = "before",
        dropout: float = 0.0,
        momentum: float | None = None,
    ) -> None:
        super().__init__(inputs, outputs)
        sizes = (self.features, *whole_numbers("widths", widths))
        self.body = nn.Sequential()
        with Sites(norm, channel_dim=1, momentum=momentum) as norm_at:
            for i, (before, after) in enumerate(pairwise(sizes), 1):
                layer = Layer(
                    nn.Linear(before, after),
                    norm_at(f"layer{i}", after),
                    activation=activation,
                    norm_position=norm_position,
                    dropout=dropout,
                )
                self.body.add_module(f"layer{i}", layer)
        self.head = nn.Linear(sizes[-1], outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class; a mask is refused."""
        return self.head(self.body(self.admit(x, mask).flatten(1)))
