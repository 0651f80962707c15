"""One rank of the synchronisation tests: ``python sync_worker.py RANK WORLD FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import normzoo as nz

LENGTHS = {"even": (4, 4), "uneven": (3, 5), "empty": (8, 0)}
CASES = {
    "batch_norm": {"sync": True}, "sync_batch_norm": {}, "batch_norm(momentum=None)": {"sync": True},
    "batch_renorm(warmup=0, r_ramp=0, d_ramp=0, r_max=1.2, d_max=0.3)": {"sync": True},
    "batch_norm(track_running_stats=False)": {"sync": True},
}  # fmt: skip


def whole(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The batch of all ranks, a mask, and what the output is multiplied with."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(8, 6, 5, generator=generator, dtype=torch.float64) + 1
    dy = torch.randn(8, 6, 5, generator=generator, dtype=torch.float64)
    return x, torch.rand(8, 5, generator=generator) > 0.3, dy


def step(spec: str, options: dict, part: slice, masked: bool) -> dict[str, torch.Tensor]:
    """Two training steps on a part of the batch; every number that must agree."""
    norm = nz.create(spec, 6, dtype=torch.float64, **options)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 6))
    found = {}
    for seed in range(2):
        x, mask, dy = (t[part] for t in whole(seed))
        x = x.clone().requires_grad_()
        y = norm(x, mask if masked else None)
        norm.zero_grad()
        (y.sin() * dy).sum().backward()
        found |= {
            f"y{seed}": y.detach(),
            f"dx{seed}": x.grad,
            f"dw{seed}": norm.weight.grad,
            f"db{seed}": norm.bias.grad,
        }
    return found | {f"buffer {key}": value for key, value in norm.named_buffers()}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results = {}
    for name, lengths in LENGTHS.items():
        start = sum(lengths[:rank])
        for spec, options in CASES.items():
            for masked in (False, True):
                results[name, spec, masked] = step(spec, options, slice(start, start + lengths[rank]), masked)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
