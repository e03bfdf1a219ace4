"""Synchronised BatchNorms: the activations stay, and training's results come back."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from timm.layers import BatchNormAct2d
from torch import nn

from effseg import EffSeg
from effseg.training.sync_norms import SyncNorms
from effseg.training.task import TrainingTask


@pytest.fixture
def model():
    torch.manual_seed(0)
    small = {"decoder_channels": 8, "decoder_layers": 1, "head_channels": 8, "classes": 3}
    return EffSeg("tu-test_efficientnet", encoder_weights=None, **small).eval()


def outputs(model):
    with torch.no_grad():
        return model(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def test_the_model_computes_the_same_and_every_norm_is_synchronised(model):
    assert any(isinstance(m, BatchNormAct2d) for m in model.modules())
    expected, names = outputs(model), set(model.state_dict())
    plain = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    synced = SyncNorms().apply(model)
    assert torch.equal(outputs(synced), expected)
    assert set(synced.state_dict()) == names
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synced.modules()) == plain
    assert not any(isinstance(m, nn.BatchNorm2d) for m in synced.modules())


def test_what_was_trained_comes_back(model):
    types = [type(m) for m in model.modules()]
    sync = SyncNorms()
    sync.apply(model)
    model.double().float()  # as a move to a device: other buffers
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    expected, state = outputs(model), copy.deepcopy(model.state_dict())
    sync.revert(model)
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(outputs(model), expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not any(m.training for m in model.modules())


def test_on_a_cpu_they_are_dropped_in_one_line(capsys):
    task = TrainingTask(
        "effseg_lite0", classes=["a", "b", "c"], model_args={"encoder_weights": None}
    )
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy="ddp", sync_batchnorm=True, logger=False
    )
    task.trainer = trainer
    capsys.readouterr()
    task.setup("fit")
    assert trainer.strategy._layer_sync is None
    assert capsys.readouterr().out.count("\n") == 1


def test_activations_with_weights_stay():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, act_layer=nn.PReLU))
    names, sync = set(net.state_dict()), SyncNorms()
    sync.apply(net)
    sync.revert(net)
    assert set(net.state_dict()) == names and isinstance(net[1].act, nn.PReLU)
