import pytest
import torch

from effseg.data.classes import Classes, voc_colour
from effseg.data.sample import Sample, collate_list, collate_stack
from effseg.errors import InputError


def sample(name, height=4, width=5, boxes=2):
    return Sample(
        id=name,
        image=torch.full((3, height, width), 7, dtype=torch.uint8),
        mask=torch.zeros(height, width, dtype=torch.uint8),
        boxes=torch.zeros(boxes, 4),
        labels=torch.zeros(boxes, dtype=torch.int64),
        difficult=torch.zeros(boxes, dtype=torch.bool),
    )


def test_crops_are_stacked_and_boxes_stay_lists():
    batch = collate_stack([sample("a", boxes=2), sample("b", boxes=0)])
    assert batch["id"] == ["a", "b"]
    assert batch["image"].shape == (2, 3, 4, 5)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["mask"].dtype == torch.uint8
    assert [len(boxes) for boxes in batch["boxes"]] == [2, 0]
    assert [len(flags) for flags in batch["difficult"]] == [2, 0]


def test_photos_of_different_sizes_keep_them():
    batch = collate_list([sample("a", 4, 5), sample("b", 6, 3)])
    assert [tuple(image.shape) for image in batch["image"]] == [(3, 4, 5), (3, 6, 3)]


def test_a_photo_without_mask_gives_a_batch_without():
    bare = Sample(id="b", image=torch.zeros(3, 4, 5, dtype=torch.uint8))
    assert "mask" not in collate_list([sample("a"), bare])


def test_palette_is_the_published_one():
    # https://host.robots.ox.ac.uk/pascal/VOC/voc2012/segexamples: aeroplane dark red, person pink
    classes = Classes.from_card("voc2012")
    assert len(classes) == 21
    assert classes.names[0] == "background" and classes.names[15] == "person"
    assert classes.palette[1] == (128, 0, 0) and classes.palette[15] == (192, 128, 128)
    assert classes.palette[20] == (0, 64, 128)
    assert voc_colour(255) == (224, 224, 192)


def test_cards_use_distinct_names_and_colours():
    for card in ("voc2012", "shapes"):
        classes = Classes.from_card(card)
        assert len(set(classes.names)) == len(set(classes.palette)) == len(classes)


def test_unknown_card_lists_those_there_are():
    with pytest.raises(InputError, match="shapes, voc2012"):
        Classes.from_card("nowhere")
