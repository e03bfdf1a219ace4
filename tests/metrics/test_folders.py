import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effseg.data.classes import load_classes
from effseg.data.files import read_indices
from effseg.errors import InputError
from effseg.metrics import BoundaryIoU, SegmentationMetrics, score_folders


def save(path, mask, palette=True, **options):
    image = Image.fromarray(mask)
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(path, **options)


@pytest.fixture
def folders(tmp_path):
    """Seven masks of different sizes: true masks with a palette, predictions grey."""
    random = np.random.default_rng(0)
    pred_dir, gt_dir = tmp_path / "pred", tmp_path / "gt"
    pred_dir.mkdir()
    gt_dir.mkdir()
    pairs = {}
    for index in range(7):
        size = (20 + index, 33 - index)
        target = random.integers(0, 5, size).astype(np.uint8)
        preds = np.where(random.random(size) < 0.7, target, 1).astype(np.uint8)
        target[random.random(size) < 0.1] = 255
        save(gt_dir / f"2007_{index}.png", target)
        save(pred_dir / f"2007_{index}.png", preds, palette=False)
        pairs[f"2007_{index}"] = (torch.from_numpy(preds), torch.from_numpy(target))
    return pred_dir, gt_dir, pairs


def expect(metric, pairs, names=None):
    for name in names or pairs:
        metric.update(*pairs[name])
    return metric.compute()


@pytest.mark.parametrize("workers", [1, 3, None])
def test_equals_the_metric(folders, workers):
    pred_dir, gt_dir, pairs = folders
    result = score_folders(str(pred_dir), gt_dir, num_classes=6, workers=workers)
    expected = expect(SegmentationMetrics(6), pairs)
    assert result.keys() == {*expected, "images"}
    assert result["images"] == 7
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, rtol=0, atol=0, equal_nan=True)


def test_boundary_and_bar(folders, capsys):
    pred_dir, gt_dir, pairs = folders
    result = score_folders(pred_dir, gt_dir, num_classes=6, boundary=True, progress=True)
    assert "scoring" in capsys.readouterr().out
    expected = expect(BoundaryIoU(6), pairs)["boundary_iou"]
    assert float(result["boundary_iou"]) == float(expected)
    score_folders(pred_dir, gt_dir, num_classes=6)
    assert capsys.readouterr().out == ""


def test_split_and_extra_predictions(folders, tmp_path):
    pred_dir, gt_dir, pairs = folders
    names = ["2007_5", "2007_2"]
    split = tmp_path / "val.txt"
    split.write_text("2007_5\n\n 2007_2  1\r\n")
    (pred_dir / "2007_0.png").unlink()
    (pred_dir / "notes.txt").write_text("kept")
    save(pred_dir / "other.png", np.full((3, 3), 9, np.uint8))
    result = score_folders(pred_dir, gt_dir, num_classes=6, split=split)
    assert result["images"] == 2
    expected = expect(SegmentationMetrics(6), pairs, names)["confusion"]
    assert torch.equal(result["confusion"], expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("palette", [True, False])
def test_indices_survive_every_bit_depth(tmp_path, bits, palette):
    mask = (np.arange(48).reshape(6, 8) % 2**bits).astype(np.uint8)
    path = tmp_path / "mask.png"
    if palette:
        save(path, mask, bits=bits)
    else:
        path.write_bytes(grey_png(mask, bits))
    np.testing.assert_array_equal(read_indices(path), mask)


def grey_png(mask, bits):
    """A grey PNG of less than 8 bits, which Pillow reads but does not write."""
    import struct
    import zlib

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    rows = b""
    for row in mask:
        digits = "".join(f"{value:0{bits}b}" for value in row.tolist())
        rows += b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")
    header = struct.pack(">IIBBBBB", mask.shape[1], mask.shape[0], bits, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def test_sixteen_bit_indices(tmp_path):
    mask = np.array([[0, 300, 65535]], np.uint16)
    for folder in ("pred", "gt"):
        (tmp_path / folder).mkdir()
        Image.fromarray(mask).save(tmp_path / folder / "a.png")
    result = score_folders(tmp_path / "pred", tmp_path / "gt", 301, ignore_index=65535)
    assert int(result["confusion"].sum()) == 2
    assert int(result["confusion"][300, 300]) == 1


def broken(folders, what):
    """Break one file; return what the message has to hold."""
    pred_dir, gt_dir, _ = folders
    pred, truth = pred_dir / "2007_3.png", gt_dir / "2007_3.png"
    shape = np.asarray(Image.open(truth)).shape
    match what:
        case "missing prediction":
            pred.unlink()
            (pred_dir / "2007_4.png").unlink()
            return pred, r"prediction is missing \(and 1 more of 7\)"
        case "wrong size":
            save(pred, np.zeros((5, 9), np.uint8))
            return pred, f"is 9 x 5: expected {shape[1]} x {shape[0]} as .*gt.2007_3.png"
        case "unknown truth":
            save(truth, np.full(shape, 200, np.uint8))
            return truth, r"target contains the value 200: expected 0 to 5 or 255 \(ignored\)"
        case "unknown prediction":
            save(pred, np.full(shape, 6, np.uint8))
            return pred, "prediction contains the value 6: expected 0 to 5$"
        case "truncated":
            pred.write_bytes(pred.read_bytes()[:-200])
            return pred, "truncated or corrupt"
        case "corrupt":
            data = bytearray(truth.read_bytes())
            data[len(data) // 2] ^= 255
            truth.write_bytes(data)
            return truth, "truncated or corrupt"
        case "empty file":
            truth.write_bytes(b"")
            return truth, "truncated or corrupt"
        case "colour":
            save(pred, np.zeros((*shape, 3), np.uint8), palette=False)
            return pred, "mask of mode RGB, expected a palette or grey PNG of class indices"
    raise AssertionError(what)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "what",
    [
        "missing prediction",
        "wrong size",
        "unknown truth",
        "unknown prediction",
        "truncated",
        "corrupt",
        "empty file",
        "colour",
    ],
)
def test_bad_files_are_named(folders, what, workers):
    path, message = broken(folders, what)
    with pytest.raises(InputError, match=message) as caught:
        score_folders(*folders[:2], num_classes=6, workers=workers)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_bad_folders_splits_and_numbers(folders, tmp_path):
    pred_dir, gt_dir, _ = folders
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"empty: contains no \.png file"):
        score_folders(pred_dir, empty)
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        score_folders(tmp_path / "nowhere", gt_dir)
    with pytest.raises(InputError, match=r"val\.txt: no such file"):
        score_folders(pred_dir, gt_dir, split=tmp_path / "val.txt")
    split = tmp_path / "val.txt"
    for content, message in [
        (b"\n \n", "the list is empty"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"2007_1\n2007_1\n", "contains 2007_1 twice"),
    ]:
        split.write_bytes(content)
        with pytest.raises(InputError, match=rf"val\.txt: {message}"):
            score_folders(pred_dir, gt_dir, split=split)
    split.write_text("2007_1\n2009_1\n")
    with pytest.raises(InputError, match=r"gt.2009_1\.png: true mask is missing"):
        score_folders(pred_dir, gt_dir, split=split)
    with pytest.raises(InputError, match="num_classes is 0"):
        score_folders(pred_dir, gt_dir, num_classes=0)
    with pytest.raises(InputError, match="workers is 0"):
        score_folders(pred_dir, gt_dir, workers=0)
    with pytest.raises(InputError, match=r"x\.png: mask is missing"):
        read_indices(tmp_path / "x.png")


def test_upper_case_suffixes_and_hidden_files(folders):
    pred_dir, gt_dir, pairs = folders
    (gt_dir / "2007_3.png").rename(gt_dir / "2007_3.PNG")
    (pred_dir / "2007_4.png").rename(pred_dir / "2007_4.PNG")
    (gt_dir / "._2007_0.png").write_bytes(b"left by macOS")
    result = score_folders(pred_dir, gt_dir, num_classes=6)
    assert result["images"] == 7
    assert torch.equal(result["confusion"], expect(SegmentationMetrics(6), pairs)["confusion"])
    save(gt_dir / "2007_1.PNG", np.zeros((3, 3), np.uint8))
    if len(list(gt_dir.glob("2007_1.*"))) == 2:  # not where names are compared without case
        with pytest.raises(InputError, match=r"gt: contains both 2007_1\.(png|PNG) and 2007_1\."):
            score_folders(pred_dir, gt_dir, num_classes=6)


def test_truth_without_a_counted_pixel_is_an_error(tmp_path):
    for folder, value in (("pred", 1), ("gt", 255)):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "a.png", np.full((4, 5), value, np.uint8))
    with pytest.raises(InputError, match=r"gt: no pixel to count, every one is 255 \(ignored\)"):
        score_folders(tmp_path / "pred", tmp_path / "gt", num_classes=2)


def test_boundary_leaves_an_ignored_class_out(folders):
    pred_dir, gt_dir, pairs = folders
    for name, (_, target) in pairs.items():
        target[target == 255] = 0
        save(gt_dir / f"{name}.png", target.numpy())
    result = score_folders(pred_dir, gt_dir, num_classes=6, ignore_index=0, boundary=True)
    expected = expect(BoundaryIoU(6, 0), pairs)["boundary_iou"]
    assert float(result["boundary_iou"]) == float(expected)


@pytest.mark.skipif("EFFSEG_DATA" not in os.environ, reason="EFFSEG_DATA is not set")
def test_real_masks_against_themselves(tmp_path):
    root = Path(os.environ["EFFSEG_DATA"]) / "VOCdevkit/VOC2012"
    names = (root / "ImageSets/Segmentation/val.txt").read_text().split()[:40]
    split = tmp_path / "val.txt"
    split.write_text("\n".join(names))
    folder = root / "SegmentationClass"
    result = score_folders(folder, folder, split=split, boundary=True)
    assert float(result["miou"]) == float(result["boundary_iou"]) == 1.0
    assert result["images"] == 40


def pair(root, name, prediction, truth):
    for folder, values in (("pred", prediction), ("gt", truth)):
        path = root / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(values, np.uint8)).save(path)


def test_masks_of_0_and_255_are_two_classes_over_all_files(tmp_path, capsys):
    pair(tmp_path, "a", [[0, 255, 255, 0]], [[0, 255, 0, 0]])
    pair(tmp_path, "b", [[0, 0]], [[0, 0]])
    result = score_folders(tmp_path / "pred", tmp_path / "gt", num_classes=2)
    assert result["confusion"].tolist() == [[4, 1], [0, 1]]
    assert capsys.readouterr().err.count("so 255 is class 1") == 2
    pair(tmp_path, "a", [[0, 1, 1, 0]], [[0, 255, 0, 0]])
    result = score_folders(tmp_path / "pred", tmp_path / "gt", num_classes=2)
    assert result["confusion"].tolist() == [[4, 1], [0, 1]], "predictions of 0 and 1"
    pair(tmp_path, "b", [[0, 0]], [[0, 1]])
    result = score_folders(tmp_path / "pred", tmp_path / "gt", num_classes=2)
    assert result["confusion"].tolist() == [[3, 1], [1, 0]], "a true 1: 255 is ignored"
    with pytest.raises(InputError, match=r"gt/b\.png: mask value 1, expected 0 and 255"):
        score_folders(tmp_path / "pred", tmp_path / "gt", num_classes=2, binary=True)


def test_sub_folders_other_suffixes_and_what_is_not_scored(tmp_path, capsys):
    pair(tmp_path, "site/x", [[0, 1]], [[0, 1]])
    pair(tmp_path, "x", [[1, 1]], [[0, 1]])
    (tmp_path / "gt/x.png").rename(tmp_path / "gt/x.PNG")
    for name in ("Thumbs.db", "._y.png"):
        (tmp_path / "gt" / name).write_bytes(b"junk")
    pair(tmp_path, "lonely", [[0, 0]], [[0, 0]])
    (tmp_path / "gt/lonely.png").rename(tmp_path / "gt/lonely.jpg")
    result = score_folders(tmp_path / "pred", tmp_path / "gt", num_classes=3)
    assert result["images"] == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "lonely.jpg: no mask, not scored (1 files beside 2 true masks)" in said[0]
    assert "lonely.png: no true mask in" in said[1] and "(1 of 3 predictions)" in said[1]


def test_a_score_over_fewer_classes_says_so(tmp_path, effseg):
    pair(tmp_path, "a", [[0, 1]], [[0, 1]])
    flags = ["score", "--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--num-classes"]
    assert "mIoU 1.0000 (over 2 of 4 classes)" in effseg(*flags, 4)[1]
    assert " of 2 classes" not in effseg(*flags, 2)[1]
    assert '"classes": 2' in effseg(*flags, 4, "--json")[1]
    pair(tmp_path, "a", [[1, 0]], [[255, 0]])
    assert "mIoU 1.0000  pixel" in effseg(*flags, 2)[1]
    pair(tmp_path, "a", [[0, 0]], [[255, 0]])
    assert "mIoU 1.0000 (over 1 of 2 classes)" in effseg(*flags, 2, "--binary", "no")[1]


def test_classes_with_colours_read_masks_as_training_does(tmp_path, effseg):
    """CVAT numbers a palette by its own order; by number a third of the pixels would agree."""
    truth = np.array([[0, 1, 2, 255]], np.uint8)
    colours = np.array([(0, 0, 0), (250, 50, 83), (51, 221, 255)], np.uint8)
    rgb = np.array([*colours, (224, 224, 192)], np.uint8)[[[0, 1, 2, 3]]]
    swapped = Image.fromarray(np.array([[0, 2, 1, 255]], np.uint8))
    swapped.putpalette(colours[[0, 2, 1]].tobytes() + bytes(759))
    for name, mask in (("palette", swapped), ("rgb", Image.fromarray(rgb))):
        pair(tmp_path, name, np.where(truth == 255, 0, truth), truth)
        mask.save(tmp_path / f"gt/{name}.png")
    labelmap = tmp_path / "labelmap.txt"
    labelmap.write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:250,50,83::\ncar:51,221,255::\n"
    )
    flags = ["score", "--pred", tmp_path / "pred", "--gt", tmp_path / "gt"]
    code, out, err = effseg(*flags, "--classes", labelmap)
    assert code == 0 and "mIoU 1.0000" in out, err
    code, _, err = effseg(*flags, "--num-classes", 3)
    assert code == 2 and "rgb.png: mask of mode RGB, expected a palette or grey PNG" in err
    with pytest.raises(InputError, match="num_classes is 21: expected 3, as the classes"):
        score_folders(tmp_path / "pred", tmp_path / "gt", classes=load_classes(labelmap))


def test_white_of_any_mode_is_one_class(tmp_path):
    pair(tmp_path, "a", [[0, 1]], [[0, 255]])
    pair(tmp_path, "b", [[0, 1]], [[0, 1]])
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "gt/b.png")
    result = score_folders(tmp_path / "pred", tmp_path / "gt", num_classes=2)
    assert result["confusion"].tolist() == [[2, 0], [0, 2]]


def test_names_of_macos_match_those_of_other_systems(tmp_path):
    pair(tmp_path, "Bäume", [[0, 1]], [[0, 1]])
    (tmp_path / "gt/Bäume.png").rename(tmp_path / "gt" / "Ba\u0308ume.png")
    (tmp_path / "val.txt").write_text("Ba\u0308ume", encoding="utf-8")
    result = score_folders(tmp_path / "pred", tmp_path / "gt", 2, split=tmp_path / "val.txt")
    assert result["images"] == 1
