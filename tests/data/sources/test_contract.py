"""What every source keeps to."""

import json

import numpy as np
import pytest
import torch

from effseg.data import COCO, VOC, Folder, Shapes
from effseg.data.sample import TASKS
from effseg.errors import InputError


class SourceContract:
    """Inherited by the tests of each format, which make one source of at least two images."""

    def make(self, root, files):
        raise NotImplementedError

    @pytest.fixture
    def source(self, tmp_path, files):
        source = self.make(tmp_path, files)
        source.prepare()
        source.verify()
        return source

    def test_a_constructor_needs_no_argument_and_touches_no_file(self, source, tmp_path):
        bare = type(source)()
        bare.complete(str(tmp_path / "nowhere"), ["background", "road"])
        assert bare.root == str(tmp_path / "nowhere")
        with pytest.raises(InputError, match="nowhere"):
            _ = bare.ids

    def test_a_given_root_is_kept(self, source, tmp_path):
        before = source.root
        source.complete("elsewhere", None)
        assert source.root == before

    def test_ids_are_distinct_and_has_tells_the_labels(self, source):
        assert len(source) == len(source.ids) == len(set(source.ids)) >= 2
        assert all(isinstance(name, str) for name in source.ids)
        for task, key in zip(TASKS, ("mask", "boxes"), strict=True):
            has = source.has(task)
            assert has.shape == (len(source),) and has.dtype == np.bool_
            assert has.any() == (task in source.tasks)
            assert has.tolist() == [key in source.labels(i) for i in range(len(source))]

    def test_images_and_labels_have_their_shapes_and_ranges(self, source):
        for index in range(len(source)):
            image, labels = source.image(index), source.labels(index)
            height, width = source.size(index)
            assert image.shape == (3, height, width) and image.dtype == torch.uint8
            assert image.permute(1, 2, 0).is_contiguous()
            assert source.labels(index, (height, width)).keys() == labels.keys()
            if "mask" in labels:
                mask = labels["mask"]
                assert mask.shape == (height, width) and mask.dtype == torch.uint8
                assert set(mask.unique().tolist()) <= {*range(len(source.mask_classes)), 255}
            if "boxes" not in labels:
                assert labels.keys() <= {"mask"}
                continue
            boxes, count = labels["boxes"], len(labels["boxes"])
            assert boxes.shape == (count, 4) and boxes.dtype == torch.float32
            assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
            assert (boxes <= torch.tensor([width, height, width, height])).all()
            assert labels["labels"].shape == (count,) and labels["labels"].dtype == torch.int64
            assert ((labels["labels"] >= 0) & (labels["labels"] < len(source.classes) - 1)).all()
            for key in labels.keys() & {"crowd", "difficult"}:
                assert labels[key].shape == (count,) and labels[key].dtype == torch.bool

    def test_a_broken_image_is_named(self, source, files):
        path = source.image_path(1)
        files.truncate(path)
        with pytest.raises(InputError, match=rf"{path.name}: image is truncated or corrupt"):
            source.image(1)

    def test_a_missing_image_shows_before_training(self, source):
        source.image_path(1).unlink()
        again = type(source)(**self.arguments(source))
        with pytest.raises(InputError, match=source.image_path(1).stem):
            again.verify()

    def arguments(self, source):
        return {"root": source.root}


class TestVOC(SourceContract):
    @pytest.fixture
    def source(self, voc):
        # Masks on all, boxes on some; an image without objects among them.
        voc.annotation("b0").write_text("<annotation></annotation>")
        return VOC(voc.root, masks="train_aug", boxes="val")

    def arguments(self, source):
        return {"root": source.root, "boxes": "val"}


class TestCOCO(SourceContract):
    def make(self, root, files):
        (root / "annotations").mkdir()
        for name in ("a", "b", "c"):
            files.image(root / f"train2017/{name}.jpg", (40, 60))
        images = [
            {"id": 5 * i, "file_name": f"{name}.jpg", "height": 40, "width": 60}
            for i, name in enumerate("abc")
        ]
        runs = {"size": [40, 60], "counts": [3, 20, 40 * 60 - 23]}
        annotations = [
            {"image_id": 0, "category_id": 1, "bbox": [5, 5, 80, 10], "iscrowd": 0, "id": 1}
            | {"segmentation": [[5, 5, 60, 5, 60, 15, 5, 15]]},
            {"image_id": 0, "category_id": 1, "bbox": [5, 5, 0, 10], "iscrowd": 0, "id": 2}
            | {"segmentation": [[5, 5, 5, 5, 5, 15, 5, 15]]},
            {"image_id": 10, "category_id": 3, "bbox": [0, 3, 1, 20], "iscrowd": 1, "id": 3}
            | {"segmentation": runs},
        ]
        categories = [{"id": 1, "name": "scratch"}, {"id": 3, "name": "dent"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations/instances_train2017.json").write_text(json.dumps(content))
        return COCO(root)


class TestFolder(SourceContract):
    def make(self, root, files):
        for i, name in enumerate(("x", "y")):
            files.image(root / f"images/train/{name}.png", (20 + i, 30))
            files.mask(root / f"masks/train/{name}.png", np.full((20 + i, 30), 255 * i))
        return Folder(root, ["background", "road"])

    def arguments(self, source):
        return {"root": source.root, "classes": ["background", "road"]}


class TestShapes(SourceContract):
    def make(self, root, files):
        drawing = {"train": 4, "val": 1, "size": (64, 80)}
        return Shapes(root / "s", masks=(0.0, 0.75), boxes=(0.5, 1.0), **drawing)
