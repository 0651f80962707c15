"""The processes of the synchronisation tests: ``python sync_worker.py FOLDER [DEVICE]``.

Each rank leaves its results in the folder. With a device, these are of a few operations on it, by the Triton kernels.
"""

from __future__ import annotations

import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import normzoo as nz
from normzoo import ops
from normzoo.ops import Pattern, kernels

LENGTHS = {
    2: {"even": (4, 4), "uneven": (3, 5), "empty": (8, 0)},
    3: {"uneven": (1, 2, 5), "empty": (3, 0, 5)},
}
CASES = {
    "batch_norm": {"sync": True}, "sync_batch_norm": {}, "batch_norm(momentum=None)": {"sync": True},
    "batch_renorm(warmup=0, r_ramp=0, d_ramp=0, r_max=1.2, d_max=0.3)": {"sync": True},
    "batch_norm(track_running_stats=False)": {"sync": True},
}  # fmt: skip
MASKS = ("none", "some", "a whole share")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
OPERATIONS: dict[str, dict[str, int]] = {
    "b c s -> c": {},
    "b (g c) s -> g": {"g": 3},
    "b (g c) s -> c": {"g": 2},
    "b c s -> ": {},
    "b c s -> c s": {},
    "b c (s p) -> p": {"p": 2},
}
LAYOUTS = ("bcs", "bsc", "image", "image, channels_last")
TURNS: tuple[dict[str, Any], ...] = (
    {},
    {"centred": False},
    {"weight": False, "bias": False},
    {"bias": False, "masked": True},
    {"centred": False, "masked": True},
)


def whole(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of all ranks, a mask, and what the output is multiplied with."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(8, 6, 5, generator=generator, dtype=torch.float64) + 1
    dy = torch.randn(8, 6, 5, generator=generator, dtype=torch.float64)
    return x, torch.rand(8, 5, generator=generator) > 0.3, dy


def step(
    spec: str, options: dict[str, Any], part: slice, masked: str = "none", dtype: torch.dtype = torch.float64, *,
    rounded: torch.dtype | None = None, group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Two training steps on a part of the batch; every number that must agree."""
    norm = nz.create(spec, 6, dtype=torch.promote_types(dtype, torch.float32), **options)
    norm.process_group = group
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 6))
    found = {}
    for seed in range(2):
        x, mask, dy = whole(seed)
        if masked == "a whole share":
            mask[3:] = False
        x, dy = (t.to(rounded or dtype).to(dtype)[part] for t in (x, dy))
        x = x.clone().requires_grad_()
        y = norm(x, None if masked == "none" else mask[part])
        norm.zero_grad()
        y.backward(dy)
        found |= {
            f"y{seed}": y.detach(),
            f"dx{seed}": x.grad,
            f"dw{seed}": norm.weight.grad,
            f"db{seed}": norm.bias.grad,
        }
    return found | {f"buffer {key}": value for key, value in norm.named_buffers()}


def operation(
    text: str, layout: str, turn: dict[str, Any], part: slice, dtype: torch.dtype, sync: bool, device: str = "cpu"
) -> dict[str, Tensor]:
    """The bare operation on a part of the batch, in some layout."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(8, 6, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(8, 2, 8, generator=generator) > 0.4
    parameters = torch.rand(2, 6, generator=generator, dtype=torch.float64)
    x, dy, parameters = (t.to(device, dtype) for t in (x, dy, parameters))
    mask = mask.to(device)
    channels_last = layout == "bsc"
    if not layout.startswith("image"):
        x, dy, mask = x.flatten(2), dy.flatten(2), mask.flatten(1)
    if channels_last:
        x, dy = x.mT, dy.mT
    x = x[part]
    x = x.contiguous(memory_format=torch.channels_last if layout.endswith("channels_last") else torch.contiguous_format)
    x = (2 * x + 3).requires_grad_()
    weight, bias = (
        p.detach().requires_grad_() if turn.get(name, True) else None
        for p, name in zip(parameters, ("weight", "bias"), strict=True)
    )
    y, moments = ops.standardize(
        x, Pattern.parse(text), OPERATIONS[text], channels_last=channels_last, eps=1e-3, weight=weight, bias=bias,
        centred=turn.get("centred", True), mask=mask[part] if "masked" in turn else None, sync=sync,
    )  # fmt: skip
    assert moments is not None
    assert y.stride() == x.stride()
    leaves = {"dx": x} | ({} if weight is None else {"dw": weight}) | ({} if bias is None else {"db": bias})
    gradients = torch.autograd.grad(y, list(leaves.values()), dy[part])
    found = dict(zip(leaves, gradients, strict=True)) | {"y": y.detach()}
    number = torch.as_tensor(moments.number).expand_as(moments.mean)
    return found | {"buffer mean": moments.mean, "buffer var": moments.var, "buffer number": number}


def agree(
    ranks: list[dict[str, Tensor]],
    one: dict[str, Tensor],
    what: str,
    slack: float = 1e-5,
    rounding: float | None = None,
) -> None:
    """Shares of the output and of the input's gradient, sums of the parameters' gradients, the same buffers."""
    for key, expected in one.items():
        values = [rank[key].double() for rank in ranks]
        allowed = slack
        if key.startswith("buffer"):
            got = values
        elif key.startswith(("dw", "db")):
            got = [torch.stack(values).sum(0)]
        else:
            got, allowed = [torch.cat(values)], rounding or slack
        for value in got:
            torch.testing.assert_close(
                value, expected.double(), rtol=allowed, atol=allowed, msg=lambda text, key=key: f"{what}, {key}: {text}"
            )


class Record(TorchDispatchMode):
    """What a rank calls: each collective with its numbers, and the compiled operators."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int, str]] = []
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func.name().split("::")
        if space == "c10d":
            first = torch.utils._pytree.tree_leaves(args)[0]
            self.collectives.append((name, first.numel(), str(first.dtype)))
        if space == "normzoo":
            self.operators.append(name)
        return func(*args, **(kwargs or {}))


def manners(rank: int) -> dict[str, Any]:
    """How two ranks behave towards each other."""
    found: dict[str, Any] = {}
    lengths = {"even": slice(4 * rank, 4 * rank + 4), "empty": slice(0, 8) if rank == 0 else slice(8, 8)}

    def call(part: slice, **needed: bool) -> tuple[Tensor, Tensor, Tensor]:
        x = whole()[0][part].float().requires_grad_(needed.get("x", True))
        weight = torch.ones(6, requires_grad=True)
        y, _ = ops.standardize(x, Pattern.parse("b c s -> c"), {}, eps=1e-5, weight=weight, sync=True)
        return y, x, weight

    for backend in ("auto", "reference"):
        for name, part in lengths.items():
            for needed in (True, False):
                with ops.backend(backend), Record() as record:
                    y, *_ = call(part, x=needed)
                    y.sum().backward()
                found["calls", backend, name, needed] = record.collectives, record.operators
    with ops.backend("auto" if rank == 0 else "reference"):
        found["one by the formula"] = step("sync_batch_norm", {}, lengths["even"], dtype=torch.float32)
    y, _, weight = call(lengths["empty"])
    found["weights alone"] = torch.autograd.grad((y * whole()[2][lengths["empty"]]).sum(), weight)
    y, x, _ = call(lengths["even"])
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    try:
        dx.sum().backward()
    except RuntimeError as error:
        found["twice"] = str(error)
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = step("sync_batch_norm", {}, lengths["even"], dtype=torch.float32)
    return found


def by_triton(rank: int, device: str) -> dict[Any, Any]:
    """Every operation in one layout, every layout and turn among them; and how many times kernels made the gradient."""
    from normzoo.ops import triton

    found: dict[Any, Any] = {"gradients": 0}
    plain = triton._backward

    def counted(*arguments: Any, **options: Any) -> Any:
        found["gradients"] += options["meet"] is not None
        return plain(*arguments, **options)

    triton._backward = counted
    part = slice(0, 3) if rank == 0 else slice(3, 8)
    with ops.backend("triton"):
        for i, text in enumerate(OPERATIONS):
            layout, turn = i % len(LAYOUTS), i % len(TURNS)
            found[text, layout, turn] = operation(
                text, LAYOUTS[layout], TURNS[turn], part, torch.float32, sync=True, device=device
            )
    return found


def by_all(rank: int, world: int) -> dict[Any, Any]:
    """What is tested on a CPU."""
    found: dict[Any, Any] = {}
    for name, lengths in LENGTHS[world].items():
        start = sum(lengths[:rank])
        part = slice(start, start + lengths[rank])
        for spec, options in CASES.items():
            for dtype in DTYPES:
                for masked in MASKS:
                    found[name, spec, dtype, masked] = step(spec, options, part, masked, dtype)
    if world == 3:
        group = dist.new_group([0, 2])  # the second is by itself
        part = slice(0, 8) if rank == 1 else slice(2 * rank, 2 * rank + 4)
        return found | {"group": step("sync_batch_norm", {}, part, dtype=torch.float32, group=group)}
    part = slice(0, 3) if rank == 0 else slice(3, 8)
    for text in OPERATIONS:
        for layout in LAYOUTS:
            for i, turn in enumerate(TURNS):
                found[text, layout, i] = operation(text, layout, turn, part, torch.float32, sync=True)
    return found | manners(rank)


def main(rank: int, world: int, folder: str, device: str | None = None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world,
        timeout=timedelta(seconds=30),
    )  # fmt: skip
    torch.save(by_triton(rank, device) if device else by_all(rank, world), Path(folder) / f"{rank} of {world}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    kernels.load()
    start = multiprocessing.get_context("fork").Process  # what is imported is imported once
    worlds = LENGTHS if len(sys.argv) == 2 else [2]
    ranks = [start(target=main, args=(rank, world, *sys.argv[1:])) for world in worlds for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))
