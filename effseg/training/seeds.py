"""Random numbers of a step depend only on its position in the run."""

import random

import numpy as np
import torch


def seed_step(*place: int) -> None:
    """Seed all generators from the run's seed, epoch, batch and process.

    A resumed run then needs no generator states, and loaders, which draw from the generators
    depending on their number of workers, change nothing.
    """
    seed = int(np.random.SeedSequence(place).generate_state(1)[0])
    torch.manual_seed(seed)  # of all devices
    np.random.seed(seed)  # noqa: NPY002  (for transforms and heads that draw from it)
    random.seed(seed)
