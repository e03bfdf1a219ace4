"""One trunk, two heads: each alone costs and predicts the same as a model of its task."""

import pytest
import torch

import effseg
from effseg import EffSegDet, InputError

TINY = {
    "encoder_weights": None,
    "decoder_channels": 16,
    "decoder_layers": 2,
    "head_channels": 16,
    "head_layers": 1,
    "detection_layers": 1,
    "seg_classes": 4,
    "det_classes": 3,
}
MASKS, BOXES = ("segmentation",), ("detection",)


HEAD = ("head_context", "head_pyramid", "head_refinement")


def tiny(**kwargs):
    torch.manual_seed(0)
    model = EffSegDet("tu-test_efficientnet.r160_in1k", **TINY | kwargs)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.02)  # nothing is left at its initial zero
    return model


@pytest.mark.parametrize("size", [(128, 128), (97, 33), (100, 140)])
@pytest.mark.parametrize("context", [False, True])
def test_outputs_at_any_size_and_of_one_head(size, context):
    model = tiny(**dict.fromkeys(HEAD, context)).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        both = model(x)
        assert both.masks.shape == (2, 4, *size)
        count = len(model.anchors(size))
        assert both.detections.class_logits.shape == (2, count, 3)
        assert both.detections.box_codes.shape == (2, count, 4)
        masks, boxes = model(x, tasks=MASKS), model(x, tasks=BOXES)
        small = model.outputs(torch.zeros(1, 3, 64, 96), coarse=True).masks
    assert small.shape == (1, 4, 32, 48) if context else (1, 4, 16, 24)
    assert masks.detections is None and boxes.masks is None
    assert torch.equal(masks.masks, both.masks)
    assert torch.equal(boxes.detections.class_logits, both.detections.class_logits)


@pytest.mark.parametrize("context", [False, True])
def test_exported_models_give_the_same(context, tmp_path):
    model = tiny(**dict.fromkeys(HEAD, context), size=96).eval()
    model.config["_class_names"] = ["background", "a", "b", "c"]
    model.config["_palette"] = [[0, 0, 0], [1, 2, 3], [4, 5, 6], [7, 8, 9]]
    x = torch.randn(2, 3, 96, 64)
    segmenter, detector = model.segmentation_model(), model.detection_model()
    assert isinstance(segmenter, effseg.EffSeg) and isinstance(detector, effseg.EfficientDet)
    with torch.no_grad():
        both = model(x)
        assert torch.equal(segmenter(x), both.masks)
        assert torch.equal(detector(x).class_logits, both.detections.class_logits)
        assert torch.equal(detector(x).box_codes, both.detections.box_codes)
        for exported in (segmenter, detector, model):
            exported.save_pretrained(tmp_path / exported.name)
            loaded = effseg.from_pretrained(tmp_path / exported.name).eval()
            assert type(loaded) is type(exported)
            assert loaded.config["_class_names"][1] == "a"
        assert torch.equal(loaded(x).masks, both.masks)
    assert detector.size == 96
    for actual, expected in zip(detector.detect(x), model.detect(x), strict=True):
        assert torch.equal(actual["boxes"], expected["boxes"])
        assert torch.equal(actual["scores"], expected["scores"])


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_gradients_without_a_task_equal_those_of_a_model_without_its_head(task):
    model = tiny(**dict.fromkeys(HEAD, True)).train()
    alone = model.segmentation_model() if task == "segmentation" else model.detection_model()
    x = torch.randn(2, 3, 128, 128)
    other = "segmentation" if task == "detection" else "detection"

    def loss(output):
        if task == "segmentation":
            return (output.masks if isinstance(output, tuple) else output).square().mean()
        output = getattr(output, "detections", output)
        return output.class_logits.square().mean() + output.box_codes.square().mean()

    loss(model(x, tasks=(task,))).backward()
    loss(alone(x)).backward()
    parameters = dict(model.named_parameters())
    for name, p in alone.named_parameters():
        assert p.grad is not None, name
        assert torch.equal(parameters[name].grad, p.grad), name
    rest = set(parameters) - {name for name, _ in alone.named_parameters()}
    assert any(name.startswith(f"{other}_head") for name in rest)
    assert all(parameters[name].grad is None for name in rest), "no gradient, not one of zeros"


def test_heads_on_some_images_only():
    model = tiny().eval()
    x = torch.randn(3, 3, 64, 64)
    rows = {"segmentation": torch.tensor([2]), "detection": torch.tensor([0, 1])}
    with torch.no_grad():
        part, both = model.outputs(x, rows=rows), model(x)
    torch.testing.assert_close(part.masks, both.masks[2:])
    torch.testing.assert_close(part.detections.class_logits, both.detections.class_logits[:2])


def test_cost_of_the_family():
    both = effseg.summary("effsegdet_d4", 512)
    masks = effseg.summary("effseg_d4", 512)["macs"]
    boxes = effseg.summary(
        "efficientdet_d4", 512, classes=20, decoder_channels=128, decoder_layers=3
    )["macs"]
    assert both["macs"] <= 0.65 * (masks + boxes)
    assert set(both["parts"]) == {"encoder", "decoder", "segmentation_head", "detection_head"}


def test_a_detectors_trunk_reaches_the_joint_model():
    detector = effseg.create_model("efficientdet_lite0", classes=5)
    both = effseg.create_model("effsegdet_lite0")
    fresh = effseg.load_effdet_trunk(both, effseg.to_effdet(detector))
    assert not any(name.startswith("encoder.") for name in fresh)
    key = "decoder.cells.1.nodes.{}.conv.depthwise.weight"
    ours, theirs = both.state_dict(), detector.state_dict()
    assert torch.equal(ours[key.format(8)], theirs[key.format(6)])  # P6's bottom-up node


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tiny()(torch.zeros(1, 3, 64, 64), tasks=()), "expected any of"),
        (lambda: tiny()(torch.zeros(1, 3, 64, 64), tasks=("depth",)), "depth"),
        (lambda: tiny(detection_levels=(1, 7)), "expected levels of 2 … 7"),
        (lambda: tiny(det_classes=0), "classes=0"),
        (lambda: effseg.create_model("effsegdet_d0", classes=3), "seg_classes, det_classes"),
        (lambda: effseg.create_model("effseg_d0", det_classes=3), "det_classes=3"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("efficientdet_d0", "head_context", True),
        ("efficientdet_d0", "head_channels", 64),
        ("efficientdet_d0", "seg_classes", 3),
        ("efficientdet_d0", "activation", "sigmoid"),
        ("efficientdet_d0", "aux_params", {"classes": 2}),
        ("effseg_d0", "det_classes", 3),
        ("effseg_d0", "detection_levels", (3, 7)),
        ("effseg_d0", "anchor_shapes", ((1.0, 1.0),)),
        ("effseg_d0", "anchor_scale", 5.0),
    ],
)
def test_an_argument_of_the_missing_head_is_refused(name, argument, value):
    with pytest.raises(InputError, match=argument) as caught:
        effseg.create_model(name, **{argument: value})
    assert "\n" not in str(caught.value)
    face = effseg.EffSeg if name.startswith("effseg_") else effseg.EfficientDet
    with pytest.raises(InputError, match=f"{argument}=.*{face.__name__} has no head for"):
        face("resnet18", encoder_weights=None, **{argument: value})


def test_the_joint_network_has_no_logits_of_the_image():
    with pytest.raises(InputError, match="aux_params: EffSegDet"):
        effseg.EffSegDet("resnet18", encoder_weights=None, aux_params={"classes": 2})


def test_defaults_of_the_missing_head_are_accepted_and_loaded(tmp_path):
    arguments = {"encoder_weights": None, "decoder_channels": 16}
    encoder, shapes = "tu-test_efficientnet.r160_in1k", [[1, 1], [1.4, 0.7], [0.7, 1.4]]
    masks = effseg.EffSeg(encoder, size=512, anchor_shapes=shapes, **arguments)
    boxes = effseg.EfficientDet(encoder, head_channels=256, head_context=False, **arguments)
    for model in (masks, boxes):
        model.save_pretrained(tmp_path / model.name)
        assert type(effseg.from_pretrained(tmp_path / model.name)) is type(model)


def test_frozen_encoder_stays_in_evaluation_mode():
    model = tiny()
    model.freeze_encoder()
    model.train()
    before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    model(torch.randn(2, 3, 128, 128)).masks.sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    for key, value in model.encoder.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert model.decoder.training
    model.unfreeze_encoder()
    assert model.encoder.training and all(p.requires_grad for p in model.encoder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [MASKS, BOXES, MASKS + BOXES])
def test_compiles_to_one_graph(tasks):
    model = tiny().eval()
    x = torch.randn(1, 3, 96, 64)

    def run(x):
        output = model(x, tasks=tasks)
        return output.masks if output.masks is not None else output.detections.class_logits

    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(run, fullgraph=True)(x), run(x), rtol=1e-3, atol=1e-3
        )
