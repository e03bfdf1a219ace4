"""Lightning data modules of segmentation: VOC 2012, COCO, your own folder, the miniature."""

# B batch, H W pixels, K classes

from collections.abc import Sequence
from typing import Any

from effseg.data.coco import COCOSegmentation, Masks, mask_classes
from effseg.data.folder import FolderSegmentation, load_classes
from effseg.data.pairs import PairDataset
from effseg.data.photo_datamodule import PhotoDataModule
from effseg.data.samples import Classes
from effseg.data.shapes import ShapesPhotos, ShapesSegmentation
from effseg.data.transforms import Augmentation
from effseg.data.voc import Split, VOCSegmentation


class SegmentationDataModule(PhotoDataModule):
    """Photos and masks: batches carry ``mask``, (B, H, W) uint8 with 255 where nothing is known."""

    @property
    def num_classes(self) -> int:
        """The number of classes K, background included."""
        return len(self.classes)


class VOCDataModule(SegmentationDataModule):
    """Pascal VOC 2012.

    Args:
        root: see :func:`effseg.data.voc.find_voc`; None takes ``EFFSEG_DATA`` or ``./datasets``.
        train_split: ``train_aug`` (10,582 photos), ``train`` (1,464) or ``trainval``.
        val_split: ``val`` (1,449).
        kwargs: the settings of :class:`PhotoDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        train_split: Split = "train_aug",
        val_split: Split = "val",
        **kwargs: Any,
    ) -> None:
        """Keep the settings."""
        super().__init__(**kwargs)
        self.root = root
        self.train_split = train_split
        self.val_split = val_split

    @property
    def classes(self) -> Classes:
        """VOC's 21 classes."""
        return Classes.from_card(VOCSegmentation.card)

    def make_train(self, transform: Augmentation) -> PairDataset:
        """Return the training split."""
        return VOCSegmentation(self.root, self.train_split, transform)

    def make_val(self) -> PairDataset:
        """Return the evaluation split."""
        return VOCSegmentation(self.root, self.val_split)


class FolderDataModule(SegmentationDataModule):
    """Your own data: ``images/{train,val}`` and ``masks/{train,val}``.

    Args:
        root: the folder that holds ``images`` and ``masks``.
        classes: names, background first, or a file of them
            (:func:`effseg.data.folder.load_classes`).
        train_split: sub-folder of the training photos.
        val_split: sub-folder of the evaluation photos.
        kwargs: the settings of :class:`PhotoDataModule`.
    """

    def __init__(
        self,
        root: str,
        classes: Sequence[str] | str,
        train_split: str = "train",
        val_split: str = "val",
        **kwargs: Any,
    ) -> None:
        """Read the class list."""
        super().__init__(**kwargs)
        self.root = root
        self.train_split = train_split
        self.val_split = val_split
        self._classes = load_classes(classes)

    @property
    def classes(self) -> Classes:
        """The class list, background first."""
        return self._classes

    def make_train(self, transform: Augmentation) -> PairDataset:
        """Return the training folder."""
        return FolderSegmentation(self.root, self._classes, self.train_split, transform)

    def make_val(self) -> PairDataset:
        """Return the evaluation folder."""
        return FolderSegmentation(self.root, self._classes, self.val_split)


class COCODataModule(SegmentationDataModule):
    """COCO 2017 with masks rendered from its instances.

    Args:
        root: see :func:`effseg.data.coco.find_coco`; None takes ``EFFSEG_DATA`` or ``./datasets``.
        masks: ``coco_voc21`` (VOC's 20 classes and background) or ``coco80``.
        train_split: folder of the training photos.
        val_split: folder of the evaluation photos.
        min_area: training photos whose objects sum to fewer pixels are left out; 0 keeps all.
        kwargs: the settings of :class:`PhotoDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        masks: Masks = "coco_voc21",
        train_split: str = "train2017",
        val_split: str = "val2017",
        min_area: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """Keep the settings."""
        super().__init__(**kwargs)
        self.root = root
        self.masks = masks
        self.train_split = train_split
        self.val_split = val_split
        self.min_area = min_area

    @property
    def classes(self) -> Classes:
        """The class list, background first."""
        return mask_classes(self.masks)[0]

    def make_train(self, transform: Augmentation) -> COCOSegmentation:
        """Return the training split."""
        return COCOSegmentation(self.root, self.train_split, transform, self.masks, self.min_area)

    def make_val(self) -> COCOSegmentation:
        """Return the evaluation split, whole."""
        return COCOSegmentation(self.root, self.val_split, masks=self.masks)


class ShapesDataModule(SegmentationDataModule):
    """The built-in miniature, drawn on the first use.

    Args:
        root: folder to draw in; None takes :func:`effseg.data.shapes.default_folder`.
        train: number of training photos.
        val: number of evaluation photos.
        size: (H, W) of the photos in pixels.
        drawing_seed: of the photos; order and augmentation have ``seed``.
        crop_size: as in :class:`PhotoDataModule`, smaller by default, as the photos are.
        scale: as in :class:`PhotoDataModule`, with shapes that fit the crop by default.
        kwargs: its other settings.
    """

    def __init__(
        self,
        root: str | None = None,
        train: int = 400,
        val: int = 100,
        size: tuple[int, int] = (192, 256),
        drawing_seed: int = 0,
        crop_size: int | tuple[int, int] = 128,
        scale: tuple[float, float] = (0.6, 1.2),
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

    def make_train(self, transform: Augmentation) -> PairDataset:
        """Return the training split."""
        return ShapesSegmentation(self.photos.root, "train", transform)

    def make_val(self) -> PairDataset:
        """Return the evaluation split."""
        return ShapesSegmentation(self.photos.root, "val")
