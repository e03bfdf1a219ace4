"""Auxiliary losses on BiFPN's maps: their values, their images, and what a trained model keeps."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from effseg import EfficientDet, EffSeg, InputError
from effseg.losses import Criterion
from effseg.losses.joint import select
from tests.losses.test_criterion import MIXED, SIZE, boxes, images, mask, tiny
from tests.training.runs import fit, logged

ENCODER = "tu-test_efficientnet.r160_in1k"


def top_down_maps(model, x, call):
    """Return what `call` returns, and the last cell's first maps at P3, P4 and P5."""
    seen, hooks = {}, []
    level_of = {
        node: model.decoder.graph[int(name)].level
        for name, node in model.decoder.cells[-1].nodes.items()
    }

    def keep(node, _, y):
        seen.setdefault(level_of[node], y)

    for node in level_of:
        hooks.append(node.register_forward_hook(keep))
    result = call(x)
    for hook in hooks:
        hook.remove()
    return result, [seen[level] for level in (3, 4, 5)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_are_those_of_classifiers_on_the_top_down_maps(checkpointing):
    """A batch in which some images have masks, some boxes: P3 to P5 also have bottom-up maps."""
    model = tiny()
    if checkpointing:
        model.decoder.train()  # which alone checkpoints; its BatchNorms stay as they are
        for module in model.decoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        model.set_grad_checkpointing()
    criterion = Criterion(model, auxiliary=0.4)
    losses, maps = top_down_maps(model, images(), lambda x: criterion(x, MIXED))
    plain = Criterion(model)(images(), MIXED)
    masks = torch.stack([mask(), mask(1)])[:, 2::4, 2::4].long()
    values = []
    for classify, x in zip(criterion.auxiliary.classifiers, maps, strict=True):
        logits = F.conv2d(x[[0, 2]], classify.weight, classify.bias)
        logits = F.interpolate(logits, size=(SIZE[0] // 4, SIZE[1] // 4), mode="bilinear")
        values.append(F.cross_entropy(logits, masks, ignore_index=255))
    expected = torch.stack(values).mean()
    torch.testing.assert_close(losses["auxiliary"], expected, rtol=1e-4, atol=1e-5)
    for name in ("segmentation", "classes", "boxes"):
        torch.testing.assert_close(losses[name], plain[name], rtol=1e-4, atol=1e-5)
    total = plain["loss"] + 0.4 * expected
    torch.testing.assert_close(losses["loss"], total, rtol=1e-4, atol=1e-5)


def test_they_start_in_the_network_s_dtype():
    criterion = Criterion(tiny().double(), auxiliary=0.4)
    assert {p.dtype for p in criterion.parameters()} == {torch.float64}
    assert criterion(images().double(), MIXED)["auxiliary"].dtype == torch.float64


def test_they_train_the_classifiers_and_the_maps():
    model = tiny()
    criterion = Criterion(model, weights={"segmentation": 1, "detection": 0}, auxiliary=0.4)
    criterion(images(), MIXED)["auxiliary"].backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in criterion.parameters())
    reached = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {"encoder", "decoder"}


def test_a_batch_without_masks_has_none():
    criterion = Criterion(tiny(), auxiliary=0.4)
    losses = criterion(images(1), [boxes()])
    assert "auxiliary" not in losses and losses["loss"].isfinite()


def test_ignored_pixels_add_nothing():
    criterion = Criterion(tiny(), auxiliary=0.4)
    nothing = torch.full(SIZE, 255, dtype=torch.uint8)
    losses = criterion(images(1), [{"mask": nothing}])
    assert float(losses["auxiliary"].detach()) == float(losses["loss"].detach()) == 0
    both = criterion(images(2), [{"mask": nothing}, {"mask": mask()}])["auxiliary"]
    alone = criterion(images(2)[1:], [{"mask": mask()}])["auxiliary"]
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)


def test_a_part_of_a_batch_has_its_own():
    criterion = Criterion(tiny(), auxiliary=0.4)
    output, labels = criterion.run(images(), MIXED)
    part = select(output, labels, torch.tensor([False, True, True]))
    actual = criterion.compare(*part, over_processes=False)["auxiliary"]
    expected = criterion(images()[2:], MIXED[2:])["auxiliary"]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_network_is_initialised_as_without():
    torch.manual_seed(0)
    model = EffSeg(ENCODER, encoder_weights=None, classes=3)
    before = model.state_dict()
    torch.manual_seed(0)
    again = EffSeg(ENCODER, encoder_weights=None, classes=3)
    Criterion(again, auxiliary=0.4)
    assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "levels"),
    [({}, (3, 4, 5)), ({"decoder_levels": (3, 7)}, (4, 5)), ({"decoder_levels": (2, 4)}, (3,))],
)
def test_levels(arguments, levels):
    model = EffSeg(ENCODER, encoder_weights=None, classes=3, **arguments)
    criterion = Criterion(model, auxiliary=1.0)
    assert criterion.auxiliary.levels == levels
    assert float(criterion(images(1), mask(0)[None].clamp(max=2))["auxiliary"].detach()) > 0


@pytest.mark.parametrize(
    ("model", "weight", "words"),
    [
        (lambda: EfficientDet(ENCODER, encoder_weights=None), 0.4, "has no masks"),
        (lambda: EffSeg(ENCODER, encoder_weights=None, classes=2), -0.4, "auxiliary=-0.4"),
        (lambda: EffSeg(ENCODER, encoder_weights=None, classes=2), float("nan"), "auxiliary=nan"),
        (
            lambda: EffSeg(ENCODER, encoder_weights=None, classes=2, decoder_levels=(2, 3)),
            0.4,
            "not 2 to 3",
        ),
    ],
)
def test_what_cannot_be_is_named(model, weight, words):
    with pytest.raises(InputError, match=words):
        Criterion(model(), auxiliary=weight)


def test_a_run_trains_them_and_its_model_has_none(effseg, shapes_root, tmp_path):
    run = tmp_path / "run"
    key = "--model.segmentation.auxiliary"
    code, _, err = fit(effseg, shapes_root, run, f"{key}=0.4", "--trainer.max_epochs=1")
    assert code == 0, err
    assert len(logged(run, "train/auxiliary")) == 2
    checkpoint = run / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["state_dict"]["criterion.auxiliary.classifiers.0.weight"].shape == (7, 16, 1, 1)
    # Other settings of the loss score the same weights, but do not go on from this checkpoint.
    scores = []
    for weight in (0.4, 0.0):
        code, out, err = effseg(
            "validate",
            f"--config={run / 'config.yaml'}",
            f"--ckpt_path={checkpoint}",
            f"{key}={weight}",
        )
        assert code == 0, err
        scores.append(out)
    assert scores[0] == scores[1]
    tensors = load_file(run / "model" / "model.safetensors")
    assert tensors and not [name for name in tensors if "auxiliary" in name]
    resumed = (f"--ckpt_path={checkpoint}", "--resume-changed", "--trainer.max_epochs=2")
    code, _, err = fit(effseg, shapes_root, tmp_path / "on", *resumed)
    assert code == 2 and "criterion.auxiliary" in err
