"""Timing that survives a noisy machine: several things take turns in one process."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from effseg.errors import InputError


@dataclass(frozen=True)
class Timing:
    """Seconds of a step over the rounds."""

    median: float
    least: float
    most: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, rounds: list[float]) -> "Timing":
        """Summarise the rounds."""
        return cls(statistics.median(rounds), min(rounds), max(rounds), tuple(rounds))


def take_turns(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int = 9,
    seconds: float = 0.3,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time steps round by round, so that a slow moment of the machine meets all of them.

    A round repeats each step for about ``seconds``; the garbage collector is off meanwhile.

    Args:
        steps: name to what is timed; each is run twice first.
        rounds: number of rounds.
        seconds: of a step in a round.
        device: ``cuda`` waits for the device after every round.

    Raises:
        InputError: no round.
    """
    if rounds < 1:
        raise InputError(f"rounds={rounds}: expected at least 1")

    def run(step: Callable[[], Any], count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    counts: dict[str, int] = {}
    for name, step in steps.items():
        run(step, 1)
        counts[name] = max(1, round(seconds / run(step, 1)))
    found: dict[str, list[float]] = {name: [] for name in steps}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, step in steps.items():
                found[name].append(run(step, counts[name]))
    finally:
        if enabled:
            gc.enable()
    return {name: Timing.of(times) for name, times in found.items()}


def ratio(first: Timing, second: Timing) -> float:
    """Return the ratio of the medians, first over second."""
    return first.median / second.median
