"""Every registered norm runs in the CNN, RNN and Transformer benchmarks, or is refused with the reason."""

from __future__ import annotations

import pytest
import torch

import normzoo as nz
from normzoo.models import Inputs, create_model

NETWORKS = {
    "cnn": (Inputs((1, 8, 8)), {"convs": (8, 16)}),
    "lstm_between": (Inputs((8, 8)), {"width": 8}),
    "lstm": (Inputs((4, 8)), {"width": 8}),
    "transformer": (Inputs((16, 4)), {"width": 16, "heads": 2, "depth": 1}),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", nz.list_norms())
def test_trains_and_evaluates(name, network):
    refusal = None
    try:
        train_and_evaluate(name, network)
    except nz.NormzooError as error:
        refusal = str(error)
    if refusal is not None:
        # inside a recurrence there is one position at a time: what averages over positions alone cannot be there
        assert network == "lstm", refusal
        assert "position" in refusal or "channel" in refusal


def train_and_evaluate(name: str, network: str) -> None:
    inputs, options = NETWORKS[network]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(network, norm=name, inputs=inputs, outputs=10, **options)
        x = torch.randn(6, *inputs.shape, generator=generator)
        mask = None
        if len(inputs.shape) == 2:
            lengths = torch.tensor([4, 3, 4, 2, 4, 3])
            mask = torch.arange(inputs.shape[0]) < lengths[:, None]
        for _ in range(2):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(x, mask), torch.arange(6)).backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert gradients
        for key, gradient in gradients.items():
            assert gradient.isfinite().all(), key
        model.eval()
        with torch.no_grad():
            assert model(x, mask).isfinite().all()


@pytest.mark.parametrize("name", nz.list_norms())
def test_a_language_model_takes_what_is_causal(name):
    """In evaluation no logit may depend on a later token, for every norm that says so."""
    if not nz.info(name).traits.causal:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(
            "transformer", norm=name, inputs=Inputs((8,), vocabulary=5, per_position=True), outputs=5,
            width=16, heads=2, depth=1,
        ).double()  # fmt: skip
        tokens = torch.randint(5, (4, 8), generator=torch.Generator().manual_seed(0))
        model(tokens)  # running statistics that are not those of the start
        model.eval()
        changed = tokens.clone()
        changed[:, 5:] = (changed[:, 5:] + 1) % 5
        with torch.no_grad():
            torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5], rtol=0, atol=1e-10)
