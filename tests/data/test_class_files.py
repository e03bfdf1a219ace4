"""Class lists as annotation tools write them."""

import codecs

import pytest

from effseg.data.classes import LabelSpace, load_classes, voc_colour
from effseg.errors import InputError

NAMES = ("background", "road", "car")
COLOURS = ((0, 0, 0), (250, 50, 83), (51, 221, 255))

CVAT = (
    "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:250,50,83::\ncar:51,221,255:wheel:\n"
)
ROBOFLOW = "Pixel Value, Class\n0, background\n2, car\n1, road\n"
LABELME = "__ignore__\n_background_\nroad\ncar\n"


def write(tmp_path, name, text, encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    ("name", "text", "coloured"),
    [
        ("labelmap.txt", CVAT, True),
        ("labels.txt", LABELME, False),
        ("_classes.csv", ROBOFLOW, False),
        ("classes.txt", "# mine\nbackground\n\n# two more\n road \ncar\n", False),
        ("classes.json", '[\n  "background",\n  "road",\n  "car"\n]\n', False),
        ("classes.txt", '["background",\n "road",\n "car"]', False),
        ("classes.yaml", "classes:\n- background\n- road\n- car\n", False),
        (
            "labels.json",
            '[{"name": "background", "color": "#000000", "id": 1, "attributes": []},\n'
            '{"name": "road", "color": "#fa3253"}, {"name": "car", "color": "#33ddff"}]',
            True,
        ),
        (
            "classes.yaml",
            "classes:\n- {name: background, color: [0, 0, 0]}\n"
            "- {name: road, colour: [250, 50, 83]}\n- {name: car, color: [51, 221, 255]}\n",
            True,
        ),
    ],
)
def test_formats(tmp_path, name, text, coloured, encoding, ends):
    classes = load_classes(write(tmp_path, name, text.replace("\n", ends), encoding))
    assert classes.names == NAMES and classes.coloured == coloured
    assert classes.palette == (COLOURS if coloured else tuple(map(voc_colour, range(3))))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "0 background\n1 road\n", "line '0 background' is not understood"),
        ("a.txt", "background: 0\nroad: 1\n", "line 'background: 0' is not understood"),
        ("a.txt", "64 128 64\tAnimal\n0 0 0\tVoid\n", "not understood"),
        ("a.txt", "background,0,0,0\nroad,1,2,3\n", "not understood"),
        ("a.txt", "background 0 0 0\nroad 1 2 3\n", "not understood"),
        ("a.txt", "- background\n- road\n", "not understood"),
        ("a.txt", "background\nroad # grey\n", "not understood"),
        ("a.txt", "background,\nroad,\n", "not understood"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nroad,1,2,3\n", "expected label:r,g,b"),
        ("labelmap.txt", CVAT.replace("250", "256"), "expected .r, g, b. from 0 to 255"),
        ("labelmap.txt", CVAT.replace("250,50,83", ""), "2 colours for 3 classes"),
        (
            "labelmap.txt",
            CVAT.replace("51,221,255", "0,0,0"),
            r"the colour \(0, 0, 0\) comes twice",
        ),
        ("labelmap.txt", "road:1,2,3::\nbackground:0,0,0::\n", "class 0 is 'road'"),
        ("labels.txt", "__ignore__\nroad\ncar\n", "class 0 is 'road', expected the background"),
        ("a.csv", "name,r,g,b\nroad,1,2,3\n", "columns 'Pixel Value, Class'"),
        ("_classes.csv", ROBOFLOW.replace("2,", "3,"), "pixel values 0, 3, 1, expected each"),
        ("a.json", '{"0": "background", "1": "road"}', "key classes"),
        ("a.json", '["background", "road"', "not valid JSON"),
        ("a.yaml", "classes: [{name: a, color: [0, 0, 0], id: 3}, b]", "expected a name or"),
        ("a.yaml", "classes: [background, {name: no}]", "False}, expected a name .* in quotes"),
        ("a.yaml", "classes: [background, 2026-02-30]", "not valid YAML: day is out of range"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(InputError, match=message) as caught:
        load_classes(path)
    assert str(caught.value).count(str(path)) == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["classes.txt", "classes.yaml"])
def test_other_encodings_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(codecs.BOM_UTF16_LE + "background\nroad\n".encode("utf-16-le"))
    with pytest.raises(InputError, match="in UTF-8"):
        load_classes(path)


def test_a_space_takes_color_too_and_refuses_two_classes_of_one(tmp_path):
    path = write(tmp_path, "space.yaml", "classes: [{name: a, color: [1, 2, 3]}, {name: b}]")
    assert LabelSpace.load(str(path)).classes.palette[1] == (1, 2, 3)
    path = write(tmp_path, "space.yaml", "classes: [{name: a, colour: [0, 0, 0]}]")
    with pytest.raises(InputError, match=r"the colour \(0, 0, 0\) comes twice"):
        LabelSpace.load(str(path))
