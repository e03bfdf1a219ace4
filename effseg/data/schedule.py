"""Which tasks are trained when: separate, joint, staged or alternating."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from effseg.data.samples import TASKS, TaskName
from effseg.errors import InputError


@dataclass(frozen=True)
class Stage:
    """Some epochs with one set of tasks.

    Attributes:
        tasks: ``segmentation``, ``detection`` or both.
        epochs: how many; None: all that are left, in the last stage only.
        alternate: one task a step, in turn, in place of all tasks in every step.
        freeze_encoder: no gradients in the encoder, and its BatchNorms keep their statistics; a
            number n: in what its maps up to level n (stride 2^n) are computed from.
    """

    tasks: list[TaskName] = field(default_factory=lambda: list(TASKS))
    epochs: int | None = None
    alternate: bool = False
    freeze_encoder: bool | int = False

    def __post_init__(self) -> None:
        """Refuse a stage that trains nothing."""
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"stage with tasks {self.tasks}: expected some of {', '.join(TASKS)}")
        if self.epochs is not None and self.epochs < 1:
            raise InputError(f"stage with epochs={self.epochs}: expected at least 1, or null")

    @property
    def turns(self) -> list[tuple[TaskName, ...]]:
        """The tasks of the steps, over and over: all at once, or one after the other."""
        return [(task,) for task in self.tasks] if self.alternate else [tuple(self.tasks)]


@dataclass(frozen=True)
class Schedule:
    """Stages one after the other; by default one, with both tasks in every step."""

    stages: tuple[Stage, ...] = (Stage(),)

    @classmethod
    def of(cls, stages: Sequence[Stage] | None) -> "Schedule":
        """Check a list of stages.

        Raises:
            InputError: an empty list, or a stage without a number of epochs before the last.
        """
        if stages is None:
            return cls()
        if not stages:
            raise InputError("stages: an empty list, expected at least one stage")
        for number, stage in enumerate(stages[:-1]):
            if stage.epochs is None:
                raise InputError(
                    f"stage {number + 1} of {len(stages)}: expected a number of epochs"
                )
        return cls(tuple(stages))

    def locate(self, epoch: int) -> tuple[int, int]:
        """Return the number of the stage of an epoch, and the epoch's number within it.

        Past the end the last stage goes on.
        """
        for number, stage in enumerate(self.stages[:-1]):
            assert stage.epochs is not None
            if epoch < stage.epochs:
                return number, epoch
            epoch -= stage.epochs
        return len(self.stages) - 1, epoch

    def stage(self, epoch: int) -> Stage:
        """Return the stage of an epoch."""
        return self.stages[self.locate(epoch)[0]]

    def tasks(self, epoch: int, batch: int) -> tuple[TaskName, ...]:
        """Return the tasks of a step."""
        turns = self.stage(epoch).turns
        return turns[batch % len(turns)]
