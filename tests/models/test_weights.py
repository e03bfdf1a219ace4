"""Weights of effdet: equal outputs, both directions, and the trunk into a segmenter."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

import effseg
from effseg import InputError
from effseg.models.scaling import SCALING
from effseg.models.weights import read_checkpoint

effdet = pytest.importorskip("effdet")

SIZES = ["d0", "d1", "d2", "lite0", "lite2"]
SLOW = ["d3", "d4", "d7x"]


def reference(size, classes=90, image_size=None):
    """Return an effdet model whose every tensor is random, statistics and fusion weights too."""
    torch.manual_seed(0)
    config = effdet.get_efficientdet_config(f"tf_efficientdet_{size}")
    config.num_classes = classes
    if image_size:
        config.image_size = (image_size, image_size)
    model = effdet.EfficientDet(config, pretrained_backbone=False).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1, generator=generator)
        elif name.endswith(("running_var", "edge_weights")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("predict.conv_pw.weight"):
            tensor.mul_(10)  # spread the scores: among near ties rounding would choose the order
    return model


def outputs(model, images):
    """Return effdet's per-level maps in this library's order."""
    with torch.no_grad():
        classes, boxes = model(images)
    k = model.config.num_classes
    flat = [
        torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), -1, values) for x in maps], 1)
        for maps, values in ((classes, k), (boxes, 4))
    ]
    return tuple(flat)


def relative(mine, theirs):
    return float((mine - theirs).abs().max() / theirs.abs().max())


def check_outputs(size, side):
    theirs = reference(size, image_size=side)
    mine = effseg.create_model(f"efficientdet_{size}").eval()
    assert effseg.load_effdet(mine, theirs.state_dict()) == []
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        actual = mine(images)
    for a, b in zip(actual, outputs(theirs, images), strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_outputs_equal_effdet(size):
    check_outputs(size, min(SCALING[size].size, 384))


@pytest.mark.slow
@pytest.mark.parametrize("size", [*SIZES, *SLOW])
def test_outputs_equal_effdet_at_the_default_size(size):
    check_outputs(size, SCALING[size].size)


@pytest.mark.parametrize(("size", "side"), [("d0", 512), ("lite0", 320)])
def test_detections_equal_effdet(size, side):
    theirs = reference(size, image_size=side)
    mine = effseg.create_model(f"efficientdet_{size}").eval()
    effseg.load_effdet(mine, theirs.state_dict())
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    info = {"img_scale": torch.ones(2), "img_size": torch.full((2, 2), float(side))}
    with torch.no_grad():
        expected = effdet.DetBenchPredict(theirs)(images, info)
    for actual, rows in zip(mine.detect(images), expected, strict=True):
        assert len(actual["boxes"]) == 100
        torch.testing.assert_close(actual["scores"], rows[:, 4], rtol=1e-4, atol=1e-6)
        # Rounding may exchange two detections whose scores are all but the same.
        apart = (actual["boxes"][:, None] - rows[:, :4]).abs().amax(-1)
        apart[actual["labels"][:, None] + 1 != rows[:, 5]] = 1e6
        matched = rows[linear_sum_assignment(apart)[1]]  # boxes of no area come several times
        torch.testing.assert_close(actual["boxes"], matched[:, :4], rtol=1e-4, atol=2e-2)
        torch.testing.assert_close(actual["scores"], matched[:, 4], rtol=1e-4, atol=1e-6)
        assert torch.equal(actual["labels"] + 1, matched[:, 5].long())


def test_anchors_equal_effdet():
    for size, side in (("d0", 512), ("lite0", 320), ("d7", 640)):
        config = effdet.get_efficientdet_config(f"tf_efficientdet_{size}")
        config.image_size = (side, side)
        expected = effdet.anchors.Anchors.from_config(config).boxes[:, [1, 0, 3, 2]]
        with torch.device("meta"):
            model = effseg.create_model(f"efficientdet_{size}")
        anchors = model.anchors((side, side))
        torch.testing.assert_close(anchors, expected, rtol=1e-6, atol=1e-4)


def test_effdet_names_round_trip():
    theirs = reference("lite0").state_dict()
    model = effseg.create_model("efficientdet_lite0")
    effseg.load_effdet(model, theirs)
    back = effseg.to_effdet(model)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.items())


def test_wrapped_and_level_first_checkpoints_load():
    theirs = reference("lite0")
    bench = effdet.DetBenchPredict(theirs)
    model = effseg.create_model("efficientdet_lite0").eval()
    effseg.load_effdet(model, bench.state_dict())
    theirs.toggle_head_bn_level_first()
    again = effseg.create_model("efficientdet_lite0").eval()
    effseg.load_effdet(again, bench.state_dict())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_another_class_count_starts_the_predictor_fresh():
    model = effseg.create_model("efficientdet_lite0", classes=20)
    before = model.detection_head.class_net.predict.pointwise.bias.clone()
    fresh = effseg.load_effdet(model, reference("lite0").state_dict())
    assert fresh == [
        f"detection_head.class_net.predict.pointwise.{name}" for name in ("weight", "bias")
    ]
    assert torch.equal(model.detection_head.class_net.predict.pointwise.bias, before)
    torch.testing.assert_close(before, torch.full_like(before, -4.595), atol=1e-3, rtol=0)


@pytest.mark.parametrize("face", [effseg.EfficientDet, effseg.EffSegDet])
def test_tensors_that_no_detector_has_are_named_as_fresh(face):
    detector = effseg.create_model("efficientdet_lite0", classes=2)
    name = {effseg.EfficientDet: "efficientdet_lite0", effseg.EffSegDet: "effsegdet_lite0"}[face]
    counts = {"classes": 2} if face is effseg.EfficientDet else {"det_classes": 2}
    model = effseg.create_model(name, decoder_levels=(2, 7), detection_levels=(3, 7), **counts)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fresh = effseg.load_effdet(model, effseg.to_effdet(detector))
    after = model.state_dict()
    assert {k for k in after if not torch.equal(after[k], before[k])} <= after.keys() - set(fresh)
    assert "decoder.cells.0.nodes.4.conv.depthwise.weight" in fresh, "the node of P2"
    assert any(key.startswith("segmentation_head.") for key in fresh) == (len(model.tasks) == 2)
    assert not any(key.startswith(("encoder.", "detection_head.")) for key in fresh)
    with pytest.raises(InputError, match=r"on levels \(2, 7\), expected a detector"):
        effseg.to_effdet(model)


def test_every_missing_and_unexpected_key_is_named():
    state = reference("lite0").state_dict()
    removed = [key for key in state if "box_net.predict" in key]
    for key in removed:
        del state[key]
    state["class_net.extra"] = torch.zeros(1)
    model = effseg.create_model("efficientdet_lite0")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        effseg.load_effdet(model, state)
    assert all(key in str(error.value) for key in [*removed, "class_net.extra"])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(InputError, match="does not fit"):
        effseg.load_effdet(
            effseg.create_model("efficientdet_lite0", decoder_channels=88),
            reference("lite0").state_dict(),
        )


@pytest.mark.parametrize("size", ["lite0", "d0"])
def test_trunk_loads_encoder_and_common_nodes(size):
    theirs = reference(size).state_dict()
    model = effseg.create_model(f"effseg_{size}")
    start = {k: v.clone() for k, v in model.state_dict().items()}
    fresh = effseg.load_effdet_trunk(model, theirs)
    ours = model.state_dict()
    assert all(torch.equal(ours[key], start[key]) for key in fresh)
    assert not any(key.startswith("encoder.") for key in fresh)
    assert all(not key.startswith("segmentation_head.") or key in fresh for key in ours)
    # P2–P7 numbers its nodes down P6 … P2 (0 … 4), then up P3 … P7 (5 … 9); P3–P7 without P2.
    same = {0: 0, 1: 1, 2: 2, 3: 3, 6: 4, 7: 5, 8: 6, 9: 7}
    for mine, node in same.items():
        key = f"decoder.cells.0.nodes.{mine}.conv.pointwise.weight"
        assert key not in fresh
        name = f"fpn.cell.0.fnode.{node}.after_combine.conv.conv_pw.weight"
        assert torch.equal(ours[key], theirs[name]), mine
    for mine in (4, 5):
        assert f"decoder.cells.0.nodes.{mine}.conv.pointwise.weight" in fresh
    # P4 from the encoder: map 1 of the detector, map 2 of the segmenter, input 0 of both nodes.
    key, name = "decoder.cells.0.nodes.2.laterals.0.0.weight", "fpn.cell.0.fnode.2.combine."
    assert torch.equal(ours[key], theirs[name + "resample.1.conv.conv.weight"])
    assert torch.equal(ours["decoder.extra.0.weight"], theirs["fpn.resample.3.conv.conv.weight"])


def test_trunk_of_another_width_loads_only_the_encoder():
    model = effseg.create_model("effseg_lite0", decoder_channels=32)
    fresh = effseg.load_effdet_trunk(model, reference("lite0").state_dict())
    assert "decoder.cells.0.nodes.0.conv.pointwise.weight" in fresh
    assert not any(key.startswith("encoder.") for key in fresh)
    with pytest.raises(InputError, match=r"encoder.*expected the same encoder"):
        effseg.load_effdet_trunk(
            effseg.create_model("effseg_lite1"), reference("lite0").state_dict()
        )


def test_checkpoint_files(tmp_path):
    state = {"a": torch.ones(2)}
    torch.save({"state_dict": {"a": torch.zeros(2)}, "state_dict_ema": state}, tmp_path / "c.pth")
    assert torch.equal(read_checkpoint(tmp_path / "c.pth")["a"], torch.ones(2))
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(InputError, match=r"none\.pth: contains no state dict"):
        read_checkpoint(tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "c.pth").read_bytes()[:300])
    with pytest.raises(InputError, match=r"cut\.pth: not a checkpoint"):
        read_checkpoint(tmp_path / "cut.pth")
    with pytest.raises(InputError, match=r"absent\.pth: no such file"):
        read_checkpoint(tmp_path / "absent.pth")
