"""Saved models: subclasses, cards, what the hub is asked for, and files of before."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import effseg
from effseg import EffSeg, EffSegDet, InputError
from effseg.data.classes import Classes

ENCODER = "tu-test_efficientnet.r160_in1k"
SMALL = {
    "encoder_weights": None,
    "decoder_channels": 8,
    "decoder_layers": 1,
    "head_channels": 8,
    "head_layers": 1,
}


class Plain(EffSeg):
    """A subclass that takes what EffSeg takes."""


class Scaled(EffSeg):
    """A subclass with additional arguments, one of them before EffSeg's."""

    def __init__(self, factor, encoder_name=ENCODER, *, shift=0.0, **kwargs):
        super().__init__(encoder_name, **kwargs)
        self.factor, self.shift = factor, shift

    def forward(self, x):
        return super().forward(x) * self.factor + self.shift


class Fixed(EffSegDet):
    """A subclass that fixes the arguments."""

    def __init__(self, classes=2):
        super().__init__(ENCODER, seg_classes=classes + 1, det_classes=classes, **SMALL)


class Counted(EffSeg):
    """A subclass that redefines a name: `classes` without the background."""

    def __init__(self, classes=2, **kwargs):
        super().__init__(ENCODER, classes=classes + 1, **SMALL | kwargs)


def image():
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plain(ENCODER, classes=5, **SMALL),
        lambda: Plain(encoder_name=ENCODER, classes=5, decoder_levels=(2, 5), **SMALL),
        lambda: Scaled(3.0, ENCODER, classes=5, shift=1.0, **SMALL),
        lambda: Scaled(factor=3.0, classes=5, **SMALL),
        lambda: Fixed(4),
        lambda: Fixed(classes=4),
        lambda: Counted(4),
        lambda: Counted(classes=4, head_channels=12),
    ],
    ids=[
        *("plain", "plain by name", "more arguments", "more by name"),
        *("fixed", "fixed by name", "other meaning", "other meaning by name"),
    ],
)
def test_a_subclass_is_saved_and_loaded(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path)
    for load in (effseg.from_pretrained, type(model).from_pretrained):
        again = load(tmp_path).eval()
        assert type(again) is type(model)
        assert vars(again).get("factor") == vars(model).get("factor")
        assert vars(again).get("shift") == vars(model).get("shift")
        with torch.no_grad():
            actual, expected = again(image()), model(image())
        if isinstance(expected, tuple):
            actual, expected = actual.masks, expected.masks
        assert torch.equal(actual, expected)


def test_the_card_names_training_data_and_scores(tmp_path):
    model = EffSeg(ENCODER, classes=5, **SMALL)
    model.save_pretrained(tmp_path, dataset="Pascal VOC 2012", metrics={"miou": 0.7125})
    card = (tmp_path / "README.md").read_text()
    assert "Pascal VOC 2012" in card and "0.7125" in card and "miou" in card
    assert '"decoder_channels": 8' in card and "library_name: effseg" in card
    model.save_pretrained(tmp_path / "plain")
    assert "0.7125" not in (tmp_path / "plain" / "README.md").read_text()


def test_who_may_read_the_config_may_read_the_weights(tmp_path):
    EffSeg(ENCODER, **SMALL).save_pretrained(tmp_path)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_a_card_of_computed_scores(tmp_path):
    metrics = effseg.metrics.SegmentationMetrics(num_classes=2)
    metrics.update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
    EffSeg(ENCODER, **SMALL).save_pretrained(tmp_path, metrics=metrics.compute())
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert json.loads(text.partition("```json\n")[2].partition("```")[0])["miou"] == 0.25


def test_another_class_count_drops_the_saved_names(tmp_path):
    model = EffSeg(ENCODER, classes=3, **SMALL)
    model.config.update(Classes.from_names(["background", "cat", "dog"]).to_config())
    model.save_pretrained(tmp_path)
    assert effseg.from_pretrained(tmp_path).config["_class_names"][2] == "dog"
    with pytest.warns(UserWarning, match="Mismatched"):
        other = effseg.from_pretrained(tmp_path, strict=False, classes=5)
    assert not {"_class_names", "_palette"} & other.config.keys()


def test_revision_token_and_cache_reach_the_hub(monkeypatch, tmp_path):
    EffSeg(ENCODER, classes=5, **SMALL).eval().save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options))
        return str(tmp_path / filename)

    monkeypatch.setattr("effseg.models.hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    options = {"revision": "abc123", "token": "secret", "cache_dir": str(tmp_path / "cache")}
    model = effseg.from_pretrained("somebody/model", **options)
    assert isinstance(model, EffSeg)
    assert {name for _, name, _ in asked} == {"config.json", "model.safetensors"}
    assert {repository for repository, _, _ in asked} == {"somebody/model"}
    for _, name, given in asked:
        for key, value in options.items():
            assert str(given[key]) == value, (name, key)
    assert not set(options) & set(model.config)


def test_an_unavailable_repository_is_named(monkeypatch):
    def refuse(*args, **options):
        raise OSError("offline")

    monkeypatch.setattr("effseg.models.hub.hf_hub_download", refuse)
    with pytest.raises(InputError, match=r"somebody/model.*offline"):
        effseg.from_pretrained("somebody/model")


# Files of before the models became one network

CFG = {
    "input_range": [0.0, 1.0],
    "input_space": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}
COMMON = {
    "bn_momentum": 0.1,
    "decoder_activation": "relu6",
    "decoder_channels": 8,
    "decoder_fusion": "sum",
    "decoder_fusion_per_channel": False,
    "decoder_layers": 1,
    "encoder_name": ENCODER,
    "encoder_weights": None,
    "in_channels": 3,
    "preprocess_cfg": CFG,
}
BOXES = {"anchor_scale": 3.0, "anchor_shapes": [[1.0, 1.0], [1.4, 0.7]], "size": 320}
OLD = {
    "EffSeg": COMMON
    | {"activation": None, "aux_params": None, "classes": 5, "decoder_levels": [2, 6]}
    | {"encoder_depth": 4, "head_channels": 12, "head_context": True, "head_layers": 2},
    "EfficientDet": COMMON
    | BOXES
    | {"classes": 7, "decoder_levels": [3, 7], "detection_levels": None, "head_layers": 2},
    "EffSegDet": COMMON
    | BOXES
    | {"det_classes": 4, "seg_classes": 5, "decoder_levels": [2, 7], "detection_levels": [3, 6]}
    | {"detection_layers": 2, "head_channels": 12, "head_context": True, "head_layers": 1},
}


@pytest.mark.parametrize("name", OLD)
def test_older_configs_load(name, tmp_path):
    old = OLD[name]
    arguments = {k: v for k, v in old.items() if v is not None}
    model = getattr(effseg, name)(**arguments | {"encoder_weights": None}).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_model_class": name} | old))
    again = effseg.from_pretrained(tmp_path).eval()
    assert again.preprocess_cfg == CFG
    layers = [m.momentum for m in again.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert set(layers) == {0.1}
    for key, value in old.items():
        actual = again.config[key]
        if value is not None:
            assert json.loads(json.dumps(actual)) == value, key
    with torch.no_grad():
        expected, actual = model(image()), again(image())
    for a, b in zip(_tensors(expected), _tensors(actual), strict=True):
        assert torch.equal(a, b)
    again.save_pretrained(tmp_path / "again")
    assert Path(tmp_path / "again" / "config.json").is_file()
    effseg.from_pretrained(tmp_path / "again")


def _tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for part in output for t in _tensors(part)]


# Uploading


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub as a folder: what is uploaded lies in it, and what it was asked in `asked`."""
    folder, asked = tmp_path / "hub", {}

    class Answer:
        repo_id = "somebody/model"
        commit_url = "https://hub.invalid/somebody/model/commit/1"

    def create_repo(self, repo_id, **options):
        asked.update(options, repo_id=repo_id, token=self.token)
        return Answer

    def create_commit(self, repo_id, operations, **options):
        for operation in operations:
            target = folder / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                target.write_bytes(file.read())
        return Answer

    def upload_folder(self, *, folder_path, **options):
        shutil.copytree(folder_path, folder)
        return Answer.commit_url

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", create_commit)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    return folder, asked


def test_a_run_is_uploaded_with_its_card(finished_run, hub):
    folder, asked = hub
    url = effseg.push_to_hub(
        finished_run, "somebody/model", licence="apache-2.0", private=True, token="secret"
    )
    assert url.endswith("/commit/1")
    assert asked["private"] is True and asked["token"] == "secret"
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}  # no image's name
    card = (folder / "README.md").read_text()
    scores = json.loads((finished_run / "model" / "evaluation.json").read_text())
    masks = scores["sources"]["shapes"]["segmentation"]
    for part in (
        "license: apache-2.0",
        "pipeline_tag: image-segmentation",
        f"| shapes | masks | whole | mIoU | {masks['miou']:.4f} |",
        "- train.shapes: 8 images, Shapes (train)",
        "Miniature of drawn shapes, licence: Apache-2.0",
        "effseg fit --config=tiny.yaml",
        "background, circle",
        "## Limits",
    ):
        assert part in card, part
    assert str(finished_run.parent) not in card  # no path of this machine
    again, model = effseg.from_pretrained(folder).eval(), effseg.from_pretrained(finished_run)
    with torch.no_grad():
        assert torch.equal(again(image()), model.eval()(image()))
    assert "license" not in (finished_run / "model" / "README.md").read_text().split("---")[1]


def test_a_model_is_uploaded_with_its_card(hub):
    folder, _ = hub
    model = EffSegDet(ENCODER, seg_classes=3, det_classes=2, **SMALL)
    model.push_to_hub("somebody/model", metrics={"miou": 0.71}, licence="other", limits="No roads.")
    card = (folder / "README.md").read_text()
    assert "0.71" in card and "license: other" in card and "No roads." in card


def test_a_folder_without_a_card_gets_a_plain_one(hub, tmp_path):
    folder, _ = hub
    EffSeg(ENCODER, classes=5, **SMALL).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").unlink()
    effseg.push_to_hub(tmp_path / "saved", "somebody/model")
    assert "Not specified." in (folder / "README.md").read_text()


def test_what_cannot_be_uploaded_is_one_line(monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"no such|no config\.json"):
        effseg.push_to_hub(tmp_path / "nothing", "somebody/model")
    EffSeg(ENCODER, classes=5, **SMALL).save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="some body/model"):
        effseg.push_to_hub(tmp_path / "saved", "some body/model")

    def refuse(self, *arguments, **options):
        raise OSError("401\nno token")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(InputError, match=r"somebody/model.*401 no token$"):
        effseg.push_to_hub(tmp_path / "saved", "somebody/model")
