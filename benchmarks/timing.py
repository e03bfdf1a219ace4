"""Compare networks and functions: alternating rounds, ratios of medians, peak memory."""

# B batch, C channels, H W pixels.

import gc
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from effseg.benchmark import alternate, model_memory, step_memory
from effseg.errors import flat

Row = dict[str, Any]
"""`name`; `ms` (median), `least`, `most`, `per_second`; `ratio` of the first row's
median to this one's; `peak_mib`; what the suite adds; or `error`."""


@dataclass(frozen=True)
class Settings:
    """How to measure; None: the default of the suite."""

    size: int | None = None
    batch: int | None = None
    rounds: int = 9
    device: str = "cpu"
    train: bool = False
    compile: str | None = None
    """torch.compile's mode: `default` or `reduce-overhead` (CUDA graphs)."""
    bf16: bool = False
    """Inference with bfloat16 weights; training under autocast."""
    seconds: float = 0.3
    """Approximate time for which a round repeats a step."""


class Subject(NamedTuple):
    """A network on its device, and one call of it."""

    model: nn.Module
    call: Callable[[], Any]
    """The forward pass, or the loss in training."""
    compiled: nn.Module | None = None
    """The part to compile; None: all."""


def compare(
    steps: Mapping[str, Callable[[], Any]],
    settings: Settings,
    items: int,
    seconds: float | None = None,
) -> list[Row]:
    """Time steps in alternating rounds; return a row for each, ours first.

    Args:
        steps: functions to time, by name.
        settings: rounds and device.
        items: images or pairs per step, for the rate `per_second`.
        seconds: replaces that of the settings.
    """
    seconds = settings.seconds if seconds is None else seconds
    timings = alternate(steps, settings.rounds, seconds, settings.device)
    first = next(iter(timings.values()), None)
    return [
        {
            "name": name,
            "ms": 1000 * timing.median,
            "least": 1000 * timing.least,
            "most": 1000 * timing.most,
            "per_second": items / timing.median,
            "ratio": first.median / timing.median if first else None,
        }
        for name, timing in timings.items()
    ]


def compare_models(
    makers: Mapping[str, Callable[[], Subject]],
    settings: Settings,
    items: int,
    describe: Callable[[nn.Module], Row] = lambda model: {},
) -> list[Row]:
    """Time networks, or their training steps, in alternating rounds, and add their peak memory.

    A network that fails (a peer that does not compile, or runs eagerly because torch has compiled
    its forward pass for too many others) has its error in its row. CUDA graphs have no peak: torch
    does not count the pool that holds their activations.

    Args:
        makers: name to a builder of the network, so that one can fail without the others.
        settings: rounds, device, precision, and whether to train.
        items: images per step.
        describe: returns additions to the row of a network, called before it runs.
    """
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[[], Any]] = {}
    if settings.compile is not None:
        torch.compiler.reset()  # networks of one class share a limit, those measured before, too
    for name, make in makers.items():
        rows[name] = {"name": name}
        try:
            subject = make()
            rows[name] |= describe(subject.model)
            if settings.compile is not None:
                (subject.compiled or subject.model).compile(mode=settings.compile)
            step, kept = (_training if settings.train else _inference)(subject, settings)
            strict = torch.compiler.config.patch(fail_on_recompile_limit_hit=True)  # type: ignore[attr-defined]
            with strict:
                for _ in range(3):  # compiles, chooses kernels, creates the optimiser's state
                    step()
            if settings.compile != "reduce-overhead":
                peak = kept() + step_memory(step, settings.device)
                rows[name]["peak_mib"] = peak / 2**20
            steps[name] = step
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # keep the other rows
            text = flat(error)
            rows[name]["error"] = f"{type(error).__name__}: {text}"
    for row in compare(steps, settings, items):
        rows[row["name"]] |= row
    return list(rows.values())


def compare_halving(
    measure: Callable[[int], list[Row]], batch: int, device: str
) -> tuple[int, list[Row]]:
    """Call `measure(batch)`; if memory is short, with half as many images, down to one.

    Returns:
        The batch size that fits, and the rows; a row with an error if not even 1 did.
    """
    while True:
        try:
            return batch, measure(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                return 1, [{"name": "", "error": "out of memory with one image"}]
            batch //= 2
        finally:
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def _inference(
    subject: Subject, settings: Settings
) -> tuple[Callable[[], None], Callable[[], int]]:
    def step() -> None:
        with torch.inference_mode():
            subject.call()

    return step, lambda: model_memory(subject.model)


def _training(subject: Subject, settings: Settings) -> tuple[Callable[[], None], Callable[[], int]]:
    """Return a step (forward, loss, backward, SGD with momentum) and the memory of its state."""
    optimizer = torch.optim.SGD(subject.model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        half = torch.autocast(settings.device, torch.bfloat16) if settings.bf16 else nullcontext()
        with half:
            loss = subject.call()
        loss.backward()
        optimizer.step()

    def kept() -> int:
        optimizer.zero_grad()
        momentum: list[torch.Tensor] = [v["momentum_buffer"] for v in optimizer.state.values()]
        return model_memory(subject.model) + sum(t.numel() * t.element_size() for t in momentum)

    return step, kept
