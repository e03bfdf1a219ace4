"""Lightning data modules of detection: VOC 2012, COCO, and the miniature."""

# N boxes, H W pixels, K classes

from typing import Any

from effseg.data.boxes import Invalid, VOCDetection, VOCDetectionSplit
from effseg.data.coco import COCODetection, Labels, detection_classes
from effseg.data.photo_datamodule import PhotoDataModule
from effseg.data.samples import Classes
from effseg.data.shapes import ShapesPhotos, ShapesSegmentation
from effseg.data.transforms import Augmentation
from effseg.errors import InputError


class DetectionDataModule(PhotoDataModule):
    """Photos and boxes: batches carry ``boxes`` and ``labels``, a tensor a photo.

    ``scale`` is relative to the scale at which the whole photo just fits the crop.

    Args:
        crop_size: side of the training crop in pixels; the model's own size.
        scale: 0.1 … 2 is the paper's.
        colour: strength of the colour change; the paper has none.
        kwargs: the other settings of :class:`PhotoDataModule`.
    """

    scale_to_crop = True

    def __init__(
        self,
        crop_size: int | tuple[int, int] = 512,
        scale: tuple[float, float] = (0.1, 2.0),
        colour: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """Keep the settings."""
        super().__init__(crop_size=crop_size, scale=scale, colour=colour, **kwargs)

    @property
    def num_classes(self) -> int:
        """The number of classes K, without background."""
        return len(self.classes) - 1


class VOCDetectionDataModule(DetectionDataModule):
    """Boxes of Pascal VOC 2012 (``ImageSets/Main``).

    Args:
        root: see :func:`effseg.data.voc.find_voc`; None takes ``EFFSEG_DATA`` or ``./datasets``.
        train_split: ``train`` (5,717 photos) or ``trainval``.
        val_split: ``val`` (5,823).
        kwargs: the settings of :class:`DetectionDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        train_split: VOCDetectionSplit = "train",
        val_split: VOCDetectionSplit = "val",
        **kwargs: Any,
    ) -> None:
        """Keep the settings."""
        super().__init__(**kwargs)
        self.root = root
        self.train_split = train_split
        self.val_split = val_split

    @property
    def classes(self) -> Classes:
        """VOC's classes, background first."""
        return Classes.from_card("voc2012")

    def make_train(self, transform: Augmentation) -> VOCDetection:
        """Return the training split."""
        return VOCDetection(self.root, self.train_split, transform)

    def make_val(self) -> VOCDetection:
        """Return the evaluation split."""
        return VOCDetection(self.root, self.val_split)


class COCODetectionDataModule(DetectionDataModule):
    """COCO 2017, or your own data in its format.

    Args:
        root: see :func:`effseg.data.coco.find_coco`; None takes ``EFFSEG_DATA`` or ``./datasets``.
        train_split: folder of the training photos; ``annotations/instances_SPLIT.json`` their
            boxes.
        val_split: folder of the evaluation photos.
        labels: ``coco80``, ``coco90`` (the published weights') or ``file`` (the categories of the
            evaluation JSON).
        invalid: ``error`` or ``drop``, for boxes without an area inside their photo.
        kwargs: the settings of :class:`DetectionDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        train_split: str = "train2017",
        val_split: str = "val2017",
        labels: Labels = "coco80",
        invalid: Invalid = "drop",
        **kwargs: Any,
    ) -> None:
        """Keep the settings."""
        super().__init__(**kwargs)
        self.root = root
        self.train_split = train_split
        self.val_split = val_split
        self.labels = labels
        self.invalid = invalid

    @property
    def classes(self) -> Classes:
        """The class list, background first; with ``file`` it is read from the evaluation JSON."""
        if self.labels != "file":
            return detection_classes(self.labels, {})[0]
        if self.val_set is None:
            self.setup("validate")
        assert self.val_set is not None
        return self.val_set.classes

    def setup(self, stage: str | None = None) -> None:
        """Find the files.

        Raises:
            InputError: as the data set, or two splits with different categories.
        """
        super().setup(stage)
        assert self.val_set is not None
        if self.train_set is not None and self.train_set.classes != self.val_set.classes:
            raise InputError(
                f"{self.train_set.source} and {self.val_set.source}: expected the same categories"
            )

    def make_train(self, transform: Augmentation) -> COCODetection:
        """Return the training split."""
        return COCODetection(self.root, self.train_split, transform, self.labels, self.invalid)

    def make_val(self) -> COCODetection:
        """Return the evaluation split."""
        return COCODetection(self.root, self.val_split, labels=self.labels, invalid=self.invalid)


class ShapesDetectionDataModule(DetectionDataModule):
    """The boxes of the built-in miniature, drawn on the first use.

    Args:
        root: folder to draw in; None takes :func:`effseg.data.shapes.default_folder`.
        train: number of training photos.
        val: number of evaluation photos.
        size: (H, W) of the photos in pixels.
        drawing_seed: of the photos; order and augmentation have ``seed``.
        crop_size: as in :class:`DetectionDataModule`.
        scale: as in :class:`DetectionDataModule`.
        kwargs: its other settings.
    """

    def __init__(
        self,
        root: str | None = None,
        train: int = 400,
        val: int = 100,
        size: tuple[int, int] = (192, 256),
        drawing_seed: int = 0,
        crop_size: int | tuple[int, int] = 256,
        scale: tuple[float, float] = (0.6, 1.4),
        **kwargs: Any,
    ) -> None:
        """Keep the settings."""
        super().__init__(crop_size=crop_size, scale=scale, **kwargs)
        self.photos = ShapesPhotos.at(root, train, val, size, drawing_seed)

    @property
    def classes(self) -> Classes:
        """Background and six shapes."""
        return Classes.from_card(ShapesSegmentation.card)

    def prepare_data(self) -> None:
        """Draw the photos unless they are there; Lightning calls this in one process only."""
        self.photos.write()

    def make_train(self, transform: Augmentation) -> VOCDetection:
        """Return the training split."""
        return VOCDetection(self.photos.root, "train", transform, ShapesSegmentation.card)

    def make_val(self) -> VOCDetection:
        """Return the evaluation split."""
        return VOCDetection(self.photos.root, "val", card=ShapesSegmentation.card)
