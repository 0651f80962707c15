"""Norms whose statistics follow time, against loops in float64."""

from __future__ import annotations

import pytest
import torch

import normzoo as nz


def sequences() -> torch.Tensor:
    return 3 * torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1


@pytest.mark.parametrize("window", [1, 3, 9, 20])
def test_assorted_time_norm_equals_a_loop(window):
    x = sequences().requires_grad_()
    expected = torch.empty_like(x)
    for b in range(3):
        for t in range(9):
            seen = x[b, max(0, t - window + 1) : t + 1]
            std = torch.sqrt(seen.var(correction=0) + 1e-5)
            expected[b, t] = (x[b, t] - seen.mean()) / std
    norm = nz.create("assorted_time_norm", 5, channel_dim=-1, window=window, dtype=torch.float64)
    y = norm(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).sin()
    got, wanted = (torch.autograd.grad((z * dy).sum(), x, retain_graph=True)[0] for z in (y, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_a_window_of_one_is_layer_norm():
    x = sequences()
    one = nz.create("assorted_time_norm(window=1)", 5, channel_dim=-1, dtype=torch.float64)
    torch.testing.assert_close(one(x), nz.create("layer_norm", 5, channel_dim=-1, dtype=torch.float64)(x))


def test_padding_at_the_end_is_not_seen():
    x, norm = sequences(), nz.create("assorted_time_norm(window=4)", 5, channel_dim=-1, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [5], [2]])
    padded = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    y = norm(padded, mask)
    for row, real, out in zip(x, mask, y, strict=True):
        torch.testing.assert_close(out[real], norm(row[real][None])[0], rtol=0, atol=1e-10)
    assert (y[~mask] == 0).all()


def test_a_window_without_positions_is_refused():
    with pytest.raises(TypeError, match="positive number"):
        nz.create("assorted_time_norm(window=0)", 5)
