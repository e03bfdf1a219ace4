"""Class lists, and spaces that bring several to one."""

import numpy as np
import pytest

from effseg.data.classes import Classes, LabelSpace, first_difference, load_classes, voc_colour
from effseg.errors import InputError

VOC = Classes.from_card("voc2012")
COCO = Classes.from_card("coco2017")


def test_palette_is_the_published_one():
    # https://host.robots.ox.ac.uk/pascal/VOC/voc2012/segexamples: aeroplane dark red, person pink
    assert len(VOC) == 21
    assert VOC.names[0] == "background" and VOC.names[15] == "person"
    assert VOC.palette[1] == (128, 0, 0) and VOC.palette[15] == (192, 128, 128)
    assert VOC.palette[20] == (0, 64, 128)
    assert voc_colour(255) == (224, 224, 192)


@pytest.mark.parametrize("card", ["voc2012", "shapes", "coco2017"])
def test_cards_use_distinct_names_and_colours(card):
    classes = Classes.from_card(card)
    assert len(set(classes.names)) == len(set(classes.palette)) == len(classes)


def test_unknown_card_lists_those_there_are():
    with pytest.raises(InputError, match="shapes, voc2012"):
        Classes.from_card("nowhere")


def test_class_files(tmp_path):
    text = tmp_path / "classes.txt"
    text.write_text("background\n\ntraffic light\n")
    assert load_classes(text).names == ("background", "traffic light")
    card = tmp_path / "classes.yaml"
    card.write_text("classes: [background, road]")
    assert load_classes(str(card)).palette == ((0, 0, 0), (128, 0, 0))
    card.write_text(
        "classes: [{name: background, colour: [9, 9, 9]}, {name: road, colour: [1, 2, 3]}]"
    )
    assert load_classes(card).palette == ((9, 9, 9), (1, 2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("classes: [background]", "1 classes, expected 2 to 255"),
        ("classes: [background, road, road]", "'road' comes twice"),
        ("classes: [background, 7]", "class 7, expected a name"),
        ("classes: [{name: a, colour: [0, 0, 0]}, b]", "1 colours for 2 classes"),
        ("classes: [{name: a, colour: [0, 0, 300]}, b]", "expected .r, g, b. from 0 to 255"),
        ("names: [a, b]", "expected the key classes"),
        ("classes: [a, b", "not valid YAML"),
    ],
)
def test_bad_class_files(tmp_path, content, message):
    path = tmp_path / "classes.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"classes\.yaml: .*{message}"):
        load_classes(path)


def test_a_model_without_names_has_numbers():
    names = Classes.from_config({}, 21).names
    assert names == ("background", *(f"class {i}" for i in range(1, 21)))
    assert Classes.from_config(VOC.to_config(), 21) == VOC


def test_missing_class_file():
    with pytest.raises(InputError, match=r"gone\.txt: no such file"):
        load_classes("gone.txt")


def test_voc_and_coco_agree_on_names():
    actual = LabelSpace.load("voc").map(COCO, COCO, "coco")
    assert actual.known.all()
    plane, couch = COCO.names.index("airplane"), COCO.names.index("couch")
    zebra = COCO.names.index("zebra")
    assert actual.boxes[plane - 1] == VOC.names.index("aeroplane") - 1
    assert actual.masks[plane] == VOC.names.index("aeroplane")
    assert actual.boxes[couch - 1] == VOC.names.index("sofa") - 1
    assert actual.boxes[zebra - 1] == -1
    assert (actual.boxes >= 0).sum() == 20
    assert actual.masks[zebra] == 0, "no VOC class for certain"
    assert actual.masks[0] == 0 and actual.masks[255] == 255 and actual.masks[200] == 255


@pytest.mark.parametrize(("background", "expected"), [("ignore", 255), ("keep", 0)])
def test_background_of_a_source_that_lacks_classes(background, expected):
    actual = LabelSpace.load("coco80").map(VOC, VOC, "voc", background)
    assert actual.known.sum() == 20
    assert actual.masks[0] == expected
    assert actual.masks[VOC.names.index("sofa")] == COCO.names.index("couch")


def test_masks_and_boxes_may_have_different_lists():
    actual = LabelSpace.load("coco80").map(VOC, COCO, "both")
    assert actual.known.all() and len(actual.boxes) == 80
    assert actual.masks[0] == 255, "its masks lack 60 classes"
    assert actual.masks[VOC.names.index("tvmonitor")] == COCO.names.index("tv")


def test_the_space_of_the_sources_changes_nothing():
    actual = LabelSpace.of(VOC).map(VOC, VOC, "voc")
    assert actual.identity
    assert np.array_equal(actual.masks[:21], np.arange(21)) and actual.masks[255] == 255
    assert actual.boxes.tolist() == list(range(20))
    assert not LabelSpace.load("voc").map(COCO, COCO, "coco").identity


def test_two_categories_of_one_name_stay_two():
    twice = Classes.from_names(["background", "cell", "cell", "dust"])
    assert LabelSpace.of(twice).map(twice, twice, "mine").boxes.tolist() == [0, 1, 2]


def test_users_space_merges_classes(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        "classes:\n- {name: vehicle, from: [car, bus], colour: [1, 2, 3]}\n- {name: dog}\n"
    )
    space = LabelSpace.load(str(path))
    assert space.classes.names == ("background", "vehicle", "dog")
    assert space.classes.palette[1] == (1, 2, 3)
    actual = space.map(VOC, VOC, "voc")
    assert actual.boxes[VOC.names.index("bus") - 1] == actual.boxes[VOC.names.index("car") - 1] == 0
    assert space.annotated(Classes.from_names(["background", "bus"])) == {"vehicle"}
    space.check_used([VOC])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "classes:\n- {name: a, from: [car]}\n- {name: b, from: [bus, car]}",
            "'car' in both a and b",
        ),
        ("classes:\n- {name: a, from: car}\n- {name: a, from: bus}", "'a' comes twice"),
        ("classes:\n- {name: a, of: car}", "expected a name or {name, from, colour}"),
        ("classes:\n- {from: car}", "'from': 'car'}, expected a name or"),
        ("classes: []", "1 classes, expected 2 to 255"),
        ("classes: [{name: a, from: 5}]", r"space\.yaml: a: from 5, expected a name or several"),
        ("classes: [{name: a, from: null}]", "a: from None, expected"),
        ("classes: [{name: a, from: []}]", r"a: from \[\], expected"),
        ("classes: [{name: a, from: [car, no]}]", r"a: from \['car', False\], expected"),
        ("names: [a]", "key classes"),
        ("classes:\n- {name: a, colour: [1, 2]}", "colour"),
    ],
)
def test_bad_spaces_are_named(tmp_path, text, words):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        LabelSpace.load(str(path))


def test_a_class_that_does_not_exist_is_named(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("classes:\n- {name: dog}\n- {name: horse, from: [horse, unicorn]}\n")
    with pytest.raises(InputError, match="'unicorn'"):
        LabelSpace.load(str(path)).check_used([VOC])
    with pytest.raises(InputError, match="nosuch"):
        LabelSpace.load("nosuch")
    with pytest.raises(InputError, match=r"missing\.yaml"):
        LabelSpace.load(str(tmp_path / "missing.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match=r"folder\.yaml: cannot be read: Is a directory"):
        LabelSpace.load(str(tmp_path / "folder.yaml"))
    unicorn = Classes.from_names(["background", "unicorn"])
    with pytest.raises(InputError, match="none of its classes"):
        LabelSpace.load("voc").map(unicorn, unicorn, "mine")


@pytest.mark.parametrize(
    ("names", "others", "text"),
    [
        (["a", "b"], ["a", "c"], "class 1 is 'b' and 'c'"),
        (["a"], ["a", "c"], "class 1 is None and 'c'"),
    ],
)
def test_where_two_lists_differ(names, others, text):
    assert first_difference(names, others) == text
