"""The short schedules train peers as they train ours, on the miniature."""

import dataclasses
import json
import os
import signal
import sys

import pytest
import torch

from benchmarks import accuracy_latency, detection_divergence, growth, short
from benchmarks.peer_tasks import PARTS, EffdetPeer, PeerTask, SmpPeer
from benchmarks.report import table
from effseg.training.progress import LineProgress

MODEL = {
    "segmentation": "effseg_lite0",
    "detection": "efficientdet_lite0",
    "joint": "effsegdet_lite0",
}


def recipe(schedule, root):
    """A recipe of two steps with the keys of the shipped one."""

    def source(split):
        arguments = {"root": str(root), "split": split, "train": 8, "val": 3, "size": [64, 96]}
        return {"class_path": "effseg.data.Shapes", "init_args": arguments}

    shapes = {"masks": source("train"), "boxes": source("train"), "coco": source("train")}
    joint = schedule == "joint"
    return {
        "trainer": {"max_epochs": 1, "check_val_every_n_epoch": 2, "accelerator": "cpu"},
        "model": {
            "model": MODEL[schedule],
            "model_args": {"bn_momentum": 0.1, "encoder_name": "tu-tf_efficientnet_lite0"}
            | ({} if schedule == "segmentation" else {"size": 64}),
            **({} if schedule == "segmentation" else {"detection": {"metric": "voc"}}),
            "optim": {"name": "adamw", "lr": 0.001},
            "ema_decay": 0.5,
        },
        "data": {
            "train": shapes if joint else {"voc": source("train")},
            "val": {"voc": source("val"), **({"coco": source("val")} if joint else {})},
            "stages": [{"freeze_encoder": 2}],
            "crop_size": 64,
            "batch_size": 4,
            "eval_batch_size": 3,
            "num_workers": 0,
            "steps": 2,
        },
    }


@pytest.mark.parametrize(
    ("schedule", "network", "scores"),
    [
        ("segmentation", "paper", ("miou", "miou_raw", "boundary_iou")),
        ("segmentation", "FPN", ("miou", "miou_raw", "boundary_iou")),
        ("detection", "effdet", ("ap50", "ap50_11", "ap50_raw")),
        ("joint", "segmentation", ("voc_miou", "coco_miou")),
    ],
)
def test_a_row_of_every_kind(shapes_root, monkeypatch, tmp_path, capsys, schedule, network, scores):
    monkeypatch.setattr(short, "load_recipe", lambda name: recipe(schedule, shapes_root))
    monkeypatch.setattr(short, "keep_freed_memory", lambda: True)  # not for the other tests
    monkeypatch.setattr(short, "DOCS", tmp_path)
    small = dataclasses.replace(short.SCHEDULES[schedule], size=64)  # effdet's has one size only
    monkeypatch.setitem(short.SCHEDULES, schedule, small)
    command = ["short.py", schedule, "train", network, "--weights", str(tmp_path / "weights")]
    command += ["--steps=3", "--crop=96", "--model=effseg_lite1"] if network == "FPN" else []
    monkeypatch.setattr(sys, "argv", command)
    short.main()
    path = tmp_path / f"{short.SCHEDULES[schedule].file}.jsonl"
    (row,) = map(json.loads, path.read_text().splitlines())
    steps, crop = (3, 96) if network == "FPN" else (2, 64)
    assert (row["network"], row["freeze_encoder"]) == (network, 2)
    assert (row["steps"], row["crop"]) == (steps, crop)
    assert row["weights"].endswith("-0-3-crop96-effseg_lite1.pt") == (network == "FPN")
    assert (row["recipe"]["model"]["model"] == "effseg_lite1") == (network == "FPN")
    assert all(0 <= row[score] <= 1 for score in scores)
    assert row["batch"] == (8 if schedule == "joint" else 4)
    state = torch.load(next((tmp_path / "weights").iterdir()), weights_only=True)
    assert any(key.startswith("ema.") for key in state)
    other = row | {"weights": "of-another-length.pt"}
    path.write_text(f"{json.dumps(row | {scores[0]: -1.0})}\n{json.dumps(other)}\n")
    monkeypatch.setattr(sys, "argv", [part.replace("train", "score") for part in command])
    short.main()
    again, kept = map(json.loads, path.read_text().splitlines())
    assert kept == other
    assert again.keys() == row.keys()
    assert [again[key] for key in scores] == pytest.approx([row[key] for key in scores])
    monkeypatch.setattr(sys, "argv", ["short.py", schedule, "table"])
    short.main()
    title, _, cells, _ = path.with_suffix(".md").read_text().splitlines()
    assert network in cells and "GMACs" in title and f"{row[scores[0]]:.4f}" in cells


def test_an_interrupted_run_continues(shapes_root, monkeypatch, tmp_path):
    monkeypatch.setattr(short, "load_recipe", lambda name: recipe("segmentation", shapes_root))
    small = dataclasses.replace(short.SCHEDULES["segmentation"], size=64)
    run = short.Run(small, "effseg", seed=1, steps=3)
    whole = short.train(run, tmp_path / "whole")

    class Interrupted(LineProgress):
        def on_train_batch_end(self, trainer, *args, **kwargs):
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "parts"
    monkeypatch.setattr(short, "LineProgress", Interrupted)
    with pytest.raises(SystemExit):
        short.train(run, folder)
    assert not list(folder.glob("*.pt"))
    monkeypatch.setattr(short, "LineProgress", LineProgress)
    parts = short.train(run, folder)
    assert [path.name for path in folder.iterdir()] == [run.weights]
    assert whole.pop("train_minutes") >= 0
    assert json.dumps(whole) == json.dumps(parts)  # NaN differs from itself
    states = [torch.load(f / run.weights, weights_only=True) for f in (tmp_path / "whole", folder)]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_the_shipped_recipes_have_the_keys_that_are_changed():
    for name, schedule in short.SCHEDULES.items():
        shipped = short.load_recipe(schedule.recipe)
        like = recipe(name, "")
        assert shipped["model"]["model"] == MODEL[name]
        assert shipped.keys() == like.keys()
        weights = shipped["data"].get("weights", {})
        for changes in schedule.networks.values():
            assert changes.get("weights", weights).keys() == weights.keys()
        data = short.build_data(shipped["data"])
        assert data.crop_size == shipped["data"]["crop_size"]


def test_peers_start_on_our_encoder_and_freeze_what_ours_freezes():
    arguments = recipe("segmentation", "")["model"]
    torch.manual_seed(0)
    ours = PeerTask("effseg", **arguments).model
    torch.manual_seed(0)
    peer = PeerTask("FPN", **arguments).model
    assert isinstance(peer, SmpPeer)
    for a, b in zip(ours.encoder.parameters(), peer.encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    arguments = recipe("detection", "")["model"]
    torch.manual_seed(0)
    ours = PeerTask("efficientdet", **arguments).model
    torch.manual_seed(0)
    effdet = PeerTask("effdet", **arguments).model
    assert isinstance(effdet, EffdetPeer)
    ours.freeze_encoder(2)
    effdet.freeze_encoder(2)
    trained = {n.removeprefix("model."): p for n, p in ours.encoder.named_parameters()}
    theirs = dict(effdet.encoder.named_parameters())
    assert {n for n, p in trained.items() if p.requires_grad} == {
        n for n, p in theirs.items() if p.requires_grad
    }
    assert not all(p.requires_grad for p in theirs.values())
    assert not effdet.encoder.conv_stem.training and effdet.encoder.blocks[-1].training
    for name, parameter in theirs.items():
        assert torch.equal(parameter, trained[name])


def test_from_the_same_start_the_detectors_have_the_same_loss(shapes_root):
    arguments = recipe("detection", shapes_root)
    data = short.build_data(arguments["data"])
    rows = list(detection_divergence.measure(data, arguments["model"], 2, [1, 2]))
    assert [row["step"] for row in rows] == [1, 2]
    losses = rows[0]["losses"]
    assert losses["ours"] == pytest.approx(losses["effdet"], rel=1e-4)
    assert losses["perturbed"] == pytest.approx(losses["effdet"], rel=1e-4)
    assert 0 < rows[0]["apart"]["ours"] < 1e-3 and 0 < rows[0]["apart"]["perturbed"] < 1e-3
    assert "ours from effdet" in table(rows, detection_divergence.COLUMNS)


def test_growth_measures_every_point_of_a_panel():
    steps = {"a": {1: lambda: None, 2: lambda: None}, "b": {1: lambda: None}}
    points = growth.measure(steps, rounds=1)
    assert {line: list(values) for line, values in points.items()} == {"a": [1, 2], "b": [1]}
    boxes = growth.by_boxes()
    assert len(boxes["post-processing, 512², objects"][5]()[0]["boxes"]) >= 5


def test_accuracy_and_latency_of_the_recipe_as_it_is(tmp_path):
    """Neither of other steps or crops nor of an earlier recipe, whose rows name no weights."""
    names = {"effseg": [("0", 0.5), ("1", 0.7), ("0-crop320", 0.9)], "FPN": [("0", 0.4)]}
    rows = [
        {"network": name, "seed": int(end[0]), "weights": f"voc2012_lite0-{name}-{end}.pt"}
        | {"miou": miou}
        for name, runs in names.items()
        for end, miou in runs
    ]
    rows.append({"network": "deep-heads", "seed": 0, "miou": 0.3})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    points = accuracy_latency.measure(path, size=64, rounds=1)
    miou = {name: point["miou"] for name, point in points.items()}
    assert miou == pytest.approx({"effseg": 0.6, "FPN": 0.4})
    assert all(point["ms"] > 0 for point in points.values())


@pytest.mark.parametrize(
    ("network", "weight"), [("effseg", 0.4), ("no-auxiliary", 0.0), ("context", 0.0)]
)
def test_the_recipe_s_network_alone_has_auxiliary_losses(network, weight):
    """The recipe's own keys stay when the schedule adds its own."""
    run = short.Run(short.SCHEDULES["segmentation"], network)
    model = run.recipe()["model"]
    model["model_args"]["encoder_weights"] = None
    task = PeerTask(network, **model)
    assert task.segmentation.boundary and task.segmentation.auxiliary == weight
    assert (task.criterion.auxiliary is not None) == (weight > 0)
    given = {part: task.model.arguments[part] for part in PARTS}
    assert all(given.values()) == (network != "context")
