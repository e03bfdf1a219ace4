"""BatchNorm over all processes, for layers that hold their activation too."""

from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import nn

from effseg.models.layers import convert_sync_batchnorm


class SyncNorms(LayerSync):
    """What ``Trainer(sync_batchnorm=True)`` promises, by the library's own conversion."""

    def __init__(self) -> None:
        """Remember what is replaced."""
        self.replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace the BatchNorms in place by synchronised ones with the same tensors."""
        self.replaced += convert_sync_batchnorm(model)
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
