"""BatchNorm over all processes, for layers that hold their activation too."""

from lightning.pytorch.plugins.layer_sync import LayerSync
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncNorms(LayerSync):
    """What ``Trainer(sync_batchnorm=True)`` promises.

    torch's own conversion, which Lightning calls, replaces timm's BatchNorm-and-activation by a
    BatchNorm alone: the encoder would train without activations, and after the training keep none.
    timm's ``convert_sync_batchnorm`` keeps them.
    """

    def __init__(self) -> None:
        """Remember what is replaced."""
        self.replaced: list[tuple[nn.Module, str, _BatchNorm]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace the BatchNorms in place by synchronised ones with the same tensors."""
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                    setattr(parent, name, convert_sync_batchnorm(child))
                    self.replaced.append((parent, name, child))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Put the first layers back, with what was trained since."""
        for parent, name, original in self.replaced:
            synced = getattr(parent, name)
            for key in (*original._parameters, *original._buffers):
                setattr(original, key, getattr(synced, key))
            original.train(synced.training)
            setattr(parent, name, original)
        self.replaced.clear()
        return model
