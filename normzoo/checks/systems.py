"""Whether the machinery around a model takes the norm: compilers, exporters, transformations, processes."""

from __future__ import annotations

import importlib.util
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call as torch_functional_call
from torch.func import stack_module_state
from torch.func import vmap as torch_vmap

from normzoo.checks import pair
from normzoo.checks.kit import check
from normzoo.checks.subject import (
    CheckFailed,
    NotApplicable,
    Subject,
    all_same,
    call,
    finite,
    gradients,
    require,
    same,
    state,
    twin,
)

_steps = itertools.count()
_ONNX = ("onnx", "onnxscript", "onnxruntime")


@check
def autocast(subject: Subject) -> None:
    """Autocast changes neither the dtype nor the precision: statistics are float32 inside it as outside.

    Compute under torch.autocast(x.device.type, enabled=False), in float32 or wider.
    """
    for dtype in (torch.float32, torch.bfloat16):
        norm, x = subject.make(dtype=torch.float32), subject.data(dtype=dtype, peak=30.0)
        if subject.foreign and dtype == torch.bfloat16:
            continue
        expected = gradients(twin(norm), x)
        with torch.autocast("cpu", torch.bfloat16):
            got = gradients(norm, x)
        finite(got, f"{dtype} input under autocast")
        if not subject.foreign:
            require(got["the output"].dtype == dtype, f"{dtype} input gives {got['the output'].dtype} under autocast")
        all_same(got, expected, f"{dtype} input under autocast", 5e-2 if subject.foreign else 1e-5)


@check
def functional_call(subject: Subject) -> None:
    """The norm is a function of its parameters and buffers: given others, it uses and updates those, not its own.

    Keep all state in parameters and buffers, and write to it in place.
    """
    norm, other = subject.make(), subject.make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    for seed in range(2):
        call(other, 2 * subject.data(seed=seed) - 3)
    before = state(norm)
    for training in (True, False):
        norm.train(training)
        other.train(training)
        x = subject.data(seed=4)
        given = {k: p.detach() for k, p in other.named_parameters()} | state(other)
        torch.manual_seed(0)
        got = torch_functional_call(norm, given, (x,))
        same(got, call(other, x), "with another norm's parameters and buffers: the output")
        all_same({name: given[name] for name, _ in other.named_buffers()}, state(other), "the buffers that were given")
        all_same(state(norm), before, "the norm's own buffers", 0)


@check
def vmap(subject: Subject) -> None:
    """Several norms run as one under torch.func.vmap with their parameters and buffers stacked, as several seeds do.

    Do not branch on values, and update buffers in place by operations that vmap knows.
    """
    for training in (True, False):
        norms = [subject.make(training=training) for _ in range(3)]
        for i, norm in enumerate(norms):
            with torch.no_grad():
                for parameter in norm.parameters():
                    parameter.add_(0.1 * i)
            call(norm.train(), subject.data(seed=i))
            norm.train(training)
        xs = torch.stack([subject.data(seed=10 + i) for i in range(3)])
        parameters, buffers = stack_module_state(list[nn.Module](norms))
        base = twin(norms[0])

        def one(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, base: nn.Module = base) -> Tensor:
            return torch_functional_call(base, (p, b), (x,))

        torch.manual_seed(0)
        ys = torch_vmap(one, randomness="same")(parameters, buffers, xs)
        for i, norm in enumerate(norms):
            where = f"norm {i} of three under vmap {'in training' if training else 'in evaluation'}"
            same(ys[i], call(norm, xs[i]), f"{where}: the output")
            all_same({name: b[i] for name, b in buffers.items()}, state(norm), where)


@check
def sync_conversion(subject: Subject) -> None:
    """Torch's convert_sync_batchnorm, which Trainer(sync_batchnorm=True) calls, does not replace it by something else.

    Do not inherit from torch's _BatchNorm classes: their subclasses are replaced by plain SyncBatchNorm without a word.
    """
    norm, x = subject.make(), subject.data()
    expected = call(twin(norm), x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(twin(norm)))
    same(call(converted, x), expected, "after convert_sync_batchnorm: the output")
    kinds = [type(module) for module in converted.modules()][1:]
    if kinds != [type(module) for module in norm.modules()] and subject.traits is not None:
        raise CheckFailed(f"convert_sync_batchnorm turned it into {kinds[-1].__name__}")


# ---- compilers and exporters -----------------------------------------------------------------------------------------


@check(slow=True)
def compile(subject: Subject) -> None:
    """torch.compile(fullgraph=True) takes it whole, compiles training once and evaluation once, and gives the same.

    Take out .item(), printing and Python counters that change from step to step; count in a buffer.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._dynamo.testing import CompileCounterWithBackend

    norm = subject.make(dtype=torch.float32)
    plain = twin(norm)

    def step(x: Tensor) -> Tensor:
        return norm(x)

    # code with a name of its own: the compiler counts by code object, and learns which sizes vary by name
    step.__code__ = step.__code__.replace(co_name=f"step_{next(_steps)}")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for training, steps in ((True, 4), (False, 2)):
        norm.train(training)
        plain.train(training)
        mode = "training" if training else "evaluation"
        before = counter.frame_count
        for seed in range(steps):
            x, y = (subject.data(seed=seed, dtype=torch.float32).requires_grad_() for _ in range(2))
            torch.manual_seed(0)
            try:
                got = compiled(x)
            except TorchDynamoException as error:
                raise CheckFailed(f"in {mode}: {_dynamo(error)}") from error
            expected = call(plain, y)
            same(got, expected, f"compiled against eager in {mode}: the output", 1e-5)
            if expected.requires_grad:
                got.sin().sum().backward()
                expected.sin().sum().backward()
                assert x.grad is not None
                assert y.grad is not None
                same(x.grad, y.grad, f"compiled against eager in {mode}: the gradient of the input", 1e-4)
        all_same(state(norm), state(plain), f"compiled against eager in {mode}", 1e-5)
        count = counter.frame_count - before
        require(count <= 1, f"{steps} steps of {mode} compiled {count} times: something changes from step to step")


def _dynamo(error: Exception) -> str:
    """The first line of a long message, and the user's line it is about."""
    lines = [line.strip() for line in str(error).splitlines()]
    places = [line for line in lines if line.startswith("File ") and "normzoo/checks/" not in line]
    return f"{type(error).__name__}: {lines[0]}" + (f" ({places[-1]})" if places else "")


@check(slow=True)
def export(subject: Subject) -> None:
    """torch.export takes it in evaluation with a batch size left open, and the exported program gives the same.

    Use no Python value that depends on the data or on the number of samples.
    """
    norm = _trained(subject)
    x, other = subject.data(dtype=torch.float32), subject.data((9, 10), seed=1, dtype=torch.float32)
    program = torch.export.export(norm, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    same(program.module()(other), call(norm, other), "the exported program on another batch size: the output", 1e-5)


@check(slow=True)
def onnx(subject: Subject) -> None:
    """The ONNX export in evaluation runs in onnxruntime and gives the same.

    Use operations that ONNX has; torch.onnx.export names the one that it has not.
    """
    if any(importlib.util.find_spec(name) is None for name in _ONNX):
        raise NotApplicable(f"needs {', '.join(_ONNX)}: pip install {' '.join(_ONNX)}")
    import onnxruntime

    norm = _trained(subject)
    x = subject.data(dtype=torch.float32)
    with _quiet():
        try:
            program = torch.onnx.export(norm, (x,), dynamo=True, verbose=False)
        except RuntimeError as error:
            causes = [line for line in str(error).splitlines() if line.startswith("<class")]
            raise CheckFailed("; ".join(cause.partition(": ")[2] for cause in causes) or str(error)) from error
        assert program is not None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    same(torch.from_numpy(output), call(norm, x), "onnxruntime against torch: the output", 1e-4)


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _trained(subject: Subject) -> nn.Module:
    norm = subject.make(dtype=torch.float32)
    call(norm, subject.data(dtype=torch.float32, seed=2))
    return norm.eval()


# ---- two processes ---------------------------------------------------------------------------------------------------


@check(slow=True)
def synchronization(subject: Subject) -> None:
    """With sync=True two processes compute what one does on the whole batch, with unequal, empty and padded shares.

    Merge the moments of all processes by their numbers of real elements; a mean of means is another thing.
    """
    subject.declared()
    subject.need("sync")
    for lengths in pair.LENGTHS:
        for masked in (False, True):
            one = pair.train(subject, slice(None), masked)
            two = pair.ask(subject)["sync", lengths, masked]
            where = f"batches of {lengths[0]} and {lengths[1]}{' with padding' if masked else ''}"
            if isinstance(two, str):
                raise CheckFailed(f"{where}: {two}")
            for name, expected in one.items():
                if name.startswith("buffer"):
                    for rank in (0, 1):
                        same(two[rank][name], expected, f"{where}: {name} in process {rank}")
                elif name.startswith("the gradient of") and "input" not in name:
                    same(two[0][name] + two[1][name], expected, f"{where}: {name}")
                else:
                    same(torch.cat([two[0][name], two[1][name]]), expected, f"{where}: {name}")


@check(slow=True)
def distributed_data_parallel(subject: Subject) -> None:
    """In DistributedDataParallel two forward passes and a backward pass work, and the processes stay equal.

    Use every parameter in every forward pass, and keep what the graph needs out of reach of in-place updates.
    """
    two = pair.ask(subject)["ddp"]
    if isinstance(two, str):
        raise CheckFailed(two)
    for name, value in two[0].items():
        finite({name: value}, "in process 0")
        same(two[1][name], value, f"process 1 against process 0: {name}", 1e-12)
