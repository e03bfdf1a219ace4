import pytest
import torch

from effseg.data.sample import Sample, collate_eval, collate_train


def sample(name, height=4, width=5, boxes=2, crowds=0, real=("segmentation", "detection"), **more):
    count = boxes + crowds
    actual = Sample(
        id=name,
        image=torch.full((3, height, width), 7, dtype=torch.uint8),
        mask=torch.zeros(height, width, dtype=torch.uint8),
        boxes=torch.arange(count * 4).reshape(count, 4) + 1.0,
        labels=torch.arange(count),
        crowd=torch.arange(count) >= boxes,
        known=torch.ones(3, dtype=torch.bool),
        number=1,
        real=real,
        tasks=("detection",),
        freeze=2,
    )
    actual.update(more)
    return actual


def test_crops_are_stacked_boxes_padded_and_crowds_apart():
    batch = collate_train(
        [sample("a", boxes=2, crowds=1), sample("b", boxes=0), sample("c", boxes=3)]
    )
    assert batch["id"] == ["a", "b", "c"]
    assert batch["image"].shape == (3, 3, 4, 5)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["mask"].dtype == torch.uint8
    assert batch["boxes"].shape == (3, 3, 4) and batch["boxes"].dtype == torch.float32
    assert batch["boxes"][0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[0, 1, -1], [-1, -1, -1], [0, 1, 2]]
    assert batch["ignored"].tolist() == [[[9, 10, 11, 12]], [[0] * 4], [[0] * 4]]
    assert batch["known"].shape == (3, 3) and batch["source"].tolist() == [1, 1, 1]
    assert batch["tasks"] == ("detection",) and batch["freeze"] == 2


def test_no_crowd_in_a_batch_gives_no_ignored_region():
    batch = collate_train([sample("a"), sample("b", boxes=0)])
    assert batch["ignored"].shape == (2, 0, 4)


def test_rows_are_the_images_with_real_labels():
    batch = collate_train(
        [sample("a", real=("segmentation",)), sample("b"), sample("c", real=("detection",))]
    )
    assert batch["rows"]["segmentation"].tolist() == [0, 1]
    assert batch["rows"]["detection"].tolist() == [1, 2]
    none = collate_train([sample("a", real=())])["rows"]["detection"]
    assert none.shape == (0,) and none.dtype == torch.int64


def test_images_of_different_sizes_keep_them():
    samples = [sample("a", 4, 5, source="voc"), sample("b", 6, 3, boxes=1, source="coco")]
    batch = collate_eval(samples)
    assert [tuple(image.shape) for image in batch["image"]] == [(3, 4, 5), (3, 6, 3)]
    assert [len(boxes) for boxes in batch["boxes"]] == [2, 1]
    assert batch["source"] == ["voc", "coco"]
    assert batch["rows"]["detection"].tolist() == [0, 1]


@pytest.mark.parametrize("collate", [collate_train, collate_eval])
def test_a_key_that_some_samples_lack_is_an_error(collate):
    bare = sample("b")
    del bare["known"]
    with pytest.raises(ValueError, match="samples a and b differ in: known"):
        collate([sample("a"), bare])


def test_samples_of_two_steps_are_an_error():
    with pytest.raises(ValueError, match="different steps"):
        collate_train([sample("a"), sample("b", freeze=False)])
