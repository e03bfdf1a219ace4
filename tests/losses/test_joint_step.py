"""A step of a joint training: the stand-in for labels that a process lacks, and compiled parts."""

import torch

from effseg.losses import Criterion
from effseg.training.loss_log import losses_by_source
from tests.losses.test_criterion import boxes, images, mask, tiny


def test_no_loss_by_source_of_labels_that_a_process_lacks(monkeypatch):
    # One of several processes; the sums over them, elsewhere, are this one's.
    monkeypatch.setattr("effseg.losses.joint.is_distributed", lambda: True)
    criterion, sources = Criterion(tiny()), {"source": torch.tensor([0, 1])}
    for targets, expected in (
        ([{"mask": mask()}, {"mask": mask(1)}], {"a/segmentation", "b/segmentation"}),
        ([boxes(), boxes(1)], {"a/classes", "a/boxes", "b/classes", "b/boxes"}),
    ):
        output, labels = criterion.run(images(2), targets)
        assert labels.rows.keys() == {"segmentation", "detection"}
        named = losses_by_source(criterion, ["a", "b"], sources, output, labels)
        assert named.keys() == expected
