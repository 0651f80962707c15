"""What every norm owes its caller: how it is made, what it takes, what it gives back."""

from __future__ import annotations

import random

import numpy as np
import torch

from normzoo.checks.kit import check
from normzoo.checks.subject import (
    HALVES,
    IMAGES,
    ROWS,
    CheckFailed,
    NotApplicable,
    Subject,
    all_same,
    call,
    gradients,
    require,
    same,
    state,
    twin,
)
from normzoo.registry import create, resolve

SHAPES = {"(N, C)": (6,), "(N, C, S)": ROWS, "(N, C, H, W)": IMAGES, "(N, C, D, H, W)": (6, 2, 3, 2)}


@check
def construction(subject: Subject) -> None:
    """A norm is made from its width alone, says its width and layout, and two of a kind start equal.

    Give every option a default, name channel_dim in the signature, and hand width and layout to Norm.__init__.
    """
    for width in (subject.channels, 2 * subject.channels):
        one, other = create(subject.spec, width), create(subject.spec, width)
        all_same(dict(other.named_parameters()), dict(one.named_parameters()), f"the second norm of width {width}")
        all_same(state(other), state(one), f"the second norm of width {width}")
        require(one.num_features == width, f"num_features is {one.num_features} of a norm of width {width}")
    require(
        create(subject.spec, subject.channels, -1).channel_dim == -1, "channel_dim is not -1 where -1 was asked for"
    )
    if subject.foreign:
        return
    factory, _ = resolve(subject.spec)
    for wrong in ({"num_features": 0}, {"channel_dim": 2}):
        try:
            factory(**{"num_features": subject.channels} | wrong)  # pyright: ignore[reportArgumentType]
        except ValueError:
            continue
        raise CheckFailed(f"{wrong} was accepted")


@check
def unknown_options(subject: Subject) -> None:
    """An option that the norm does not have is refused: a mistyped one must not be lost.

    Name all options in the signature instead of collecting them in **kwargs.
    """
    try:
        create(subject.spec, subject.channels, no_such_option=1)
    except TypeError as error:
        require("no_such_option" in str(error), f"the error does not name the option: {error}")
        return
    raise CheckFailed("no_such_option=1 was accepted")


@check
def factory_options(subject: Subject) -> None:
    """The options device and dtype decide where parameters live and in which precision.

    Take device=None and dtype=None and hand them to every tensor that the constructor makes.
    """
    norm = subject.make(fresh=True)
    if subject.foreign:
        raise NotApplicable("undeclared")
    if not list(norm.parameters()) and not list(norm.buffers()):
        raise NotApplicable("has neither parameters nor buffers")
    for option in ("device", "dtype"):
        require(option in subject.options, f"the constructor takes no {option}")
    made = create(subject.spec, subject.channels, device="meta", dtype=torch.float64)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        require(tensor.device.type == "meta", f"{name} is on {tensor.device} with device='meta'")
        if tensor.is_floating_point():
            require(tensor.dtype == torch.float64, f"{name} is {tensor.dtype} with dtype=torch.float64")


@check
def affine_option(subject: Subject) -> None:
    """Without the affine part there are no gain and shift, and nothing else changes.

    Register the parameters as None when affine (or bias) is False, and skip them in forward.
    """
    options = [option for option in ("affine", "bias") if subject.takes(option)]
    if not options:
        raise NotApplicable("has no open option 'affine'")
    x = subject.data()
    for option in options:
        plain, full = (subject.make({option: value}, fresh=True) for value in (False, True))
        kept = dict(plain.named_parameters())
        roles = {plain.roles.get(name, "other") for name in kept}
        for role in ("gain", "shift") if option == "affine" else ("shift",):
            require(role not in roles, f"{option}=False leaves a parameter that is a {role}")
        neutral = {"gain": 1.0, "shift": 0.0}
        gone = [(full.roles.get(name), p) for name, p in full.named_parameters() if name not in kept]
        if all(role in neutral and bool((p == neutral[role]).all()) for role, p in gone):
            same(call(plain, x), call(full, x), f"the output with {option}=False")


@check
def eps_option(subject: Subject) -> None:
    """The option eps is used and shown.

    Add eps to what is divided by, and name it in extra_repr.
    """
    subject.need("eps")
    x = subject.data(peak=0.1)
    small, large = (call(subject.make({"eps": eps}), x) for eps in (1e-5, 0.7031))
    require(not torch.allclose(small, large, rtol=1e-6, atol=0), "eps=0.7031 gives the output of eps=1e-5")
    if not subject.foreign:
        require("0.7031" in repr(subject.make({"eps": 0.7031})), "the repr does not show eps")


@check
def representation(subject: Subject) -> None:
    """The repr names the class and the width.

    Return the width and the options from extra_repr.
    """
    norm = subject.make()
    text = repr(norm)
    require(type(norm).__name__ in text, f"the repr is {text!r}")
    if not subject.foreign:
        require(str(subject.channels) in text, f"the repr {text!r} does not show the width {subject.channels}")


@check
def parameter_shapes(subject: Subject) -> None:
    """Gains and shifts are vectors: rules that spare vectors from weight decay miss a (1, C, 1, 1).

    Keep them as (C,) and reshape where they are used.
    """
    norm = subject.make()
    for name, parameter in norm.named_parameters():
        role = norm.roles.get(name, "other")
        require(parameter.is_floating_point(), f"{name} is {parameter.dtype}")
        if role in ("gain", "shift") and (not subject.foreign or parameter.numel() == subject.channels):
            require(parameter.ndim <= 1, f"{name}, a {role}, has the shape {tuple(parameter.shape)}")


@check
def shapes(subject: Subject) -> None:
    """The output has the shape of the input in every layout, in training and in evaluation.

    Reduce over named axes with keepdim=True, and reshape the result to x.shape.
    """
    for text, shape in SHAPES.items():
        for channel_dim in (1, -1):
            refused = False
            for training in (True, False):
                x = subject.data(shape, channel_dim=channel_dim)
                where = f"{text} with channel_dim={channel_dim} in {'training' if training else 'evaluation'}"
                try:
                    y = call(subject.make(channel_dim=channel_dim, training=training), x)
                except ValueError as refusal:
                    if len(shape) == 1 and (training or refused or not subject.stateful):
                        refused = True  # there may be nothing to take a statistic over
                        continue
                    raise CheckFailed(f"{where}: {refusal}") from refusal
                require(
                    y.shape == x.shape,
                    f"{where}: the output has the shape {tuple(y.shape)}, the input {tuple(x.shape)}",
                )


@check
def layouts(subject: Subject) -> None:
    """Channels first and channels last are the same norm.

    Take channel_dim in the constructor and reduce over that axis; a plain class may have it as an attribute.
    """
    for shape in (ROWS, IMAGES):
        first, last = subject.make(channel_dim=1), subject.make(channel_dim=-1)
        for mode in (True, False):
            x = subject.data(shape, seed=int(mode))
            expected = call(first.train(mode), x)
            got = call(last.train(mode), x.movedim(1, -1).contiguous())
            where = f"channel_dim=-1 against channel_dim=1 in {'training' if mode else 'evaluation'}"
            require(got.shape == expected.movedim(1, -1).shape, f"{where}: the output has the shape {tuple(got.shape)}")
            same(got.movedim(-1, 1), expected, f"{where}: the output")
        all_same(state(last), state(first), "channel_dim=-1 against channel_dim=1")


@check
def dtypes(subject: Subject) -> None:
    """The output has the dtype of the input, whatever the parameters have.

    Compute in float32 or wider, and end with .to(x.dtype).
    """
    for dtype in (torch.float64, torch.float32, *HALVES):
        y = call(subject.make(dtype=dtype), subject.data(dtype=dtype))
        require(y.dtype == dtype, f"a {dtype} norm gives {y.dtype} for {dtype} input")
        if not subject.foreign:
            for training in (True, False):
                y = call(subject.make(dtype=torch.float32, training=training), subject.data(dtype=dtype))
                require(y.dtype == dtype, f"a float32 norm gives {y.dtype} for {dtype} input")


@check
def devices(subject: Subject) -> None:
    """Everything happens on the device of the input, and nothing is read back from it.

    Make tensors with device=x.device, and decide by shapes, not by values (no .item(), no if on a tensor).
    """
    for training in (True, False):
        norm = subject.make(dtype=torch.float32, training=training).to("meta")
        x = torch.empty(6, subject.channels, 10, device="meta")
        y = call(norm, x)
        require(y.device.type == "meta", f"input on the device 'meta' gives output on {y.device}")
        if torch.cuda.is_available():
            norm, x = subject.make(dtype=torch.float32, training=training), subject.data(dtype=torch.float32)
            there = gradients(twin(norm).cuda(), x.cuda())
            all_same({name: value.cpu() for name, value in there.items()}, gradients(norm, x), "on CUDA", 1e-3)


@check
def memory_formats(subject: Subject) -> None:
    """Channels-last memory stays channels-last, contiguous stays contiguous, and the values are the same.

    Give the output the strides of the input: work on views, or end with .contiguous(memory_format=…).
    """
    if subject.foreign:
        raise NotApplicable("undeclared")
    formats = {IMAGES: torch.channels_last, (6, 2, 3, 2): torch.channels_last_3d}
    for shape, memory_format in formats.items():
        for training in (True, False):
            norm, x = subject.make(training=training), subject.data(shape)
            y = call(twin(norm), x)
            require(y.is_contiguous(), "contiguous input gives output that is not")
            z = call(norm, x.to(memory_format=memory_format))
            same(z, y, f"the output for {memory_format}")
            require(
                z.is_contiguous(memory_format=memory_format),
                f"{memory_format} input gives output with the strides {z.stride()} for the shape {tuple(z.shape)}",
            )


@check
def input_unchanged(subject: Subject) -> None:
    """Neither the forward nor the backward pass writes to the input.

    Replace in-place operations on x (x -= mean) by ones that make a new tensor.
    """
    for training in (True, False):
        norm, x = subject.make(training=training), subject.data()
        before, version = x.clone(), x._version
        gradients(norm, x)
        call(norm, x)
        with torch.no_grad():
            call(norm, x)
        require(torch.equal(x, before) and x._version == version, "the input was written to")
        if subject.takes_mask:
            mask = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool)
            mask[0, 3:] = False
            kept = mask.clone()
            call(norm, x, mask)
            require(torch.equal(x, before), "the input was written to where it is masked")
            require(torch.equal(mask, kept), "the mask was written to")


@check
def global_random_state(subject: Subject) -> None:
    """The norm draws nothing from the global generators, or models that differ in their norms differ in their weights.

    Initialise with constants, and take random numbers from a torch.Generator of the norm's own.
    """
    training = [False] if subject.stochastic else [True, False]
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    create(subject.spec, subject.channels)
    for mode in training:
        norm = subject.make(training=mode)
        norm(subject.data())
    after = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    require(torch.equal(before[0], after[0]), "torch's global generator moved")
    require(before[1] == after[1], "the generator of the module random moved")
    require(before[2] == after[2], "NumPy's global generator moved")


@check
def wrong_input(subject: Subject) -> None:
    """Input that does not fit is refused with what was expected, not broadcast.

    Begin forward with self.check_input(x, mask).
    """
    if subject.foreign:
        raise NotApplicable("undeclared")
    channels = subject.channels
    mask = torch.ones(4, 5, dtype=torch.bool)
    wrong = {
        "one channel": ((torch.ones(4, 1, 5),), str(channels)),
        f"{channels + 1} channels": ((torch.ones(4, channels + 1, 5),), str(channels)),
        "integers": ((torch.ones(4, channels, 5, dtype=torch.long),), "dtype"),
        "a mask of another length": ((torch.ones(4, channels, 5), mask[:, :4]), "mask"),
        "a mask of numbers": ((torch.ones(4, channels, 5), mask.float()), "mask"),
    }
    for training in (True, False):
        norm = subject.make(dtype=torch.float32, training=training)
        for what, (arguments, said) in wrong.items():
            try:
                norm(*arguments)
            except ValueError as error:
                require(said in str(error), f"the error for {what} does not say {said!r}: {error}")
                continue
            except (RuntimeError, TypeError, IndexError, AssertionError) as error:
                raise CheckFailed(f"{what}: {type(error).__name__} instead of a ValueError: {error}") from error
            raise CheckFailed(f"{what} was accepted by a norm for {channels} channels")
