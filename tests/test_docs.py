"""The docs' code runs as printed, and the index names every recipe and page."""

import re
from pathlib import Path

import pytest
import torch

import effseg
from effseg.losses import Criterion

DOCS = Path(__file__).parent.parent / "docs"


ROOT = DOCS.parent


@pytest.mark.parametrize("page", ["from_smp.md", "from_effdet.md"])
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    exec(code, {})


def test_the_index_names_every_recipe_and_page():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    recipes = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == recipes
    pages = {path.name for path in DOCS.glob("*.md")} - {"index.md"}
    assert pages <= set(re.findall(r"\(([\w-]+\.md)\)", text))


def code_after(page, heading, number=0):
    text = (DOCS / page).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > number, f"{page}: no Python after {heading}"
    return blocks[number]


def test_the_custom_training_loop_learns_and_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = {}
    exec(code_after("training.md", "## A custom training loop"), scope)
    history = scope["history"]
    assert set(history[0]) == {"loss", "segmentation", "classes", "boxes"}
    first, last = (sum(h["segmentation"] for h in part) for part in (history[:3], history[-3:]))
    assert last < 0.8 * first
    first, last = (sum(h["loss"] for h in part) for part in (history[:3], history[-3:]))
    assert last < first
    loaded = effseg.from_pretrained("my-model").eval()
    x = loaded.normalise(scope["images"])
    with torch.no_grad():
        assert torch.equal(loaded(x).masks, scope["model"](x).masks)


def test_the_wrapper_for_several_processes_reduces_all_gradients(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = effseg.create_model("effsegdet_lite0", seg_classes=3, det_classes=2)
        images = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
        targets = [{"mask": torch.zeros(128, 128, dtype=torch.uint8)}] * 2  # and no boxes
        scope = {"torch": torch, "Criterion": Criterion, "model": model}
        scope |= {"images": images, "targets": targets}
        code = code_after("training.md", "## A custom training loop", 1)
        exec(code, scope)
        step, sizes = scope["step"], []

        def count(_, bucket):
            sizes.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        step.register_comm_hook(None, count)
        step(model.normalise(images), targets)["loss"].backward()
        assert sum(sizes) == sum(p.numel() for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
