"""BiFPN against hand-made graphs, fusions and pools."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn
from torch._dynamo.testing import CompileCounter

from effseg.errors import InputError
from effseg.models.bifpn import FUSION_EPS, BiFPN, Fuse, bifpn_nodes, needed_nodes
from effseg.models.faces import EffSeg
from effseg.models.layers import downsample, upsample_like

CHANNELS = [3, 8, 12, 16, 20, 24]


def pyramid(size=64, channels=CHANNELS, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, width, size // 2**level, size // 2**level, generator=generator)
        for level, width in enumerate(channels)
    ]


def listed(low, high):
    return [(node.level, list(node.inputs)) for node in bifpn_nodes(low, high)]


# The graph


def test_nodes_p3_to_p7_are_the_reference():
    assert listed(3, 7) == [
        (6, [3, 4]),
        (5, [2, 5]),
        (4, [1, 6]),
        (3, [0, 7]),
        (4, [1, 7, 8]),
        (5, [2, 6, 9]),
        (6, [3, 5, 10]),
        (7, [4, 11]),
    ]


def test_nodes_p2_to_p7():
    assert listed(2, 7) == [
        (6, [4, 5]),
        (5, [3, 6]),
        (4, [2, 7]),
        (3, [1, 8]),
        (2, [0, 9]),
        (3, [1, 9, 10]),
        (4, [2, 8, 11]),
        (5, [3, 7, 12]),
        (6, [4, 6, 13]),
        (7, [5, 14]),
    ]


@pytest.mark.parametrize(("low", "high"), [(1, 2), (2, 5), (3, 8), (2, 9)])
def test_nodes_follow_the_rule(low, high):
    nodes = bifpn_nodes(low, high)
    count = high - low + 1
    assert len(nodes) == 2 * (high - low)
    level_of = {i: low + i for i in range(count)} | {
        count + i: node.level for i, node in enumerate(nodes)
    }
    for i, node in enumerate(nodes):
        assert all(j < count + i for j in node.inputs)
        assert all(abs(level_of[j] - node.level) <= 1 for j in node.inputs)
        assert node.level - low in node.inputs
        assert len(node.inputs) == (3 if i >= high - low and node.level < high else 2)
        assert level_of[node.inputs[0]] == node.level
    assert {node.level for node in nodes} == set(range(low, high + 1))


def test_finest_level_needs_the_top_down_path_only():
    nodes = bifpn_nodes(2, 7)
    assert needed_nodes(nodes, [2]) == (set(range(5)), set(range(2, 8)))
    assert needed_nodes(nodes, range(2, 8)) == (set(range(10)), set(range(2, 8)))


# Fusion


def fused(kind, weights, values, channels=None):
    fuse = Fuse(len(values), kind, channels)
    if weights is not None:
        fuse.weight.data = torch.tensor(weights).view_as(fuse.weight)
    return fuse([torch.tensor(v).view(1, -1, 1, 1) for v in values]).flatten()


def test_fast_by_hand():
    expected = (0.5 * 10 + 1.5 * 20 + 0 * 30) / (0.5 + 1.5 + 1e-4)
    actual = fused("fast", [0.5, 1.5, -2.0], [[10.0], [20.0], [30.0]])
    torch.testing.assert_close(actual, torch.tensor([expected]))


def test_softmax_by_hand():
    a, b = torch.tensor(0.5).exp(), torch.tensor(-1.0).exp()
    actual = fused("softmax", [0.5, -1.0], [[10.0], [20.0]])
    torch.testing.assert_close(actual, ((10 * a + 20 * b) / (a + b)).view(1))


def test_unbounded_by_hand():
    assert fused("unbounded", [0.5, -2.0], [[10.0], [20.0]]).tolist() == [0.5 * 10 - 2 * 20]


def test_sum_by_hand_has_no_parameters():
    assert fused("sum", None, [[1.0], [2.0], [4.0]]).tolist() == [7.0]
    assert list(Fuse(3, "sum").parameters()) == []


@pytest.mark.parametrize("kind", ["fast", "softmax", "unbounded"])
def test_per_channel_weighs_each_channel_alone(kind):
    weights = [[1.0, 0.25], [3.0, 0.5]]
    values = [[10.0, 20.0], [30.0, 40.0]]
    actual = fused(kind, weights, values, channels=2)
    for channel in range(2):
        alone = fused(kind, [w[channel] for w in weights], [[v[channel]] for v in values])
        torch.testing.assert_close(actual[channel], alone[0])


@pytest.mark.parametrize("kind", ["fast", "softmax", "unbounded"])
def test_weights_start_at_one(kind):
    fuse = Fuse(3, kind)
    assert fuse.weight.tolist() == [1.0, 1.0, 1.0]
    expected = {"fast": 1 / (3 + FUSION_EPS), "softmax": 1 / 3, "unbounded": 1.0}[kind]
    torch.testing.assert_close(fuse.normalised(), torch.full((3,), expected))


def test_negative_weights_give_zero_not_nan():
    fuse = Fuse(2, "fast")
    fuse.weight.data = torch.tensor([-1.0, -0.5])
    y = fuse([torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)])
    assert torch.equal(y, torch.zeros(1, 1, 2, 2))
    fuse.weight.data.zero_()
    assert fuse([torch.ones(1, 1, 2, 2)] * 2).isfinite().all()


@pytest.mark.parametrize("kind", ["fast", "softmax", "unbounded", "sum"])
@pytest.mark.parametrize("channels", [None, 4])
def test_bfloat16_maps_stay_bfloat16(kind, channels):
    fuse = Fuse(3, kind, channels)
    maps = [torch.randn(2, 4, 5, 5) for _ in range(3)]
    expected = fuse(maps)
    actual = fuse([x.bfloat16() for x in maps])
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=3e-2)


def test_weights_of_a_bfloat16_module_are_normalised_in_float32():
    fuse = Fuse(2, "fast").bfloat16()
    weights = fuse.normalised()
    assert weights.dtype == torch.float32
    # In bfloat16 2 + 1e-4 is 2: the weights would be exactly a half.
    torch.testing.assert_close(weights, torch.full((2,), 1 / (2 + 1e-4)), rtol=0, atol=1e-7)
    assert (weights < 0.5).all()


def test_autocast_keeps_bfloat16_through_the_pyramid():
    torch.manual_seed(0)
    net = BiFPN(CHANNELS, channels=8, layers=2).eval()
    with torch.no_grad():
        expected = net(pyramid())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = net(pyramid())
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == torch.bfloat16
        assert (x.float() - y).abs().mean() < 0.02 * y.abs().mean() + 1e-3


# Resampling


def same_pool(x):
    """3×3 stride-2 max-pool with SAME padding written out: -inf, the odd one at the end."""
    pads = []
    for side in (x.shape[-1], x.shape[-2]):
        total = max((-(-side // 2) - 1) * 2 + 3 - side, 0)
        pads += [total // 2, total - total // 2]
    return F.max_pool2d(F.pad(x, pads, value=float("-inf")), 3, 2)


@pytest.mark.parametrize(
    "size", [(8, 8), (7, 7), (8, 7), (7, 8), (1, 1), (2, 2), (1, 6), (3, 1), (5, 12)], ids=str
)
def test_downsample_is_same_padding(size):
    x = torch.randn(2, 3, *size) - 5  # below zero: a pool that pads with zeros would show
    y = downsample(x)
    assert y.shape[-2:] == (-(-size[0] // 2), -(-size[1] // 2))
    assert torch.equal(y, same_pool(x))
    assert torch.equal(y, MaxPool2dSame(3, 2)(x))


def test_downsample_compiles_to_one_graph_for_all_parities():
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(downsample, fullgraph=True, dynamic=True, backend=counter)
    for size in [(8, 6), (7, 6), (8, 9), (3, 5), (2, 4)]:
        x = torch.randn(1, 2, *size) - 5
        assert torch.equal(compiled(x), same_pool(x))
    assert counter.frame_count == 1


def test_upsample_goes_to_the_target_size_by_nearest():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    y = upsample_like(x, torch.empty(1, 7, 4, 3))
    assert y.shape == (1, 1, 4, 3)
    assert y[0, 0].tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4], [3, 3, 4]]


# The pyramid


@pytest.mark.parametrize("levels", [(1, 3), (2, 5), (2, 7), (3, 7), (2, 8), (2, 9)], ids=str)
def test_levels(levels):
    net = BiFPN(CHANNELS, levels=levels, channels=8, layers=2).eval()
    with torch.no_grad():
        maps = net(pyramid(96))
    low, high = levels
    sides = [96 // 2**level for level in range(min(high, 5) + 1)]
    while len(sides) <= high:
        sides.append(-(-sides[-1] // 2))
    assert [x.shape for x in maps] == [(2, 8, s, s) for s in sides[low : high + 1]]


def test_first_level_above_the_encoder_has_a_convolution_others_only_pool():
    net = BiFPN(CHANNELS, levels=(2, 8), channels=10, layers=1).eval()
    assert [type(m) for m in net.extra] == [nn.Conv2d, type(net.cells[0].nodes["0"].bn)]
    assert net.extra[0].kernel_size == (1, 1)
    seen = {}
    net.cells[0].register_forward_pre_hook(lambda _, args: seen.update(args[0]))
    features = pyramid(128)
    with torch.no_grad():
        net(features)
        p6 = same_pool(net.extra(features[5]))
        p7 = same_pool(p6)
        assert torch.equal(seen[6], p6)
        assert torch.equal(seen[7], p7)
        assert torch.equal(seen[8], same_pool(p7))
    assert seen[5] is features[5]


def test_no_convolution_where_the_width_fits():
    net = BiFPN([3, 8, 8, 8, 8, 8], levels=(2, 7), channels=8, layers=1)
    assert isinstance(net.extra, nn.Identity)
    assert all(len(node.laterals) == 0 for node in net.cells[0].nodes.values())


def test_one_node_by_hand():
    """P1–P2 of one channel, P1 of equal cells: fuse, SiLU, depthwise, pointwise, BatchNorm."""
    net = BiFPN([1, 1, 1], levels=(1, 2), channels=1, layers=1).eval()
    with torch.no_grad():
        for node in net.cells[0].nodes.values():
            node.conv.depthwise.weight.zero_()
            node.conv.depthwise.weight[0, 0, 1, 1] = 2.0
            node.conv.pointwise.weight.fill_(0.5)
            node.conv.pointwise.bias.fill_(0.25)
        a, b = torch.tensor(3.0), torch.tensor(-1.0)
        p1 = a.expand(1, 1, 2, 2)
        fine, coarse = net([torch.zeros(1, 1, 4, 4), p1, b.view(1, 1, 1, 1)])

    def step(value):
        return (F.silu(value) + 0.25) / (1 + 1e-3) ** 0.5

    p1 = step((a + b) / (2 + 1e-4))
    p2 = step((b + p1) / (2 + 1e-4))
    torch.testing.assert_close(fine.flatten(), p1.expand(4))
    torch.testing.assert_close(coarse.flatten(), p2.view(1))


@pytest.mark.parametrize("fusion", ["fast", "sum"])
def test_pruned_equals_full_and_every_parameter_gets_a_gradient(fusion):
    torch.manual_seed(0)
    options = {"levels": (2, 7), "channels": 8, "layers": 3, "fusion": fusion}
    full = BiFPN(CHANNELS, **options)
    pruned = BiFPN(CHANNELS, out_levels=(2,), **options)
    for p in full.parameters():
        p.data.add_(torch.rand_like(p) * 0.1)
    theirs = full.state_dict()
    assert set(pruned.state_dict()) < set(theirs)
    pruned.load_state_dict({key: theirs[key] for key in pruned.state_dict()})
    full.eval()
    pruned.eval()
    maps = pruned(pyramid())
    assert len(maps) == 1
    assert torch.equal(maps[0], full(pyramid())[0])

    maps[0].square().mean().backward()
    assert [n for n, p in pruned.named_parameters() if p.grad is None] == []
    full(pyramid())[0].square().mean().backward()
    dead = {n for n, p in full.named_parameters() if p.grad is None}
    assert dead == set(dict(full.named_parameters())) - set(dict(pruned.named_parameters()))


def test_parameters_that_pruning_saves():
    """effseg_d4's decoder: 89,614 parameters are in nodes of the last cell that reach no head."""
    channels = [3, 24, 32, 56, 160, 448]
    with torch.device("meta"):
        full = BiFPN(channels, levels=(2, 7), channels=128, layers=3)
        pruned = BiFPN(channels, levels=(2, 7), channels=128, layers=3, out_levels=(2,))
    saved = sum(p.numel() for p in full.parameters()) - sum(p.numel() for p in pruned.parameters())
    node = 9 * 128 + 128 * 128 + 128 + 2 * 128  # depthwise, pointwise, bias, BatchNorm
    assert saved == 5 * node + 4 * 3 + 2  # P3 … P7 bottom-up; fusion weights
    assert saved == 17_691_685 - 17_602_071


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": (5, 2)}, r"decoder_levels=\(5, 2\)"),
        ({"levels": (2, 2)}, r"decoder_levels=\(2, 2\)"),
        ({"levels": (6, 7)}, r"decoder_levels=\(6, 7\).*1 <= low <= 5"),
        ({"levels": (0, 4)}, r"decoder_levels=\(0, 4\)"),
        ({"layers": 0}, "decoder_layers=0"),
        ({"channels": 0}, "decoder_channels=0"),
        ({"fusion": "Fast"}, "decoder_fusion='Fast': expected one of fast, softmax, unbounded"),
        ({"activation": "gelu"}, "decoder_activation='gelu': expected one of silu, relu6"),
        ({"out_levels": (1,)}, "out_levels"),
        ({"out_levels": ()}, "out_levels"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        BiFPN(CHANNELS, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoder_levels": (5, 2)}, "decoder_levels"),
        ({"decoder_levels": (2, 7, 8)}, "decoder_levels"),
        ({"decoder_layers": 0}, "decoder_layers=0"),
        ({"encoder_depth": 6}, "encoder_depth=6"),
        ({"encoder_depth": 3, "decoder_levels": (4, 7)}, "1 <= low <= 3"),
        ({"classes": 0}, "classes=0"),
        ({"head_layers": 0}, "head_layers=0"),
        ({"head_channels": 0}, "head_channels=0"),
        ({"dropout": 0.5}, "dropout=0.5: no such argument"),
    ],
)
def test_bad_arguments_of_the_model(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        EffSeg("resnet18", encoder_weights=None, **arguments)
    assert "\n" not in str(caught.value)
