"""The focal loss: by its definition, its gradient, and what is kept for it."""

import pytest
import torch

from effseg.losses.detection import focal_sum

ALPHA, GAMMA = 0.25, 1.5


def case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 40, 5, generator=generator) * 4).to(dtype)
    labels = torch.randint(-2, 5, (3, 40), generator=generator)
    labels[1] = -1  # a image without boxes
    known = torch.ones(3, 5, dtype=torch.bool)
    known[2, 1:3] = False
    labels[2][(labels[2] == 1) | (labels[2] == 2)] = -1
    return logits.requires_grad_(), labels, known


def by_definition(logits, labels, known, alpha, gamma):
    p = logits.sigmoid()
    target = torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1]).bool()
    target &= (labels >= 0)[..., None]
    p_t = torch.where(target, p, 1 - p)
    alpha_t = alpha * target.to(p) + (1 - alpha) * (~target).to(p)
    entries = -alpha_t * (1 - p_t) ** gamma * p_t.log()
    counts = (labels != -2)[..., None] & known[:, None]
    return (entries * counts).sum()


@pytest.mark.parametrize(("alpha", "gamma"), [(ALPHA, GAMMA), (0.6, 2.0), (0.25, 0.0)])
def test_value_and_gradient_follow_the_definition(alpha, gamma):
    logits, labels, known = case(torch.float64)
    expected = by_definition(logits, labels, known, alpha, gamma)
    (slope,) = torch.autograd.grad(expected, logits)
    actual = focal_sum(logits, labels, known, alpha, gamma)
    (mine,) = torch.autograd.grad(3 * actual, logits)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(mine, 3 * slope, rtol=1e-9, atol=1e-12)


def test_extreme_logits_have_finite_losses_and_gradients():
    logits = torch.tensor([[[-200.0, 200.0], [200.0, -200.0], [90.0, -90.0]]], requires_grad=True)
    loss = focal_sum(logits, torch.tensor([[0, 1, -1]]))
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(logits.grad.isfinite().all())
    # Positives at -200: α · 200 each; negatives at 200, 200 and 90: (1 - α) each.
    assert float(loss.detach()) == pytest.approx(0.25 * 400 + 0.75 * (200 + 200 + 90))


def test_a_second_backward_pass_gives_the_same():
    logits, labels, known = case()
    loss = focal_sum(logits, labels, known)
    first = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, logits)[0])


def test_what_is_kept_of_large_logits_has_their_size_once(monkeypatch):
    monkeypatch.setattr("effseg.losses.detection._LARGE_LOGITS", 0)
    logits, labels, known = case()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        focal_sum(logits, labels, known)
    large = [t for t in kept if t.is_floating_point() and t.shape[-1] == logits.shape[-1]]
    assert sum(t.numel() for t in large) == logits.numel()


def test_no_gradient_unless_required():
    logits, labels, known = case()
    with torch.no_grad():
        loss = focal_sum(logits, labels, known)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, focal_sum(logits, labels, known).detach())
