"""The commands beside fit and validate, through the real command line."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effseg.data.classes import Classes

TINY = Path(__file__).parent / "conf" / "tiny.yaml"


def test_help_lists_every_command():
    done = subprocess.run(
        [sys.executable, "-m", "effseg.cli", "--help"], capture_output=True, text=True, check=True
    )
    for name in ("fit", "validate", "predict", "score", "info", "data"):
        assert name in done.stdout


def test_info_of_the_papers_model(effseg):
    code, out, _ = effseg("info", "effseg_d4", "--size", 512)
    assert code == 0
    assert "17,602,071" in out
    assert "16,742,216" in out
    code, out, _ = effseg("info", "effseg_d4", "--size", 640, "--json")
    assert 18.8e9 <= json.loads(out)["macs"] <= 19.0e9


def test_info_shows_what_a_part_of_the_head_costs(effseg):
    plain, ours = (
        json.loads(effseg("info", "effseg_lite0", "--json", *parts)[1])
        for parts in ((), ("--head", "pyramid", "refinement"))
    )
    parts = ours["parts"]
    assert parts["decoder"] == plain["parts"]["decoder"]
    head = parts["segmentation_head"]["macs"] - plain["parts"]["segmentation_head"]["macs"]
    assert head == ours["macs"] - plain["macs"] > 3e8


def test_info_without_a_name_lists_the_models(effseg):
    code, out, _ = effseg("info")
    assert code == 0
    assert out.split()[0] == "effseg_d0"
    assert len(out.split()) == 41
    assert json.loads(effseg("info", "--json")[1]) == out.split()


@pytest.fixture
def masks(tmp_path):
    """Two folders: four true masks, and predictions that equal them but for one row each."""
    rng = np.random.default_rng(0)
    for i in range(4):
        truth = rng.integers(0, 3, (20, 30)).astype(np.uint8)
        truth[0] = 255
        guess = truth.copy()
        guess[0] = 1
        guess[5] = 2
        for folder, labels in (("gt", truth), ("pred", guess)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(labels).save(tmp_path / folder / f"{i}.png")
    return tmp_path


def test_score_json_equals_a_count_by_hand(effseg, masks):
    code, out, _ = effseg(
        "score", "--pred", masks / "pred", "--gt", masks / "gt", "--num-classes", 3, "--json"
    )
    assert code == 0
    scores = json.loads(out)
    counts = np.zeros((3, 3), int)
    for i in range(4):
        truth = np.asarray(Image.open(masks / "gt" / f"{i}.png"))
        guess = np.asarray(Image.open(masks / "pred" / f"{i}.png"))
        for t, p in zip(truth.ravel(), guess.ravel(), strict=True):
            if t != 255:
                counts[t, p] += 1
    iou = np.diag(counts) / (counts.sum(0) + counts.sum(1) - np.diag(counts))
    assert scores["miou"] == pytest.approx(iou.mean(), abs=1e-12)
    assert scores["confusion"] == counts.tolist()


def test_score_prints_a_table_and_takes_a_split(effseg, masks):
    split = masks / "split.txt"
    split.write_text("0\n1\n")
    code, out, _ = effseg(
        "score",
        "--pred",
        masks / "pred",
        "--gt",
        masks / "gt",
        "--num-classes",
        3,
        "--split",
        split,
    )
    assert code == 0
    assert "mIoU" in out


@pytest.mark.parametrize("flags", [(), ("--num-classes", 3)])
def test_score_says_whose_names_it_shows(effseg, masks, flags):
    code, out, _ = effseg("score", "--pred", masks / "pred", "--gt", masks / "gt", *flags)
    assert code == 0 and ("aeroplane" in out) == ("VOC's names" in out) == (not flags)


def test_score_names_classes_counts_boundaries_and_ignores_nothing(effseg, masks):
    (masks / "names.txt").write_text("background\nroad\ntree\n")
    flags = ("--pred", masks / "pred", "--gt", masks / "gt", "--classes", masks / "names.txt")
    code, out, _ = effseg("score", *flags, "--boundary", "--workers", 1)
    assert code == 0
    assert "road" in out and "tree" in out and "Boundary IoU" in out
    code, out, _ = effseg("score", *flags, "--json")
    assert code == 0 and len(json.loads(out)["iou"]) == 3
    code, _, err = effseg("score", *flags, "--ignore-index", "none")
    assert code == 2 and "255" in err and err.count("\n") == 1
    for more, word in (
        (("--num-classes", 4), "has 3 classes"),
        (("--ignore-index", "all"), "expected a number or none"),
        (("--workers", 0), "workers is 0"),
    ):
        code, _, err = effseg("score", *flags, *more)
        assert code == 2 and word in err and err.count("\n") == 1


def test_score_absent_class_is_null_in_json(effseg, masks):
    code, out, _ = effseg(
        "score", "--pred", masks / "pred", "--gt", masks / "gt", "--num-classes", 4, "--json"
    )
    assert code == 0
    assert json.loads(out)["iou"][3] is None


def test_predict_writes_palette_masks_and_overlays(effseg, finished_run, shapes_root, tmp_path):
    output = tmp_path / "out"
    folder = shapes_root / "JPEGImages"
    code, out, _ = effseg("predict", "--model", finished_run, "--output", output, folder)
    assert code == 0
    images = sorted(folder.glob("*.jpg"))
    assert str(output) in out
    for image in images:
        mask = Image.open(output / f"{image.stem}.png")
        assert mask.mode == "P"
        assert mask.size == Image.open(image).size
        assert np.asarray(mask).max() < 7
        palette = np.asarray(mask.getpalette()).reshape(-1, 3)
        assert palette[:7].tolist() == [list(c) for c in Classes.from_card("shapes").palette]


@pytest.mark.parametrize("protocol", ["ms+flip", "slide48"])
def test_predict_protocols(effseg, finished_run, shapes_root, tmp_path, protocol):
    image = next((shapes_root / "JPEGImages").glob("val*"))
    flags = ("--model", finished_run, "--output", tmp_path, "--protocol", protocol)
    code, out, _ = effseg("predict", *flags, image)
    assert code == 0
    assert protocol in out
    assert Image.open(tmp_path / f"{image.stem}.png").size == (96, 64)


def test_predict_truncated_image(effseg, finished_run, shapes_root, tmp_path):
    image = tmp_path / "cut.jpg"
    image.write_bytes(next((shapes_root / "JPEGImages").glob("val*")).read_bytes()[:-300])
    output = tmp_path / "out"
    code, _, err = effseg("predict", "--model", finished_run, "--output", output, image)
    assert code == 2
    assert "cut.jpg" in err
    assert not list(output.rglob("cut*"))


def test_info_of_a_detector(effseg):
    code, out, _ = effseg("info", "efficientdet_d0", "--json")
    assert code == 0
    assert json.loads(out)["params"] == 3_880_067


def test_predict_without_a_model(effseg, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    image = tmp_path / "a.jpg"
    code, _, err = effseg("predict", "--model", tmp_path, "--output", tmp_path / "out", image)
    assert code == 2
    assert str(tmp_path) in err


def test_data_check_passes_on_the_miniature(effseg, shapes_root):
    code, out, _ = effseg("data", "check", "--root", shapes_root)
    assert code == 0
    assert "train" in out
    assert "val" in out


def test_data_check_lists_every_problem(effseg, shapes_root, tmp_path):
    root = tmp_path / "broken"
    shutil.copytree(shapes_root, root)
    images = sorted((root / "JPEGImages").glob("train*"))[:2]
    for image in images:
        image.write_bytes(image.read_bytes()[:-300])
    code, out, err = effseg("data", "check", "--root", root, "--split", "train")
    assert code == 2
    assert "2 problems" in err
    for image in images:
        assert image.name in out


def test_data_check_of_a_recipe_reads_all_its_sources(effseg, shapes_root, tmp_path):
    tiny = TINY.with_name("tiny_joint.yaml")
    code, out, err = effseg("data", "check", "--config", tiny, "--root", shapes_root)
    assert code == 0, err
    titles = re.findall(r"^(\S+): (\d+) images", out, re.MULTILINE)
    assert titles == [("train.masks", "4"), ("train.boxes", "4"), ("val.both", "3")]
    code, _, err = effseg("data", "check", "--config", tmp_path / "no.yaml")
    assert code == 2 and err.count("\n") == 1 and "no.yaml" in err


def test_data_check_of_a_folder(effseg, tmp_path):
    (tmp_path / "classes.txt").write_text("background\nroad\n")
    for split, count in (("train", 3), ("val", 2)):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 10)).save(tmp_path / f"images/{split}/{i}.jpg")
            mask = Image.new("L", (20, 10), 0)
            mask.paste(1, (0, 0, 5, 10))
            mask.save(tmp_path / f"masks/{split}/{i}.png")
    arguments = ("data", "check", "--root", tmp_path, "--classes", tmp_path / "classes.txt")
    code, out, err = effseg(*arguments)
    assert code == 0, err
    assert "train: 3 images" in out and "val: 2 images" in out
    assert re.search(r"road\D+3\D+25.0 %", out)
    Image.new("L", (20, 10), 2).save(tmp_path / "masks/val/1.png")
    code, out, err = effseg(*arguments)
    assert code == 2 and "1 problems" in err
    assert "1.png" in out and "2" in out


def test_data_check_of_a_recipe_refuses_what_fit_refuses(effseg, tmp_path):
    """Masks whose 255 has another meaning than in training; images of train in val."""
    for split, value in (("train", 255), ("val", 1)):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / kind / split).mkdir(parents=True)
            picture = Image.new(mode, (20, 10))
            picture.paste(value if mode == "L" else (9, 9, 9), (0, 0, 5, 10))
            picture.save(tmp_path / kind / split / f"{split}.png")
    (tmp_path / "classes.txt").write_text("background\nroad\n")
    arguments = ("--root", tmp_path, "--classes", tmp_path / "classes.txt")
    for more in ((), ("--config", "folder")):
        code, out, err = effseg("data", "check", *arguments, *more)
        assert code == 2 and "1 problems" in err, (out, err)
        assert "val.png: mask value 1, expected 0 and 255" in out
    recipe = tmp_path / "twice.yaml"
    folder = "{class_path: effseg.data.Folder, init_args: {split: train}}"
    recipe.write_text(f"data: {{train: {{a: {folder}}}, val: {{b: {folder}}}}}")
    code, _, err = effseg("data", "check", *arguments, "--config", recipe)
    assert code == 2 and "train.a and val.b share 1 of 1 images" in err


def test_data_check_draws_the_miniature_of_a_recipe(effseg, tmp_path):
    recipe = tmp_path / "few.yaml"
    settings = "{train: 3, val: 2, size: [64, 64], boxes: null}"
    recipe.write_text(
        f"data: {{train: {{a: {{class_path: effseg.data.Shapes, init_args: {settings}}}}}}}"
    )
    code, out, err = effseg("data", "check", "--config", recipe, "--root", tmp_path / "drawn")
    assert code == 0 and "train.a: 3 images" in out, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND"]),
        (["segment"], ["segment", "fit"]),
        (["info", "effseg_d9"], ["effseg_d9", "effseg_d7"]),
        (["info", "effseg_d4", "--size", "0"], ["size=0"]),
        (["info", "efficientdet_d0", "--head", "context"], ["--head", "no per-pixel head"]),
        (["info", "voc", "--head", "context"], ["--head", "trained model"]),
        (["info", "voc", "--classes", "0"], ["--classes", "trained model"]),
        (["score", "--pred", ".", "--gt", ".", "--binary", "yes"], ["binary", "num_classes=21"]),
        (["score", "--pred", "/no/such", "--gt", "/no/such"], ["/no/such"]),
        (["score", "--pred", "x"], ["--gt"]),
        (["data", "check", "--root", "/no/such"], ["/no/such"]),
        (["data", "check", "--config", "x", "--split", "val"], ["--split beside --config"]),
        (["data", "show", "--output=a.png", "--classes=x", "--boxes"], ["--boxes beside --clas"]),
    ],
)
def test_bad_input_is_one_line(effseg, arguments, words):
    code, _, err = effseg(*arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    for word in words:
        assert word in err
