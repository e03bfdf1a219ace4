"""Synchronised BatchNorm, also for layers that include their activation."""

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import nn

from effseg.models.layers import convert_sync_batchnorm


def synchronise_norms(trainer: Trainer) -> None:
    """Make `Trainer(sync_batchnorm=True)` use our conversion; dropped on a CPU.

    Lightning uses torch's, which loses the activations of timm's layers. The attribute is
    private; the public way, the Trainer's `plugins=[LayerSync]`, is not available to a task.
    """
    strategy = trainer.strategy
    if getattr(strategy, "_layer_sync", None) is None:
        return
    if strategy.root_device.type == "cpu":
        if trainer.is_global_zero:
            print("sync_batchnorm: dropped, SyncBatchNorm has no CPU form")
        strategy._layer_sync = None  # type: ignore[attr-defined]
    else:
        strategy._layer_sync = SyncNorms()  # type: ignore[attr-defined]


class SyncNorms(LayerSync):
    """Converts a model's BatchNorms by `convert_sync_batchnorm`, and back."""

    def __init__(self) -> None:
        self.replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace the BatchNorms in place by synchronised ones with the same tensors."""
        self.replaced += convert_sync_batchnorm(model)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Restore the BatchNorms, with the tensors trained since."""
        for parent, name, original in self.replaced:
            synced = getattr(parent, name)
            tensors = (
                *original.named_parameters(recurse=False),
                *original.named_buffers(recurse=False),
            )
            for key, _ in tensors:
                setattr(original, key, getattr(synced, key))
            original.train(synced.training)
            setattr(parent, name, original)
        self.replaced.clear()
        return model
