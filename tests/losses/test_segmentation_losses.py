import math

import pytest
import segmentation_models_pytorch as smp
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from effseg.errors import InputError
from effseg.losses.segmentation import SegmentationLoss, cross_entropy

TERMS = ["cross_entropy", "dice", "lovasz", "tversky", "focal"]


def draw(classes=21, batch=2, size=8, ignored=255, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, size, size + 1, generator=generator) * 2
    target = torch.randint(classes, (batch, size, size + 1), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = ignored
    return logits.requires_grad_(), target


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("classes", [2, 5, 21])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_cross_entropy_equals_torch(classes, weighted, smoothing, dtype):
    logits, target = draw(classes)
    weights = torch.linspace(0.0, 3.0, classes) if weighted else None
    options = {"ignore_index": 255, "label_smoothing": smoothing}
    theirs = functional.cross_entropy(logits, target, weight=weights, **options)
    ours = cross_entropy(logits, target.to(dtype), class_weights=weights, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))
    assert ours.shape == ()


@pytest.mark.parametrize("ignored", [0, 3, -100, -1])
def test_any_ignore_index(ignored):
    logits, target = draw(5, ignored=ignored)
    ours = cross_entropy(logits, target, ignore_index=ignored)
    theirs = functional.cross_entropy(logits, target, ignore_index=ignored)
    torch.testing.assert_close(ours, theirs)


def test_small_weights_keep_torchs_meaning():
    # The guard replaces a divisor of 0 only: one pixel of weight 0.01 keeps its loss.
    logits = torch.randn(1, 3, 1, 2, requires_grad=True)
    target = torch.tensor([[[1, 255]]])
    weights = torch.tensor([1.0, 0.01, 1.0])
    ours = cross_entropy(logits, target, class_weights=weights)
    theirs = functional.cross_entropy(logits, target, weight=weights, ignore_index=255)
    torch.testing.assert_close(ours, theirs)
    zero = cross_entropy(logits, target, class_weights=torch.tensor([1.0, 0.0, 1.0]))
    assert float(zero.detach()) == 0
    assert gradient(zero, logits).eq(0).all()


@pytest.mark.parametrize("options", [{}, {"ohem": 0.3}, {"label_smoothing": 0.1}, {"weighted": 1}])
def test_an_ignored_batch_has_no_loss(options):
    logits, target = draw(4)
    if options.pop("weighted", None):
        options = {"class_weights": torch.rand(4)}
    loss = cross_entropy(logits, torch.full_like(target, 255), **options)
    assert float(loss.detach()) == 0
    assert gradient(loss, logits).eq(0).all()
    theirs = functional.cross_entropy(logits, torch.full_like(target, 255), ignore_index=255)
    assert torch.isnan(theirs), "what the guard is for"


def test_ignored_pixels_get_no_gradient():
    logits, target = draw(4)
    for options in ({}, {"ohem": 0.5}, {"label_smoothing": 0.2}):
        grad = gradient(cross_entropy(logits, target, **options), logits)
        assert grad.movedim(1, -1)[target == 255].eq(0).all()
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_ohem_keeps_the_hardest(share, weighted):
    logits, target = draw(5)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1, 1.0]) if weighted else None
    losses = functional.cross_entropy(
        logits, target, weight=weights, ignore_index=255, reduction="none"
    )
    valid = (target != 255).flatten().nonzero().squeeze(1).tolist()
    flat, labels = losses.flatten(), target.flatten()
    hardest = sorted(valid, key=lambda i: -float(flat[i].detach()))[: math.ceil(share * len(valid))]
    divisor = len(hardest) if weights is None else weights[labels[hardest]].sum()
    expected = flat[hardest].sum() / divisor
    ours = cross_entropy(logits, target, class_weights=weights, ohem=share)
    torch.testing.assert_close(ours, expected)
    grad = gradient(ours, logits)
    torch.testing.assert_close(grad, gradient(expected, logits))
    touched = grad.abs().sum(1).gt(0).flatten().nonzero().squeeze(1).tolist()
    assert sorted(touched) == sorted(hardest)


def test_ohem_of_everything_is_the_plain_mean():
    logits, target = draw(5)
    torch.testing.assert_close(
        cross_entropy(logits, target, ohem=1.0), cross_entropy(logits, target)
    )


def test_ohem_counts_pixels_without_float64():
    """MPS has none. The count is the share's as written: 0.07 of 100 pixels are 7, not 8."""

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **kwargs or {})
            assert getattr(output, "dtype", None) != torch.float64, func
            return output

    def kept(count, share):
        logits = torch.zeros(1, 2, 1, count, requires_grad=True)
        with NoFloat64():
            loss = cross_entropy(logits, torch.zeros(1, 1, count).long(), ohem=share)
        return int((gradient(loss, logits)[0, 0, 0] != 0).sum())

    for share in (0.07, 0.1, 0.25, 1 / 3, 0.5, 0.55, 2 / 3, 0.7, 0.999, 1.0):
        for count in (1, 2, 3, 7, 10, 60, 99, 100, 300, 1001):
            product = share * count  # in float64, whose error may lift it above a whole number
            nearest = round(product)
            whole = math.isclose(product, nearest, rel_tol=1e-12)
            assert kept(count, share) == (nearest if whole else math.ceil(product))


def test_ohem_breaks_ties_by_count():
    logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    grad = gradient(cross_entropy(logits, torch.zeros(1, 4, 4).long(), ohem=0.25), logits)
    assert int(grad[:, 0].ne(0).sum()) == 4


@pytest.mark.parametrize("name", TERMS)
def test_float32_under_autocast(name):
    logits, target = draw(5)
    loss = SegmentationLoss({name: 1.0})
    half = logits.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, values = loss(half, target)
    assert total.dtype == values[name].dtype == torch.float32
    torch.testing.assert_close(total, loss(half.float(), target)[0])


def test_cross_entropy_gradcheck():
    logits, target = draw(3, batch=1, size=2)
    double = logits.detach().double().requires_grad_()
    weights = torch.tensor([0.5, 1.0, 2.0])
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, target, class_weights=weights, label_smoothing=0.1), (double,)
    )


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("classes", [2, 7, 21])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_every_term_is_finite_and_falls_under_descent(name, classes, dtype):
    logits, target = draw(classes)
    loss = SegmentationLoss({name: 1.0})
    before, values = loss(logits, target.to(dtype))
    assert before.shape == ()
    assert torch.isfinite(before)
    assert float(before.detach()) > 0
    assert not values[name].requires_grad
    grad = gradient(before, logits)
    assert torch.isfinite(grad).all()
    assert grad.movedim(1, -1)[target == 255].eq(0).all(), "ignored pixels must not be trained"
    after, _ = loss(logits - grad * (0.1 / grad.norm()), target.to(dtype))
    assert float(after.detach()) < float(before.detach())


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("classes", [2, 21])
def test_every_term_is_zero_where_all_is_ignored(name, classes):
    logits, target = draw(classes)
    total, values = SegmentationLoss({name: 1.0})(logits, torch.full_like(target, 255))
    assert total.shape == values[name].shape == ()
    assert float(total.detach()) == 0
    assert gradient(total, logits).eq(0).all()


def test_smp_still_needs_the_guard():
    # If one of these fails, smp has repaired it and the guard in _smp_term can go.
    logits, target = draw(3)
    ignored = torch.full_like(target, 255)
    assert torch.isnan(smp.losses.FocalLoss("multiclass", ignore_index=255)(logits, ignored))
    assert smp.losses.LovaszLoss("multiclass", ignore_index=255)(logits, ignored).numel() == 0


@pytest.mark.parametrize("name", TERMS)
def test_terms_do_not_depend_on_what_is_ignored(name):
    # The same as leaving the ignored columns out altogether.
    logits, target = draw(4)
    target[target == 255] = 0
    target[:, :, 5:] = 255
    loss = SegmentationLoss({name: 1.0})
    torch.testing.assert_close(loss(logits, target)[0], loss(logits[..., :5], target[..., :5])[0])


def test_the_sum_is_weighted_and_the_values_are_not():
    logits, target = draw(4)
    terms = {name: 0.5 * index for index, name in enumerate(TERMS)}
    total, values = SegmentationLoss(terms)(logits, target)
    assert list(values) == TERMS
    for name in TERMS:
        torch.testing.assert_close(
            values[name], SegmentationLoss({name: 1})(logits, target)[0].detach()
        )
    expected = sum(terms[name] * float(values[name]) for name in TERMS)
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)


def test_defaults_and_options_reach_cross_entropy():
    logits, target = draw(4)
    default, values = SegmentationLoss()(logits, target)
    assert list(values) == ["cross_entropy"]
    torch.testing.assert_close(default, cross_entropy(logits, target))
    weights = [1.0, 2.0, 0.5, 0.0]
    options = {"label_smoothing": 0.1, "ohem": 0.5}
    total, _ = SegmentationLoss(class_weights=weights, **options)(logits, target)
    expected = cross_entropy(logits, target, class_weights=torch.tensor(weights), **options)
    torch.testing.assert_close(total, expected)


def test_class_weights_follow_the_module_but_stay_out_of_checkpoints():
    loss = SegmentationLoss(class_weights=[1.0, 2.0])
    assert not loss.state_dict()
    assert loss.to("meta").class_weights.is_meta


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"terms": {"jaccard": 1.0}},
            "loss jaccard: unknown; expected one of cross_entropy, dice",
        ),
        ({"terms": {}}, "terms is empty"),
        ({"terms": {"dice": -1.0}}, "dice has weight -1.0"),
        ({"terms": {"dice": math.nan}}, "dice has weight nan"),
        ({"class_weights": [1.0, -2.0]}, "class_weights contains -2.0"),
        ({"class_weights": [math.inf]}, "class_weights contains inf"),
        ({"class_weights": ["1", "2"]}, "class_weights contains 1: expected 0 or more"),
        ({"class_weights": 2.0}, r"class_weights 2\.0: expected a list"),
        ({"class_weights": [0.0, 0.0]}, "expected at least one above 0"),
        ({"ohem": 0.0}, "ohem is 0.0"),
        ({"ohem": 1.5}, "ohem is 1.5"),
        ({"ohem": math.nan}, "ohem is nan"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        SegmentationLoss(**options)


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stride", [1, 4])
def test_class_weights_need_one_value_per_class(stride, dtype, count):
    logits = torch.randn(2, 4, 16 // stride, 16 // stride, dtype=dtype)
    target = torch.randint(0, 4, (2, 16, 16))
    words = rf"class_weights has shape \({count},\): expected \(4,\)"
    with pytest.raises(InputError, match=words):
        SegmentationLoss(class_weights=[1.0] * count)(logits, target)
    for weights in ([1.0] * 4, torch.ones(4)):
        assert SegmentationLoss(class_weights=weights)(logits, target)[0].dtype == dtype


def test_bad_batches():
    logits, target = draw(4)
    with pytest.raises(InputError, match=r"class_weights contains -1\.0"):
        cross_entropy(logits, target, class_weights=torch.tensor([1.0, 1.0, -1.0, 1.0]))
    with pytest.raises(InputError, match="ohem is 2"):
        cross_entropy(logits, target, ohem=2)
    with pytest.raises(InputError, match=r"logits \(2, 4, 8, 9\) and target \(2, 8, 8\)"):
        cross_entropy(logits, target[..., :8])
    for name in TERMS:
        for value, dtype in ((4, torch.uint8), (200, torch.uint8), (-1, torch.int64)):
            wrong = target.to(dtype).clone()
            wrong[1, 2, 3] = value
            message = rf"target contains the value {value}: expected 0 to 3 or 255 \(ignored\)"
            with pytest.raises(InputError, match=message):
                SegmentationLoss({name: 1.0})(logits, wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", TERMS)
def test_gpu_equals_cpu(name):
    logits, target = draw(6)
    loss = SegmentationLoss({name: 1.0}, class_weights=[1, 2, 1, 1, 0.5, 1], ohem=0.5)
    on_cpu = loss(logits, target)[0]
    on_gpu = loss.cuda()(logits.cuda(), target.to(torch.uint8).cuda())[0]
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-5)


# Coarse logits


def coarse_case(seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 7, 6, 5, generator=generator) * 2
    target = torch.randint(7, (3, 24, 20), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    return logits.requires_grad_(), target.to(torch.uint8)


@pytest.mark.parametrize("options", [
    {},
    {"class_weights": [1.0, 0.0, 2.0, 1.0, 0.5, 1.0, 3.0], "label_smoothing": 0.1},
    {"terms": {"cross_entropy": 0.5}},
    {"terms": {"cross_entropy": 1.0, "dice": 1.0}},
    {"ohem": 0.3},
])  # fmt: skip
def test_coarse_logits_give_the_loss_of_upsampled_ones(options):
    loss = SegmentationLoss(**options)
    logits, target = coarse_case()
    large = functional.interpolate(logits, scale_factor=4.0, mode="bilinear", align_corners=False)
    expected, terms = loss(large, target)
    actual, values = loss(logits, target)
    torch.testing.assert_close(actual, expected)
    assert values.keys() == terms.keys()
    torch.testing.assert_close(gradient(actual, logits), gradient(expected, logits))


def test_coarse_logits_with_all_pixels_ignored():
    logits, target = coarse_case(ignored=2.0)
    loss, _ = SegmentationLoss()(logits, target)
    assert float(loss) == 0.0
    assert (gradient(loss, logits) == 0).all()


def test_coarse_logits_are_upsampled_one_image_at_a_time():
    kept = []
    logits, target = coarse_case()
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        SegmentationLoss()(logits, target)[0].backward()
    assert max(kept) <= 7 * 24 * 20, "one image's at most"


def test_target_values_are_checked_for_coarse_logits_too():
    logits, target = coarse_case()
    target[1, 3, 3] = 9
    with pytest.raises(InputError, match="value 9"):
        SegmentationLoss()(logits, target)
    with pytest.raises(InputError, match="expected"):
        SegmentationLoss()(logits, target[:, :21])
