"""A step of a joint training: the stand-in for labels that a process lacks, and compiled parts."""

from itertools import combinations_with_replacement

import pytest
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


@pytest.fixture
def graphs(monkeypatch):
    """Count the graphs that are compiled; a function that falls back to running eagerly fails."""
    seen, compiled = [], torch.compile

    def backend(graph, _):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr("torch.compile", lambda function: compiled(function, backend=backend))
    torch.compiler.reset()
    with torch.compiler.config.patch(fail_on_recompile_limit_hit=True):
        yield seen
    torch.compiler.reset()


def test_graphs_do_not_grow_with_the_sets_of_labels_in_a_batch(graphs):
    model = tiny().train()
    criterion, plain = Criterion(model, compile=True), Criterion(model)
    kinds = ({"mask": mask()}, boxes(), {"mask": mask()} | boxes())
    batches = [*combinations_with_replacement(kinds, 3)]
    for targets in batches:
        loss = criterion(images(), targets)["loss"]
        torch.testing.assert_close(loss, plain(images(), targets)["loss"])
    # The encoder; BiFPN for each set of heads; a head for all, for some and for one of the images.
    assert len(graphs) <= 1 + 3 + 2 * 3
    before = len(graphs)
    for targets in reversed(batches):
        criterion(images(), targets)
    assert len(graphs) == before
