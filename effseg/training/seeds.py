"""Random numbers of a step: a function of its place alone."""

import random

import numpy as np
import torch


def seed_step(*place: int) -> None:
    """Seed all generators by a place: seed of the run, epoch, batch, process.

    A run that goes on then needs no states of generators, of any process; and loaders, which draw
    from them more or less often by the number of their workers, change nothing.
    """
    seed = int(np.random.SeedSequence(place).generate_state(1)[0])
    torch.manual_seed(seed)  # of all devices
    np.random.seed(seed)  # noqa: NPY002  (for transforms and heads that draw from it)
    random.seed(seed)
