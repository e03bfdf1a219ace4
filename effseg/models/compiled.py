"""torch.compile with the weights in the graph, and a check that it computes the same."""

# B batch, C channels, H W pixels.

from typing import Any

import torch
from torch import nn

from effseg.errors import InputError

TOLERANCE = 1e-4
"""Largest difference of outputs in float32, relative to their largest value."""
ROUGH_TOLERANCE = 2e-2
"""The same where products have the 8 to 11 bits of bfloat16, float16 or TF32."""


def compile_frozen(model: nn.Module) -> None:
    """``torch.compile`` a module in place, its weights constants of the graph; no gradients.

    The first call of every input size takes a minute or so, and its outputs are compared with
    those of the module itself; from the ninth size on it runs uncompiled, with a warning (torch's
    ``recompile_limit``). Weights that change later change nothing.

    torch.compile's own option ``freezing`` is not enough: while it traces the module, which is
    where a weight becomes a constant, that option is not set yet. On a CPU the calls of the
    convolutions are compiled, too (``cpp_wrapper``): a deep network has hundreds of short ones.

    Raises:
        InputError: by a call whose outputs are not the module's.
    """
    from torch._inductor import config as inductor_config  # takes a second

    model.compile(dynamic=False)  # sizes as numbers, which kernels are made for
    run = model._compiled_call_impl
    assert run is not None
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    compared = set()

    def frozen(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), inductor_config.patch(freezing=True, cpp_wrapper=on_cpu):
            output = run(*args, **kwargs)
            call = repr([_form(value) for value in (*args, *sorted(kwargs.items()))])
            if call not in compared:
                compare(model, model._call_impl(*args, **kwargs), output, "compiling")
                compared.add(call)
        return output

    model._compiled_call_impl = frozen


def _form(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


def compare(model: nn.Module, expected: Any, found: Any, after: str) -> None:
    """Check that two outputs of a model, tensors or nested sequences of them, are the same.

    Raises:
        InputError: they differ by more than the tolerance; the message says after what.
    """
    for a, b in zip(_tensors(expected), _tensors(found), strict=True):
        full = a.dtype == torch.float32 and a.device.type == "cpu"  # CUDA may multiply in TF32
        tolerance = TOLERANCE if full else ROUGH_TOLERANCE
        scale = float(a.abs().max().clamp(min=1e-12))
        error = float((a.float() - b.float()).abs().max()) / scale
        if not error <= tolerance:
            raise InputError(
                f"{type(model).__name__}: outputs differ by {error:.1e} of the largest after "
                f"{after}, expected at most {tolerance:g}; the model cannot be optimised"
            )


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for part in output if part is not None for t in _tensors(part)]
