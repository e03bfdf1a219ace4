"""The stream of images: proportions, no image twice, and the same stream after a resume."""

import numpy as np
import pytest
import torch

from effseg import InputError
from effseg.data import VOC, ImageDataModule, datamodule
from effseg.data.sampling import Part, Schedule, Stage, StreamSampler, apportion, parse_weights

MASKS, BOXES = "segmentation", "detection"


def parts(*rows):
    """Make parts of (images for masks, images for boxes, weight), indices one after the other."""
    made, first = [], 0
    for masks, boxes, weight in rows:
        both = {MASKS: np.arange(first, first + masks), BOXES: np.arange(first, first + boxes)}
        made.append(Part({k: v for k, v in both.items() if len(v)}, weight, power=0.0))
        first += max(masks, boxes)
    return made


def sampler(rows, schedule=None, **options):
    options = {"steps": 125, "batch_size": 8, "seed": 0} | options
    return StreamSampler(parts(*rows), schedule or Schedule(), **options)


ROWS = [(764, 2264, 0.5), (0, 208, 0.3), (90, 0, 0.2)]
EDGES = np.array([2264, 2264 + 208, 2264 + 208 + 90])


@pytest.mark.parametrize("world", [1, 2])
def test_proportions_over_ten_thousand_draws(world):
    for rank in range(world):
        stream = sampler(ROWS, process=(rank, world))
        drawn = np.concatenate([stream.indices(e) for e in range(10)])
        assert len(drawn) == 10_000
        share = np.bincount(np.searchsorted(EDGES, drawn, side="right"), minlength=3) / 10_000
        assert np.abs(share - [0.5, 0.3, 0.2]).max() < 0.001
        batches = np.searchsorted(EDGES, drawn.reshape(-1, 8), side="right")
        for part, expected in enumerate((4.0, 2.4, 1.6)):
            counts = (batches == part).sum(1)
            assert abs(counts - expected).max() < 2, "every batch has the mixture"


@pytest.mark.parametrize("steps", [1, 5, 6, 19])
def test_a_part_with_less_than_one_image_an_epoch_is_drawn(steps):
    """Proportions hold over epochs, and over the stages with the same tasks."""
    stages = Schedule((Stage([MASKS], 30), Stage([MASKS, BOXES], 20), Stage([MASKS])))
    rows = [(1000, 0, 100.0), (300, 0, 1.0), (50, 1000, 0.3)]
    stream = sampler(rows, stages, steps=steps)
    drawn = np.concatenate([stream.indices(e) for e in (*range(30), *range(50, 120))])
    edges = [1000, 1300, 2300]
    counts = np.bincount(np.searchsorted(edges, drawn, side="right"), minlength=3)
    expected = 100 * steps * 8 * np.array([100, 1, 0.3]) / 101.3
    assert np.abs(counts - expected).max() < 1.5
    part = drawn[(drawn >= 1000) & (drawn < 1300)]
    assert len(set(part)) == len(part), "no image a second time before all were drawn"


@pytest.mark.parametrize("weights, other", [((3.0, 3.0, 2.0), []), ((1.0, 2.0), [1, 4])])
def test_epochs_with_whole_shares_repeat_their_order_of_parts(weights, other):
    """Of 800 draws 3/8 and 2/8 are whole numbers; 1/3 is 267, 266, 267, 267, 266 in five epochs."""
    stream = sampler([(500, 0, weight) for weight in weights], steps=100)
    orders = [stream.indices(epoch) // 500 for epoch in range(5)]
    assert [e for e in range(5) if not np.array_equal(orders[e], orders[0])] == other


def test_the_first_draws_of_a_stream_stay_drawn():
    share = np.random.default_rng(0).dirichlet([0.2] * 7)
    counts = np.array([apportion(share, draws) for draws in range(500)])
    assert (counts.sum(1) == np.arange(500)).all()
    assert set(np.diff(counts, axis=0).ravel()) == {0, 1}
    assert (np.abs(counts - share * np.arange(500)[:, None]) < 3).all()


def test_processes_draw_different_images_and_miss_none():
    rows = [(100, 100, 1.0)]
    two = [sampler(rows, steps=5, batch_size=10, process=(r, 2)).indices(0) for r in (0, 1)]
    assert sorted(np.concatenate(two)) == list(range(100))
    one = sampler(rows, steps=10, batch_size=10).indices(0)
    assert sorted(one) == list(range(100))


def test_every_lap_is_a_new_shuffle():
    stream = sampler([(40, 40, 1.0)], steps=10, batch_size=10)
    laps = np.concatenate([stream.indices(e) for e in range(2)]).reshape(5, 40)
    assert all(sorted(lap) == list(range(40)) for lap in laps)
    assert len({tuple(lap) for lap in laps}) == 5
    assert not np.array_equal(laps[0], sampler([(40, 40, 1.0)], seed=1).indices(0)[:40])


@pytest.mark.parametrize("start", [(0, 0), (0, 37), (3, 0), (3, 124)])
@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_stream_equals_the_uninterrupted_one(start, world):
    stages = Schedule(
        (
            Stage([BOXES], 2),
            Stage([MASKS, BOXES], 2, alternate=True),
            Stage(),
        )
    )
    for rank in range(world):
        whole = sampler(ROWS, stages, process=(rank, world))
        uninterrupted = [list(whole) for _ in range(6)]
        resumed = sampler(ROWS, stages, process=(rank, world), start=start)
        assert len(resumed) == 1000
        epoch, batch = start
        assert list(resumed) == uninterrupted[epoch][batch * 8 :]
        resumed.set_epoch(epoch + 1)
        assert list(resumed) == uninterrupted[epoch + 1]


def test_stages_and_alternation_draw_images_with_labels_for_their_tasks():
    stages = Schedule(
        (
            Stage([BOXES], 1),
            Stage([MASKS, BOXES], 1, alternate=True),
            Stage(),
        )
    )
    stream = sampler(ROWS, stages)
    first = np.searchsorted(EDGES, stream.indices(0), side="right")
    assert set(first) == {0, 1}, "the third part has no boxes"
    assert np.bincount(first)[0] == pytest.approx(1000 * 0.5 / 0.8, abs=1)
    steps = stream.indices(1).reshape(125, 8)
    masks = steps[::2]
    assert ((masks < 764) | (masks >= 2472)).all(), "images with masks only"
    assert (steps[1::2] < 2472).all(), "images with boxes only"
    assert set(np.searchsorted(EDGES, stream.indices(2), side="right")) == {0, 1, 2}


@pytest.mark.parametrize(
    ("rows", "stages", "words"),
    [
        ([(10, 10, 0.0)], None, "weight above 0"),
        ([(10, 0, 1.0)], [Stage([BOXES])], "no image to draw for detection"),
        ([(10, 0, 1.0), (0, 5, 0.0)], [Stage(alternate=True)], "detection"),
    ],
)
def test_a_stream_without_images_is_refused(rows, stages, words):
    with pytest.raises(InputError, match=words):
        sampler(rows, Schedule(tuple(stages)) if stages else None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Stage(["depth"]), "depth"),
        (lambda: Stage([]), "expected some of"),
        (lambda: Stage([MASKS, MASKS]), "expected some of"),
        (lambda: Stage(epochs=0), "epochs=0"),
        (lambda: Schedule(()), "empty"),
        (lambda: Schedule((Stage(), Stage())), "stage 1 of 2"),
    ],
)
def test_bad_stages_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize("world", [1, 3])
def test_positions_count_over_all_processes(world):
    options = {"steps": 5, "batch_size": 4}
    ranks = [sampler(ROWS, process=(rank, world), **options) for rank in range(world)]
    drawn = [[draw.position for _ in range(3) for draw in stream] for stream in ranks]
    assert sorted(position for each in drawn for position in each) == list(range(3 * 5 * 4 * world))
    assert drawn[0][1] == world, "the next image of a batch is one round of all processes later"


def test_a_draw_names_the_tasks_of_its_step():
    stages = Schedule(
        (
            Stage([BOXES], 1),
            Stage(alternate=True, freeze_encoder=2),
        )
    )
    stream = sampler(ROWS, stages, steps=3, batch_size=2)
    first, second = list(stream), list(stream)
    assert {(draw.tasks, draw.freeze) for draw in first} == {((BOXES,), False)}
    assert [draw.tasks[0] for draw in second] == [MASKS, MASKS, BOXES, BOXES, MASKS, MASKS]
    assert {draw.freeze for draw in second} == {2}


def test_a_stage_without_tasks_trains_all_tasks_with_labels():
    stream = sampler([(0, 20, 1.0)], Schedule((Stage(freeze_encoder=True),)), steps=2)
    assert {draw.tasks for draw in stream} == {(BOXES,)}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": 0.0, "b": 0.0}, "sum above 0"),
        ({"a": -1.0, "b": 2.0}, "none negative"),
        ({"a": float("nan"), "b": 2.0}, "finite"),
        ({"a": float("inf"), "b": 2.0}, "finite"),
        ({"a": 1.0}, "one for each of a, b"),
        ({"a": 1.0, "c": 1.0}, "one for each of a, b"),
        (0.0, "temperature above 0"),
        ("size", "expected images"),
    ],
)
def test_bad_weights_are_named(weights, words):
    with pytest.raises(InputError, match=words):
        parse_weights(weights, ["a", "b"])


def test_processes_without_a_seed_draw_no_image_of_another(voc, monkeypatch):
    seeds, drawn = [], []

    def of_all(rows):
        seeds.extend(rows)
        return list(seeds)

    monkeypatch.setattr(datamodule, "of_all_processes", of_all)
    for rank in (0, 1):
        monkeypatch.setattr(datamodule, "rank_and_world", lambda rank=rank: (rank, 2))
        torch.manual_seed(rank + 5)  # as each process has another seed
        train = {"voc": VOC(voc.root, masks="train_aug", boxes="train")}
        data = ImageDataModule(train, crop_size=32, batch_size=3, num_workers=0)
        sampler = data.train_dataloader().sampler
        assert data.train_set.augment.seed == sampler.seed == data.state_dict().get("seed", 5) == 5
        drawn += sampler.indices(0).tolist()
    assert seeds == [5, 6] and sorted(drawn) == list(range(6))
