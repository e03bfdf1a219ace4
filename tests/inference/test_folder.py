"""`effseg predict` on folders: what is written, what goes on, what is named at the end."""

import json
import os
import resource

import numpy as np
import pytest
from PIL import Image

from effseg import Predictor
from effseg.data import COCO as Source
from effseg.data.files import read_image

from .test_video import read, write_video


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("b.jpg", (40, 30)), ("a.png", (50, 20)), ("c.bmp", (90, 70))):
        pixels = rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(source / name)
    return source


@pytest.fixture
def predict(effseg, saved, tmp_path):
    def run(*arguments, model="both", output=tmp_path / "out"):
        flags = ("--model", saved.get(model, model), "--output", output, "--score", "0.1")
        return effseg("predict", *(flags if model != "masks" else flags[:4]), *arguments)

    return run


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def lines(output):
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


LISTS = ["predictions.jsonl", "settings.json"]


def test_masks_pictures_and_boxes(predict, folder, saved, tmp_path):
    code, out, err = predict(folder)
    assert code == 0, err
    assert "3 images" in out and "size96" in out
    output = tmp_path / "out"
    pictures = [f"overlays/{stem}.jpg" for stem in "abc"]
    assert names(output) == sorted(["a.png", "b.png", "c.png", *pictures, *LISTS])
    predictor = Predictor(saved["both"], score=0.1)
    for entry, name in zip(lines(output), ("a.png", "b.jpg", "c.bmp"), strict=True):
        result = predictor(folder / name)
        assert entry["file"] == str(folder / name)
        height, width = read_image(folder / name).shape[1:]
        assert (entry["height"], entry["width"]) == (height, width)
        with Image.open(output / f"{name[0]}.png") as mask:
            assert mask.mode == "P" and mask.size == (width, height)
            assert (np.asarray(mask) == result.mask.numpy()).mean() > 0.99
        assert [a["name"] for a in entry["annotations"]] == result.names
        assert [a["score"] for a in entry["annotations"]] == pytest.approx(
            result.scores.tolist(), abs=1e-3
        )


def test_the_last_line_counts_the_images_of_each_protocol(predict, folder):
    Image.new("RGB", (2100, 2000)).save(folder / "large.png")
    write_video(folder / "film.avi", images=200)
    os.truncate(folder / "film.avi", os.path.getsize(folder / "film.avi") // 2)
    code, out, err = predict(folder, "--no-pictures", model="masks")
    assert code == 2 and "film.avi: video is cut" in err, "of which no image is counted"
    (folder / "film.avi").unlink()
    assert out.splitlines()[-1].endswith("(protocol: whole (3), slide512 (1))")
    code, out, _ = predict(folder, "--no-pictures", "--protocol", "whole", model="masks")
    assert code == 0 and out.splitlines()[-1].endswith("(protocol: whole)")
    assert out.startswith("4 images"), "a chosen `whole` is another protocol: none is skipped"


@pytest.mark.parametrize(
    ("model", "flags", "expected"),
    [
        ("masks", (), ["a.png", "b.png", "c.png", *[f"overlays/{s}.jpg" for s in "abc"]]),
        ("masks", ("--no-pictures",), ["a.png", "b.png", "c.png"]),
        ("boxes", (), [f"overlays/{s}.jpg" for s in "abc"]),
        ("boxes", ("--no-pictures",), []),
        ("both", ("--format", "jsonl", "--no-pictures"), []),
        ("masks", ("--format", "coco", "--no-pictures"), ["predictions.json"]),
        ("boxes", ("--format", "coco", "--no-pictures"), ["predictions.json"]),
        (
            *("both", ("--format", "coco", "--no-pictures")),
            ["predictions.json", "predictions-masks.json"],
        ),
    ],
)
def test_files_by_model_and_format(predict, folder, tmp_path, model, flags, expected):
    code, _, err = predict(*flags, "--", folder, model=model)
    assert code == 0, err
    assert names(tmp_path / "out") == sorted(expected + LISTS)


def test_coco_is_read_by_its_reference(predict, folder, tmp_path, saved):
    from pycocotools.coco import COCO

    assert predict("--format", "coco", "--no-pictures", folder)[0] == 0
    paths = [str(tmp_path / "out" / f"predictions{kind}.json") for kind in ("", "-masks")]
    boxes, masks = map(COCO, paths)
    for coco in (boxes, masks):
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == ["cat", "dog"]
        assert [i["file_name"] for i in coco.loadImgs(coco.getImgIds())] == [
            str(folder / name) for name in ("a.png", "b.jpg", "c.bmp")
        ]
    result = Predictor(saved["both"], score=0.1)(folder / "b.jpg")
    mask = sum(masks.annToMask(a) * a["category_id"] for a in masks.imgToAnns[2])
    assert (mask == result.mask.numpy()).mean() > 0.99
    scores = [a["score"] for a in boxes.imgToAnns[2]]
    assert scores == pytest.approx(result.scores.tolist(), abs=1e-3) and scores
    first, second = (Source(folder, annotations=path).labels(1) for path in paths)
    assert "mask" not in first and 0 < len(first["boxes"]) <= len(scores)
    assert (second["mask"] == result.mask).float().mean() > 0.99


# Going on


def test_a_half_done_folder_goes_on(predict, folder, tmp_path):
    output = tmp_path / "out"
    assert predict(folder / "a.png", folder / "c.bmp")[0] == 0
    before = {name: (output / name).stat().st_mtime_ns for name in ("a.png", "c.png")}
    with (output / "predictions.jsonl").open("a") as file:
        file.write('{"file": "half a li')  # as an interrupted run leaves it
    code, out, _ = predict(folder)
    assert code == 0 and "2 of 3" in out and "skipped" in out and "1 images" in out
    assert {name: (output / name).stat().st_mtime_ns for name in before} == before
    files = [os.path.basename(entry["file"]) for entry in lines(output)]
    assert files == ["a.png", "c.bmp", "b.jpg"]
    code, out, _ = predict(folder)
    assert code == 0 and "3 of 3" in out
    assert files == [os.path.basename(entry["file"]) for entry in lines(output)]


@pytest.mark.parametrize("change", ["protocol", "image", "mask", "model"])
def test_what_is_no_longer_right_is_predicted_again(predict, folder, saved, tmp_path, change):
    assert predict(folder)[0] == 0
    flags, count = (), 1
    if change == "protocol":
        flags, count = ("--protocol", "size64"), 3
    elif change == "image":
        Image.new("RGB", (30, 30)).save(folder / "b.jpg")
        os.utime(folder / "b.jpg", (1, 1))
    elif change == "mask":
        (tmp_path / "out" / "b.png").unlink()
    else:
        weights = saved["both"] / "model.safetensors"
        os.utime(weights, (weights.stat().st_atime, weights.stat().st_mtime + 5))
        count = 3
    code, out, _ = predict(*flags, folder)
    assert code == 0 and f"{count} images" in out
    assert sorted(os.path.basename(e["file"]) for e in lines(tmp_path / "out")) == [
        "a.png", "b.jpg", "c.bmp",
    ]  # fmt: skip


def test_an_image_of_the_same_name_replaces_the_earlier_ones_results(predict, folder, tmp_path):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (33, 44)).save(tmp_path / "other" / "a.jpg")
    assert predict(folder)[0] == 0
    assert predict(tmp_path / "other")[0] == 0
    files = [entry["file"] for entry in lines(tmp_path / "out")]
    assert str(folder / "a.png") not in files and len(files) == 3
    code, out, _ = predict(folder)
    assert code == 0 and "2 of 3" in out
    assert Image.open(tmp_path / "out" / "a.png").size == (50, 20)


@pytest.mark.parametrize("change", [False, True])
def test_the_same_image_by_another_spelling_is_listed_once(
    predict, folder, tmp_path, monkeypatch, change
):
    monkeypatch.chdir(tmp_path)
    flags = ("--format", "jsonl", "--no-pictures")
    assert predict(*flags, "images/a.png", "images/b.jpg")[0] == 0
    if change:
        os.utime(folder / "a.png", (1, 1))
    code, out, _ = predict(*flags, folder / "a.png")
    assert code == 0 and ("1 images" if change else "1 of 1") in out
    files = [entry["file"] for entry in lines(tmp_path / "out")]
    again = ["images/b.jpg", str(folder / "a.png")]
    assert files == (again if change else ["images/a.png", "images/b.jpg"])


def test_sub_folders_are_mirrored_and_scored(predict, effseg, folder, tmp_path):
    (folder / "site").mkdir()
    Image.new("RGB", (20, 30)).save(folder / "site/a.jpg")
    code, _, err = predict(folder / "**/*", "--no-pictures")
    assert code == 0, err
    output = tmp_path / "out"
    assert names(output) == sorted(["a.png", "b.png", "c.png", "site/a.png", *LISTS])
    assert [entry.get("name") for entry in lines(output)] == [None, None, None, "site/a"]
    assert "4 of 4" in predict(folder / "**/*", "--no-pictures")[1]
    (tmp_path / "truth/site").mkdir(parents=True)
    (tmp_path / "truth/site/a.png").write_bytes((output / "site/a.png").read_bytes())
    out = effseg("score", "--pred", output, "--gt", tmp_path / "truth", "--num-classes", 3)[1]
    assert "mIoU 1.0000" in out
    _, _, err = predict(folder)
    assert "images in sub-folders are left out" in err
    (folder / "site/a.jpg").unlink()
    assert predict(folder / "**/*")[0] == 0
    assert len(lines(output)) == 3 and (output / "overlays/b.jpg").is_file()


def test_results_of_other_settings_are_counted(predict, folder, tmp_path):
    assert predict(folder)[0] == 0
    _, _, err = predict(folder / "b.jpg", "--protocol", "size64")
    assert f"{tmp_path / 'out'}: 4 files of other settings are left, first " in err
    assert names(tmp_path / "out").count("a.png") == 1
    assert "other settings" not in predict(folder / "b.jpg", "--protocol", "size64")[2]
    _, _, err = predict(folder / "b.jpg", "--format", "jsonl", "--no-pictures")
    assert "2 files of other settings" in err


# What is bad


def spoil(folder, cut_video):
    (folder / "cut.jpg").write_bytes((folder / "b.jpg").read_bytes()[:300])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / ".DS_Store").write_bytes(b"Bud1")
    Image.new("CMYK", (40, 30), (0, 90, 90, 0)).save(folder / "print.jpg")
    write_video(folder / cut_video, images=200)
    content = (folder / cut_video).read_bytes()
    (folder / cut_video).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("video", ["film.mp4", "film.avi"])
def test_the_good_are_predicted_and_the_bad_named_at_the_end(predict, folder, tmp_path, video):
    spoil(folder, video)
    code, out, err = predict(folder)
    assert code == 2
    named = err.strip().splitlines()
    assert len(named) == 4 and "3 of 7" in named[-1]
    for name, line in zip(("cut.jpg", "empty.jpg", video), named, strict=False):
        assert name in line
    assert ".DS_Store" not in err
    masks = [name for name in names(tmp_path / "out") if name.endswith(".png")]
    assert masks == ["a.png", "b.png", "c.png", "print.png"]
    assert not [name for name in names(tmp_path / "out") if "film" in name or "tmp" in name]
    assert "4 images" in out


def test_strict_stops_at_the_first(predict, folder, tmp_path):
    spoil(folder, "film.avi")
    code, _, err = predict("--strict", "--batch-size", 1, folder)
    assert code == 2 and err.count("\n") == 1 and "cut.jpg" in err
    assert [n for n in names(tmp_path / "out") if n.endswith("png")] == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--format", "xml"), "format 'xml': expected png, jsonl, coco"),
        (("--score", "2"), "score=2"),
        (("--batch-size", "0"), "batch_size=0"),
        (("--protocol", "tta"), "protocol 'tta'"),
    ],
)
def test_bad_flags(predict, folder, tmp_path, flags, match):
    code, _, err = predict(*flags, folder)
    assert code == 2 and err.count("\n") == 1 and match in err
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be(predict, folder, tmp_path):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/predictions"):
        code, _, err = predict(folder, output=output)
        assert code == 2 and err.count("\n") == 1 and "cannot be" in err and str(output) in err
    code, _, err = predict(folder, output=folder)
    assert code == 2 and "would replace an input" in err and err.count("\n") == 1
    Image.new("RGB", (4, 4)).save(folder / "a.jpg")
    code, _, err = predict(folder)
    assert code == 2 and "both would be written" in err and "a.jpg" in err
    assert not (tmp_path / "out").exists()


def test_interrupt_leaves_whole_files(predict, folder, tmp_path, monkeypatch):
    saved = Image.Image.save

    def interrupted(self, target, *args, **kwargs):
        if "b.png" in str(target):
            target.write_bytes(b"half")
            raise KeyboardInterrupt
        return saved(self, target, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    assert predict(folder)[0] == 130
    assert names(tmp_path / "out") == sorted(["a.png", "overlays/a.jpg", *LISTS])
    monkeypatch.undo()
    code, out, _ = predict(folder)
    assert code == 0 and "1 of 3" in out


# Video


def test_video_in_and_out(predict, tmp_path):
    write_video(tmp_path / "film.mp4", images=9, sound=1)
    code, out, err = predict("--format", "jsonl", tmp_path / "film.mp4")
    assert code == 0, err
    assert "film.mp4: its sound is left out" in err.replace("\n", " ") + out
    video, images = read(tmp_path / "out" / "film.mp4")
    assert len(images) == 9 and not video.has_sound
    assert [entry["frame"] for entry in lines(tmp_path / "out")] == list(range(9))
    assert "9 images" in out
    code, out, _ = predict("--format", "jsonl", tmp_path / "film.mp4")
    assert code == 0 and "1 of 1" in out
    assert len(lines(tmp_path / "out")) == 9


def test_a_video_that_is_listed_in_part_is_not_done(predict, tmp_path, folder):
    write_video(tmp_path / "film.mp4", images=9)
    command = ("--format", "coco", "--no-pictures", tmp_path / "film.mp4", folder / "a.png")
    assert predict(*command)[0] == 0
    path = tmp_path / "out" / "predictions.jsonl"
    image, *frames = path.read_text().splitlines(keepends=True)
    for kept in (frames[:4], [*frames[:4], frames[4][:30]], [*frames[:4], frames[4][:9] + image]):
        path.write_text(image + "".join(kept))  # as a kill leaves it
        code, out, _ = predict(*command)
        assert code == 0 and "1 of 2" in out and "9 images" in out
        assert [entry.get("frame") for entry in lines(tmp_path / "out")] == [None, *range(9)]
    assert len(json.loads((tmp_path / "out/predictions.json").read_text())["images"]) == 10


def test_a_list_that_cannot_be_written_to_its_end_keeps_no_half(predict, tmp_path):
    write_video(tmp_path / "film.mp4", images=40)
    command = ("--format", "jsonl", "--no-pictures", tmp_path / "film.mp4")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # as a full disk
    try:
        code, _, err = predict(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "predictions.jsonl: cannot be written: File too large" in err
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == ""
    code, out, _ = predict(*command)
    assert code == 0 and "40 images" in out and len(lines(tmp_path / "out")) == 40


def test_a_video_that_is_none(predict, tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no video" * 100)
    code, _, err = predict(tmp_path / "x.mp4")
    assert code == 2 and "x.mp4: not a video" in err
    assert names(tmp_path / "out") == LISTS
