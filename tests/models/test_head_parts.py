"""What our per-pixel head adds to the paper's: context pyramid and refinement."""

import pytest
import torch
import torch.nn.functional as F

import effseg
from effseg import EffSeg
from effseg.models.context import Refinement

SMALL = {
    "encoder_weights": None,
    "decoder_channels": 16,
    "decoder_layers": 1,
    "head_channels": 16,
    "head_layers": 1,
    "classes": 3,
}
ENCODERS = ["tu-test_efficientnet.r160_in1k", "resnet18"]


def model(encoder=ENCODERS[0], **arguments):
    torch.manual_seed(0)
    network = EffSeg(encoder, **SMALL | arguments)
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    return network.eval()


def fill(module):
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.2)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_training_of_the_logits_starts_from_the_plain_ones(encoder):
    network = model(encoder, head_refinement=True)
    plain = model(encoder)
    plain.load_state_dict(network.state_dict(), strict=False)
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        coarse = plain.outputs(x, coarse=True).masks
        twice = F.interpolate(coarse, scale_factor=2.0, mode="bilinear")
        assert torch.equal(network.outputs(x, coarse=True).masks, twice)
        fill(network.segmentation_head.refinement.correct)
        assert not torch.allclose(network.outputs(x, coarse=True).masks, twice, atol=1e-2)


def test_refinement_corrects_where_the_finer_map_differs():
    torch.manual_seed(0)
    refine = Refinement(4, 3, activation="silu").eval()
    fill(refine.correct)
    logits, detail = torch.randn(1, 3, 8, 8), torch.zeros(1, 4, 16, 16)
    with torch.no_grad():
        before = refine(logits, detail)
        detail[..., 8, 4] = 3.0
        changed = (refine(logits, detail) - before).abs().sum(1)[0] > 1e-6
    rows, columns = torch.nonzero(changed, as_tuple=True)
    assert changed[8, 4]
    assert (rows - 8).abs().max() <= 1 and (columns - 4).abs().max() <= 1


def test_pyramid_reaches_features_and_logits():
    network = model(head_pyramid=True)
    head = network.segmentation_head
    plain = model()
    plain.load_state_dict(network.state_dict(), strict=False)
    x = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        features = network.encode(x)
        p2 = network.decoder(features, [2])[0]
        context, logits = head.pyramid([features[4], features[5]])
        assert context.shape == (1, 16, 8, 6) and not logits.any(), "the classifier starts at zero"
        fill(head.pyramid.classifier)
        _, logits = head.pyramid([features[4], features[5]])
        up = [F.interpolate(t, size=(32, 24), mode="bilinear") for t in (context, logits)]
        expected = head.classifier(head.convs(p2 + up[0])) + up[1]
        torch.testing.assert_close(network.outputs(x, coarse=True).masks, expected)


@pytest.mark.parametrize("height", [128, 97])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_pyramid_averages_over_the_image_and_not_over_its_padding(encoder, height):
    network = model(encoder, head_pyramid=True)
    pyramid = network.segmentation_head.pyramid
    batch = torch.zeros(2, 3, height, 128)
    batch[0, :, :64, :96] = torch.randn(3, 64, 96)
    batch[1] = torch.randn(3, height, 128)
    sizes = torch.tensor([[64, 96], [height, 128]])
    seen = []
    hook = pyramid.mean.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        last = network.encode(batch)[-1]
        network(batch, sizes=sizes)
    hook.remove()
    expected = torch.stack([last[0, :, :2, :3].mean((1, 2)), last[1].mean((1, 2))])
    torch.testing.assert_close(seen[0][..., 0, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "levels"), [(5, (2, 7)), (4, (2, 4)), (3, (2, 5)), (3, (3, 5)), (5, (5, 7))]
)
def test_every_part_of_the_head_at_every_depth(depth, levels):
    network = model(
        encoder_depth=depth,
        decoder_levels=levels,
        head_context=True,
        head_pyramid=True,
        head_refinement=True,
    ).train()
    with torch.no_grad():
        network.segmentation_head.refinement.correct.weight.normal_()
    logits = network(torch.randn(2, 3, 128, 96))
    assert logits.shape == (2, 3, 128, 96)
    logits.square().mean().backward()
    missing = [n for n, p in network.named_parameters() if p.grad is None]
    assert not missing


def test_refinement_needs_a_map_below_the_finest_level():
    with pytest.raises(effseg.InputError, match=r"head_refinement=True: .* level 1"):
        EffSeg("mit_b0", **SMALL | {"head_refinement": True})


def test_cost_for_the_lite_model():
    plain, ours = (
        effseg.summary("effseg_lite0", 512, **dict.fromkeys(parts, True))
        for parts in (("head_context",), ("head_context", "head_pyramid", "head_refinement"))
    )
    added = (ours["macs"] - plain["macs"]) / 1e9
    assert 0.3 < added < 0.5 and ours["params"] - plain["params"] < 200_000
    assert ours["parts"]["encoder"] == plain["parts"]["encoder"]
