import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from effseg.training.ema import ModelEMA, ema_decay


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def test_decay_warms_up_to_the_paper_value():
    assert ema_decay(0.9998, 0) == pytest.approx(0.1)
    assert ema_decay(0.9998, 90) == pytest.approx(0.91)
    assert ema_decay(0.9998, 10**6) == 0.9998


def test_before_an_update_it_is_the_model():
    model = small()
    ema = ModelEMA(model, 0.9)
    for a, b in zip(ema.module.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_averages_weights_and_statistics_by_hand():
    model = small()
    ema = ModelEMA(model, 0.9)
    expected = None
    for step in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        model.train()(torch.randn(4, 1, 3, 3))
        ema.update_parameters(model)
        now = copy.deepcopy(model.state_dict())
        if expected is None:  # the first update takes the model as it is
            expected = now
            continue
        decay = ema_decay(0.9, step)
        expected = {
            k: decay * expected[k] + (1 - decay) * v if v.is_floating_point() else v
            for k, v in now.items()
        }
    for key, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[key])


def test_goes_on_where_a_checkpoint_ends():
    model = small()
    ema, again = ModelEMA(model, 0.9), ModelEMA(model, 0.9)
    parent = nn.ModuleDict({"ema": again})
    for step in range(4):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        ema.update_parameters(model)
        again.update_parameters(model)
        if step == 1:  # as a resumed run does, whose average has been updated already
            again.update_parameters(model)
            parent.load_state_dict({f"ema.{k}": v for k, v in ema.state_dict().items()})
    for one, other in zip(ema.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert int(ema.n_averaged) == 4


def test_equals_torchs_average():
    model = small()
    ema = ModelEMA(model, 0.1)  # below what the warm-up of the decay would give
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.1), use_buffers=True)
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        ema.update_parameters(model)
        torchs.update_parameters(model)
    ours, theirs = ema.state_dict(), torchs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_stays_in_evaluation_mode_and_gets_no_gradient():
    model = small()
    parent = nn.ModuleDict({"model": model, "ema": ModelEMA(model, 0.9)})
    parent.train()
    assert model.training
    assert not parent["ema"].module.training
    assert not any(p.requires_grad for p in parent["ema"].parameters())
