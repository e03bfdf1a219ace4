"""The report of runs, through the real command line."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effseg.report.collect import read_run
from effseg.report.examples import CONFUSED, FALSE, MISSED, mask_errors
from effseg.report.page import write_report

CONF = Path(__file__).parents[1] / "conf"
NAMES = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(shutil.which, NAMES), None)


class Page(HTMLParser):
    """Text, pictures, and every address of a page."""

    def __init__(self, path):
        super().__init__()
        self.texts, self.pictures, self.addresses, self.tags = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "action", "data"):
                self.addresses.append(value)
            if tag == "img" and key == "src":
                self.pictures.append(value)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory, shapes_root):
    from effseg.cli import main

    run = tmp_path_factory.mktemp("runs") / "joint"
    code = main(
        [
            "fit",
            f"--config={CONF / 'tiny_joint.yaml'}",
            f"--data.root={shapes_root}",
            f"--trainer.default_root_dir={run}",
        ]
    )
    assert code == 0
    return run


def test_fit_leaves_a_report_that_needs_nothing_else(finished_run):
    page = Page(finished_run / "report.html")
    assert "script" not in page.tags and "link" not in page.tags
    outside = [a for a in page.addresses if not a.startswith(("data:", "#"))]
    assert outside == []
    assert "@import" not in (finished_run / "report.html").read_text()
    assert 'name="viewport"' in (finished_run / "report.html").read_text()


def test_the_report_says_how_it_was_trained_and_how_well(finished_run):
    page = Page(finished_run / "report.html")
    start = json.loads((finished_run / "run.json").read_text())[0]
    assert f"--trainer.default_root_dir={finished_run}" in page.text
    assert start["versions"]["torch"] == torch.__version__.split("+")[0]
    for part in ("2 of 2", "val.shapes: 3 images", "whole", torch.__version__.split("+")[0]):
        assert part in page.text
    scores = json.loads((finished_run / "model" / "evaluation.json").read_text())
    masks = scores["sources"]["shapes"]["segmentation"]
    assert f"mIoU {100 * masks['miou']:.1f} %" in page.text
    for name, iou in zip(scores["_class_names"], masks["iou"], strict=True):
        shown = "–" if iou is None else f"{100 * iou:.1f} %"
        assert re.search(rf"{name} \d+\.\d % {shown}", page.text), name
    for title in ("loss", "mIoU", "learning rate", "seconds per epoch", "Confusion matrix"):
        assert title in page.text
    assert len(page.pictures) == 3 * 4  # three images: image, truth, prediction, errors
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in page.pictures)


def test_the_confusion_matrix_is_that_of_the_saved_model(finished_run):
    scores = json.loads((finished_run / "model" / "evaluation.json").read_text())
    masks = scores["sources"]["shapes"]["segmentation"]
    confusion = np.array(masks["confusion"])
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    iou = confusion.diagonal()[union > 0] / union[union > 0]
    assert iou.mean() == pytest.approx(masks["miou"])
    assert {image for image, _ in masks["images"]} == {f"val_{i:05d}" for i in range(3)}
    wrong = confusion - np.diag(confusion.diagonal())
    true, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
    names = scores["_class_names"]
    first = f"{names[true]} predicted as {names[predicted]}"
    assert first in Page(finished_run / "report.html").text


def test_seconds_of_every_epoch_are_logged(finished_run):
    run = read_run(finished_run)
    assert len(run.curves["seconds/train"]) == 2
    assert all(seconds > 0 for _, seconds in run.curves["seconds/train"])
    assert len(run.curves["val/miou_raw"]) == 2


def test_a_joint_run_has_masks_and_boxes(joint_run):
    page = Page(joint_run / "report.html")
    assert "masks of both" in page.text and "boxes of both" in page.text
    assert "AP50" in page.text and "mIoU" in page.text
    assert len(page.pictures) == 2 * 3 * 4
    scores = json.loads((joint_run / "model" / "evaluation.json").read_text())
    confusion = np.array(scores["sources"]["both"]["detection"]["confusion"])
    truth = json.loads((joint_run / "run.json").read_text())[0]["data"]
    assert [entry["images"] for entry in truth] == [4, 4, 3]
    assert confusion[1:].sum() > 0  # every object is in a row


def test_two_runs_side_by_side_show_differences(effseg, finished_run, joint_run, tmp_path):
    output = tmp_path / "both.html"
    code, out, err = effseg("report", finished_run, joint_run, "--output", output)
    assert code == 0, err
    assert str(output) in out
    page = Page(output)
    masks = [
        json.loads((run / "model" / "evaluation.json").read_text())["sources"][source][
            "segmentation"
        ]
        for run, source in ((finished_run, "shapes"), (joint_run, "both"))
    ]
    difference = 100 * (masks[1]["miou"] - masks[0]["miou"])
    assert f"mIoU {100 * masks[0]['miou']:.1f} % {100 * masks[1]['miou']:.1f} %" in page.text
    assert f"{difference:+.1f}" in page.text
    assert "IoU, tiny" in page.text and "IoU, joint" in page.text


def test_an_unfinished_run_and_one_without_evaluation(effseg, finished_run, tmp_path):
    run = tmp_path / "begun"
    run.mkdir()
    for name in ("config.yaml", "run.json", "metrics.csv"):
        shutil.copy(finished_run / name, run)
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:4]) + "0,1.5,")  # cut within a row
    code, _, err = effseg("report", run)
    assert code == 0, err
    page = Page(run / "report.html")
    assert "No evaluation yet" in page.text
    assert "1 of 2" in page.text
    (run / "metrics.csv").unlink()
    assert effseg("report", run)[0] == 0
    assert "0 of 2" in Page(run / "report.html").text


def test_a_run_from_another_runs_checkpoint_counts_the_epochs_before(finished_run):
    run = read_run(finished_run)
    assert run.progress == "2 of 2"
    later = [(step, epoch + 8) for step, epoch in run.curves["epoch"]]
    run.curves["epoch"], run.config["trainer"]["max_epochs"] = later, 12
    assert run.progress == "10 of 12"


def test_without_the_data_the_rest_of_the_report_is_there(effseg, finished_run, tmp_path):
    run = tmp_path / "moved"
    shutil.copytree(finished_run, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("effseg.data.Shapes", "effseg.data.VOC"))
    code, out, _ = effseg("report", run)
    assert code == 0
    assert "images of masks of shapes" in out
    page = Page(run / "report.html")
    assert not page.pictures and "Confusion matrix" in page.text


def test_names_that_look_like_markup_are_text(finished_run, tmp_path):
    run = tmp_path / "markup"
    shutil.copytree(finished_run, run)
    scores = (run / "model" / "evaluation.json").read_text()
    (run / "model" / "evaluation.json").write_text(scores.replace('"circle"', '"<script>circle"'))
    write_report([run], run / "report.html")
    page = Page(run / "report.html")
    assert "script" not in page.tags
    assert "<script>circle" in page.text


def test_a_copy_of_the_metrics_is_not_read(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.copy(tmp_path / "run" / "metrics.csv", tmp_path / "run" / "metrics-copy.csv")
    assert read_run(tmp_path / "run").curves == read_run(finished_run).curves


def test_no_such_device_is_one_line(effseg, finished_run, tmp_path):
    output = tmp_path / "report.html"
    code, _, err = effseg("report", finished_run, "--device", "gpu", "--output", output)
    assert code == 2 and err.count("\n") == 1 and "device gpu" in err
    assert not output.exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "broken"])
def test_bad_input_is_one_line(effseg, tmp_path, finished_run, kind):
    run = tmp_path / "run"
    if kind != "missing":
        run.mkdir()
    if kind == "broken":
        shutil.copytree(finished_run, run, dirs_exist_ok=True)
        (run / "run.json").write_text("[{")
    code, _, err = effseg("report", run)
    assert code == 2
    assert err.count("\n") == 1 and str(run) in err


def test_a_report_that_fails_ends_no_run(effseg, shapes_root, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no room")

    monkeypatch.setattr("effseg.report.page.write_report", fail)
    run = tmp_path / "run"
    code, _, err = effseg(
        "fit",
        f"--config={CONF / 'tiny.yaml'}",
        f"--data.root={shapes_root}",
        f"--trainer.default_root_dir={run}",
        "--trainer.max_epochs=1",
    )
    assert code == 0
    assert "no report: no room" in err
    assert (run / "model" / "model.safetensors").is_file()


def test_error_maps_tell_missed_false_and_confused_apart():
    truth = torch.tensor([[1, 0, 1, 2, 255, 0]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 2, 2, 1, 0]], dtype=torch.uint8)
    errors = mask_errors(truth, prediction)[0].tolist()
    black = [0, 0, 0]
    assert errors == [list(MISSED), list(FALSE), list(CONFUSED), black, black, black]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_report(finished_run, tmp_path, width):
    picture, frame = tmp_path / "page.png", tmp_path / "frame.html"
    # A window cannot be as narrow as a phone, a frame can.
    frame.write_text(
        f'<body style="margin:0"><iframe src="{(finished_run / "report.html").as_uri()}" '
        f'style="border:0;width:{width}px;height:3000px"></iframe>'
    )
    subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"),
            *(f"--screenshot={picture}", f"--window-size={width},3000", frame.as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    inked = (pixels < 250).any(2)
    assert inked[:2000].any(1).mean() > 0.3  # the page goes on down to its charts
    assert not inked[:, -3:].any()  # and is not wider than the window
    assert inked[:, width // 2 :].any()
