"""A data set of photos: each is read as it lies on disk, then transformed."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch.utils.data import Dataset

from effseg.data.samples import Classes, Sample, TaskName

Transform = Callable[[Sample], Sample]


class PhotoDataset(Dataset[Sample]):
    """Samples of one class list; a subclass says how many there are and how one is read.

    Args:
        classes: the class list, background first.
        transform: a function from a sample to a sample, or None.
        source: what to call the set in an error, usually its list file or folder.
    """

    tasks: tuple[TaskName, ...] = ()
    """What the labels are for."""

    def __init__(self, classes: Classes, transform: Transform | None, source: Path) -> None:
        """Keep the settings."""
        self.classes = classes
        self.transform = transform
        self.source = source

    @property
    def ids(self) -> Sequence[str]:
        """The photos' ids, in the order of the samples."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Return the number of photos."""
        raise NotImplementedError

    def read(self, index: int) -> Sample:
        """Read sample ``index`` as it lies on disk, without the transform.

        Raises:
            InputError: a file is missing, truncated or corrupt, or its labels do not fit.
        """
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """Read sample ``index`` and transform it; raises as :meth:`read`."""
        sample = self.read(index)
        return sample if self.transform is None else self.transform(sample)
