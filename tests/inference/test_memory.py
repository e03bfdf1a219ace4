"""Short memory: one line that says what helps."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import effseg
from effseg import InputError
from effseg.inference import engine
from effseg.metrics import folders

TINY = Path(__file__).parents[1] / "conf" / "tiny.yaml"
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("Failed to allocate memory for requested buffer of size 9"),  # ONNX Runtime
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
]


@pytest.fixture(params=ERRORS, ids=lambda error: type(error).__name__)
def short(request, monkeypatch):
    def fails(*_):
        raise request.param

    monkeypatch.setattr(engine, "padded_batches", fails)


def test_prediction_names_window_and_batch(effseg, saved, short, tmp_path):
    for name in "ab":
        Image.new("RGB", (90, 60)).save(tmp_path / f"{name}.png")
    command = ("predict", "--model", saved["masks"], "--output", tmp_path / "out", tmp_path)
    code, _, err = effseg(*command)
    assert code == 2 and err.count("\n") == 1
    assert "out of memory with 2 images of up to 90x60 pixels by the protocol whole" in err
    assert "--protocol slide512" in err and "--batch-size" in err
    code, _, err = effseg(*command, "--protocol", "slide32")
    assert code == 2 and "sliding" not in err and "--batch-size" in err


def test_evaluation_names_window_and_batch(effseg, finished_run, shapes_root, short):
    code, _, err = effseg(
        *("validate", f"--config={TINY}", f"--data.root={shapes_root}"),
        f"--model.init_from={finished_run / 'model'}",
    )
    assert code == 2 and err.count("\n") == 1
    assert "model.segmentation.protocol" in err and "data.eval_batch_size" in err


def test_a_detector_has_no_window(saved, monkeypatch):
    model = effseg.from_pretrained(saved["boxes"]).eval()

    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(model, "detect", fails)
    with pytest.raises(InputError, match="out of memory with 1 images of up to 9x7 pixels: expe"):
        engine.Engine(model).detect([torch.zeros(3, 7, 9, dtype=torch.uint8)])


def test_other_commands_end_in_one_line_too(effseg, monkeypatch, tmp_path):
    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(folders, "score_folders", fails)
    code, _, err = effseg("score", "--pred", tmp_path, "--gt", tmp_path)
    assert code == 2 and err.startswith("error: out of memory") and err.count("\n") == 1
