import numpy as np
import pytest
import torch
from PIL import Image

from effseg.errors import InputError
from effseg.inference.files import name_inputs, read_input, read_inputs


def rgb(height=6, width=10, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def find(inputs):
    return list(name_inputs(inputs))


def test_a_folder_without_what_is_hidden_deeper_or_of_another_kind(tmp_path):
    for name in ("b.jpg", "a.PNG", "c.gif", "d.mp4", ".hidden.jpg", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "e.png").write_bytes(b"x")
    names = [path.name for path in find([tmp_path])]
    assert names == ["a.PNG", "b.jpg", "c.gif", "d.mp4"]
    deep = [path.name for path in find([f"{tmp_path}/**/*"])]
    assert sorted(deep) == ["a.PNG", "b.jpg", "c.gif", "d.mp4", "e.png"]


def test_results_are_named_by_sub_folders_and_a_note_counts_those_left_out(tmp_path, capsys):
    for name in ("a.jpg", "x/a.b.jpg", "x/y/a.jpg", "out/overlays/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert name_inputs([tmp_path], tmp_path / "out") == {tmp_path / "a.jpg": "a"}
    said = capsys.readouterr().err
    assert f'{tmp_path}: images in sub-folders are left out, "{tmp_path}/**/*" has them' in said
    names = name_inputs([f"{tmp_path}/**/*.jpg"], tmp_path / "out")
    assert {str(p.relative_to(tmp_path)): name for p, name in names.items()} == {
        "a.jpg": "a", "x/a.b.jpg": "x/a.b", "x/y/a.jpg": "x/y/a",
    }  # fmt: skip
    assert [*name_inputs([f"{tmp_path}/*/y/*"]).values()] == ["x/y/a"]
    asked_for = name_inputs([f"{tmp_path}/out/overlays/*"], tmp_path / "out/overlays")
    assert [*asked_for.values()] == ["a"]
    assert not capsys.readouterr().err
    (tmp_path / "x/loop").symlink_to(".")
    (tmp_path / "x/a.b.jpg").unlink()
    (tmp_path / "x/c.png").write_bytes(b"x")
    assert [*name_inputs([tmp_path / "x"], tmp_path / "out")] == [tmp_path / "x/c.png"]


def test_what_systems_leave_behind_is_no_input(tmp_path):
    places = ("a.jpg", "part/b.jpg", "@eaDir/b.jpg", "__MACOSX/b.jpg", ".cache/b.jpg", "._a.jpg")
    root = tmp_path / ".data"
    for name in places:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)
    assert find([root]) == [root / "a.jpg"]
    assert find([f"{root}/**/*.jpg"]) == [root / "a.jpg", root / "part/b.jpg"]
    assert find([f"{root}/@eaDir/*.jpg"]) == [root / "@eaDir/b.jpg"], "was asked for"
    assert find([root / "._a.jpg"]) == [root / "._a.jpg"]


def test_each_file_once_and_in_order(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "b.jpg")
    assert [p.name for p in find([tmp_path / "b.jpg", tmp_path])] == ["b.jpg", "a.jpg"]


def test_a_name_that_no_system_takes():
    with pytest.raises(InputError, match="nnn: cannot be read: File name too long"):
        find(["n" * 300])


@pytest.mark.parametrize("entry", ["nowhere", "no*.jpg", "empty"])
def test_nothing_there(tmp_path, entry):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"{entry[:2]}.*: no "):
        find([tmp_path / entry])
    with pytest.raises(InputError, match="no inputs"):
        find([])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_all_kinds_of_colours_become_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.fromarray(rgb()).convert(mode).save(path)
    image = read_input(path).image
    assert image.shape == (3, 6, 10) and image.dtype == torch.uint8
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb()).save(tmp_path / "x.png", exif=exif)
    image = read_input(tmp_path / "x.png").image
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.rot90(rgb(), -1))


def damaged(tmp_path):
    Image.fromarray(rgb(64, 64)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:700])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / ".DS_Store").write_bytes(b"Bud1")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    pages = [Image.fromarray(rgb(seed=i)) for i in range(3)]
    for name in ("moving.gif", "moving.webp", "moving.png", "pages.tif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("cut.jpg", "truncated"),
        ("empty.jpg", "truncated or corrupt"),
        (".DS_Store", "not an image"),
        ("deep.png", "8 bits"),
        ("moving.gif", "3 images"),
        ("moving.webp", "3 images"),
        ("moving.png", "3 images"),
        ("pages.tif", "3 images"),
        ("missing.png", "missing"),
    ],
)
def test_what_cannot_be_predicted_is_refused_by_name(tmp_path, name, word):
    damaged(tmp_path)
    with pytest.raises(InputError, match=word) as caught:
        read_input(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_arrays_tensors_and_pil_images_are_the_same(tmp_path):
    array = rgb()
    Image.fromarray(array).save(tmp_path / "x.png")
    alpha = np.dstack([array, array[..., :1]])
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    sources = [array, alpha, tensor, Image.fromarray(array), tmp_path / "x.png"]
    for entry in read_inputs([*sources, tensor[None], array[None], str(tmp_path)]):
        assert torch.equal(entry.image, tensor)
    grey = next(read_inputs(array[..., 0])).image
    assert torch.equal(grey, torch.from_numpy(array[..., 0]).expand(3, -1, -1))


@pytest.mark.filterwarnings("error")
def test_an_array_may_be_read_only_and_is_copied():
    pixels = rgb()
    pixels.flags.writeable = False
    next(read_inputs(pixels))
    tensor = torch.from_numpy(rgb()).permute(2, 0, 1)
    for source in (rgb(), tensor):
        image = next(read_inputs(source)).image
        source[:] = 0  # a camera's next image
        assert torch.equal(image, torch.from_numpy(rgb()).permute(2, 0, 1))


@pytest.mark.parametrize(
    "source",
    [rgb().astype(np.float32), rgb()[..., :2], np.zeros((0, 4, 3), np.uint8), 7,
     Image.new("F", (3, 3))],
)  # fmt: skip
def test_what_is_no_image_is_named(source):
    with pytest.raises(InputError, match="expected"):
        list(read_inputs(source))
