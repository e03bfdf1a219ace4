import pytest
import torch
from torch import nn

from effseg.errors import InputError
from effseg.models.faces import EffSeg
from effseg.training.optim import OptimConfig, build_optimizer, lr_factor, param_groups


@pytest.fixture(scope="module")
def model():
    return EffSeg("tu-test_efficientnet", encoder_weights=None, decoder_channels=8, head_channels=8)


def test_only_kernels_decay_and_the_encoder_has_another_rate(model):
    config = OptimConfig(lr=0.1, encoder_lr_factor=0.1, weight_decay=0.5)
    groups = {g["name"]: g for g in param_groups(model, config)}
    assert sorted(groups) == ["decoder", "decoder_no_decay", "encoder", "encoder_no_decay"]
    assert groups["encoder"]["lr"] == pytest.approx(0.01)
    assert groups["decoder"]["lr"] == 0.1
    kernels = {m.weight for m in model.modules() if isinstance(m, nn.Conv2d)}
    for name in ("decoder", "encoder"):
        assert groups[name]["weight_decay"] == 0.5
        assert set(groups[name]["params"]) <= kernels
        assert groups[f"{name}_no_decay"]["weight_decay"] == 0.0
        assert not set(groups[f"{name}_no_decay"]["params"]) & kernels
    fusion = {m.fuse.weight for m in model.decoder.modules() if hasattr(m, "fuse")}
    assert fusion
    assert fusion <= set(groups["decoder_no_decay"]["params"])
    listed = [p for g in groups.values() for p in g["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out(model):
    model.freeze_encoder()
    try:
        names = [g["name"] for g in param_groups(model, OptimConfig())]
    finally:
        model.unfreeze_encoder()
    assert names == ["decoder", "decoder_no_decay"]


def test_the_encoder_of_another_network_may_be_a_property():
    class Peer(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.ModuleDict({"backbone": nn.Conv2d(1, 1, 1), "head": nn.Linear(1, 1)})

        @property
        def encoder(self):
            return self.network["backbone"]

    groups = param_groups(Peer(), OptimConfig(lr=0.1, encoder_lr_factor=0.5))
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["encoder"] == rates["encoder_no_decay"] == 0.05 and rates["decoder"] == 0.1


def test_sgd_is_the_papers():
    layer = nn.Conv2d(1, 1, 1)
    optimizer = build_optimizer(param_groups(layer, OptimConfig()), OptimConfig())
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.defaults["nesterov"] is False
    assert {g["weight_decay"] for g in optimizer.param_groups} == {4e-5, 0.0}


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.5), ("poly", 0.5**0.9)])
def test_schedule_values(schedule, half):
    factor = lr_factor(OptimConfig(schedule=schedule, warmup_epochs=2), 120, 10)
    assert factor(0) == pytest.approx(1e-3)
    assert factor(10) == pytest.approx(0.5)
    assert factor(20) == pytest.approx(1.0)
    assert factor(70) == pytest.approx(half)
    assert factor(120) == pytest.approx(0.0, abs=1e-9)
    assert factor(500) == pytest.approx(0.0, abs=1e-9)


def test_warm_up_is_at_most_a_quarter():
    factor = lr_factor(OptimConfig(warmup_epochs=100), 40, 10)
    assert factor(10) == pytest.approx(1.0)


def test_no_warm_up():
    assert lr_factor(OptimConfig(warmup_epochs=0), 40, 10)(0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "values", [{"lr": 0.0}, {"lr": float("nan")}, {"weight_decay": -1.0}, {"warmup_epochs": -1.0}]
)
def test_bad_values(values):
    with pytest.raises(InputError, match=next(iter(values))):
        OptimConfig(**values)
