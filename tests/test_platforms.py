"""What Windows, macOS and other file systems do differently, shown on any system."""

import os
import stat
import subprocess
import sys
from pathlib import Path, PosixPath
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import effseg
from effseg.data.sources.shapes import write_shapes
from effseg.errors import InputError
from effseg.inference.folder import ResultFolder
from effseg.models import hub
from effseg.training import checkpointing, run_directory
from effseg.training.record import _without_folder


class Windows(PosixPath):
    """A path that is written with back-slashes."""

    def __str__(self):
        return super().__str__().replace("/", "\\")

    def as_posix(self):
        return super().__str__()


def results(output, *files):
    return ResultFolder(output, {file: file.stem for file in files}, {}, has_masks=True)


def test_an_input_under_another_name_is_not_replaced(tmp_path):
    """macOS takes a.png for a.PNG: one file with two names, as a hard link."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.PNG", "png")
    os.link(tmp_path / "a.PNG", tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: would replace an input"):
        results(tmp_path, tmp_path / "a.PNG")


def test_on_macos_outputs_that_differ_in_case_are_one(tmp_path, monkeypatch):
    for folder, name in (("x", "IMG"), ("y", "img")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{name}.jpg")
    files = tmp_path / "x" / "IMG.jpg", tmp_path / "y" / "img.jpg"
    monkeypatch.setattr(sys, "platform", "linux")
    results(tmp_path / "out", *files)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="both would be written to"):
        results(tmp_path / "out2", *files)


def test_a_name_on_the_hub_has_no_back_slash(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"_model_class": "EffSeg"}')
    asked = []

    def download(name, options):
        asked.append(name)
        return tmp_path / "config.json"

    def load(name, **options):
        asked.append(name)
        return SimpleNamespace(seg_classes=21, config={})

    monkeypatch.setattr(hub, "_saved_folder", lambda path: Windows(path))
    monkeypatch.setattr(hub, "_download_config", download)
    monkeypatch.setattr(effseg.EffSeg, "from_pretrained", load)
    hub.from_pretrained("owner/name")
    assert asked == ["owner/name", "owner/name"]


def test_a_file_of_another_encoding_takes_what_a_command_prints():
    command = [sys.executable, "-m", "effseg.cli", "info", "effseg_lite0"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1251", "COLUMNS": "200"}
    run = subprocess.run(command, env=environment, capture_output=True)
    assert run.returncode == 0 and b"\\xd7" in run.stdout, run.stderr  # a multiplication sign


def test_the_best_model_survives_a_rename_that_fails(tmp_path, monkeypatch):
    run = run_directory.RunDirectory(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "best").touch()

    def save(folder, **card):
        folder.mkdir()

    def rename(self, target):
        if self.name == "model.part":  # held by a virus scanner
            raise PermissionError(13, "Access is denied")
        return os.rename(self, target)

    task = SimpleNamespace(scored_model=SimpleNamespace(save_pretrained=save), scores={})
    monkeypatch.setattr(run_directory, "card_of", lambda folder, task: {})
    monkeypatch.setattr(Path, "rename", rename)
    assert not run._save_model(task) and "the one before is kept" in run.failure
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "best"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (r"C:\Users\Anna Meier\configs\quickstart.yaml", "quickstart.yaml"),
        ("--config=/home/anna/my projects/mine.yaml", "--config=mine.yaml"),
        ("--data={root: /home/anna/voc}", "--data={root: voc}"),
        (r"--data={root: C:\Users\Anna\voc}", "--data={root: voc}"),
        ("--data={root: /home/anna b/voc}", "--data={root: voc}"),
        ("--data.train=/home/a=b/c", "--data.train=c"),
        ("--x=/a/b,/c/d", "--x=b,d"),
        ("--model.init_from=voc", "--model.init_from=voc"),
        ("runs/first", "runs/first"),
    ],
)
def test_a_card_has_no_path_of_this_machine(word, expected):
    assert _without_folder(word) == expected


def test_a_miniature_goes_into_an_empty_folder(tmp_path, monkeypatch):
    def rename(self, target):
        if Path(target).exists():
            raise FileExistsError(17, "Cannot create a file when that file already exists")
        return os.rename(self, target)

    (tmp_path / "shapes").mkdir()
    monkeypatch.setattr(Path, "rename", rename)
    assert (write_shapes(tmp_path / "shapes", 1, 1, (64, 64)) / "JPEGImages").is_dir()


def test_a_drive_that_cannot_sync_folders_keeps_checkpoints(tmp_path, monkeypatch):
    sync = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    io = checkpointing.SafeCheckpointIO()
    io.save_checkpoint({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "best.ckpt")
    assert not io.failure and (tmp_path / "best.ckpt").is_file()
