"""The stream of photos: proportions, no photo twice, and the same stream after a resume."""

import numpy as np
import pytest

from effseg import InputError
from effseg.data.sampling import Part, StreamSampler
from effseg.data.schedule import Schedule, Stage

MASKS, BOXES = "segmentation", "detection"


def parts(*rows):
    """Make parts of (photos for masks, photos for boxes, weight), indices one after the other."""
    found, first = [], 0
    for masks, boxes, weight in rows:
        both = {MASKS: np.arange(first, first + masks), BOXES: np.arange(first, first + boxes)}
        found.append(Part({k: v for k, v in both.items() if len(v)}, weight, power=0.0))
        first += max(masks, boxes)
    return found


def sampler(rows, schedule=None, **options):
    options = {"steps": 125, "batch_size": 8, "seed": 0} | options
    return StreamSampler(parts(*rows), schedule or Schedule(), **options)


ROWS = [(764, 2264, 0.5), (0, 208, 0.3), (90, 0, 0.2)]
EDGES = np.array([2264, 2264 + 208, 2264 + 208 + 90])


@pytest.mark.parametrize("world", [1, 2])
def test_proportions_over_ten_thousand_draws(world):
    for rank in range(world):
        stream = sampler(ROWS, place=(rank, world))
        drawn = np.concatenate([stream.indices(e) for e in range(10)])
        assert len(drawn) == 10_000
        share = np.bincount(np.searchsorted(EDGES, drawn, side="right"), minlength=3) / 10_000
        assert np.abs(share - [0.5, 0.3, 0.2]).max() < 0.001
        batches = np.searchsorted(EDGES, drawn.reshape(-1, 8), side="right")
        for part, expected in enumerate((4.0, 2.4, 1.6)):
            counts = (batches == part).sum(1)
            assert abs(counts - expected).max() < 2, "every batch has the mixture"


def test_processes_draw_different_photos_and_miss_none():
    rows = [(100, 100, 1.0)]
    two = [sampler(rows, steps=5, batch_size=10, place=(r, 2)).indices(0) for r in (0, 1)]
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
def test_a_resumed_stream_is_the_unbroken_one(start, world):
    stages = Schedule.of([Stage([BOXES], 2), Stage([MASKS, BOXES], 2, alternate=True), Stage()])
    for rank in range(world):
        whole = sampler(ROWS, stages, place=(rank, world))
        unbroken = [list(whole) for _ in range(6)]
        resumed = sampler(ROWS, stages, place=(rank, world), start=start)
        assert len(resumed) == 1000
        epoch, batch = start
        assert list(resumed) == unbroken[epoch][batch * 8 :]
        resumed.set_epoch(epoch + 1)
        assert list(resumed) == unbroken[epoch + 1]


def test_stages_and_turns_draw_what_serves_their_tasks():
    stages = Schedule.of([Stage([BOXES], 1), Stage([MASKS, BOXES], 1, alternate=True), Stage()])
    stream = sampler(ROWS, stages)
    first = np.searchsorted(EDGES, stream.indices(0), side="right")
    assert set(first) == {0, 1}, "the third part has no boxes"
    assert np.bincount(first)[0] == pytest.approx(1000 * 0.5 / 0.8, abs=1)
    turns = stream.indices(1).reshape(125, 8)
    masks = turns[::2]
    assert ((masks < 764) | (masks >= 2472)).all(), "photos with masks only"
    assert (turns[1::2] < 2472).all(), "photos with boxes only"
    assert set(np.searchsorted(EDGES, stream.indices(2), side="right")) == {0, 1, 2}


@pytest.mark.parametrize(
    ("rows", "stages", "words"),
    [
        ([(10, 10, 0.0)], None, "weight above 0"),
        ([(10, 0, 1.0)], [Stage([BOXES])], "no photo to draw for detection"),
        ([(10, 0, 1.0), (0, 5, 0.0)], [Stage(alternate=True)], "detection"),
        ([(10, 10, -1.0)], None, "negative"),
        ([(10, 10, float("nan"))], None, "finite"),
    ],
)
def test_a_stream_without_photos_is_refused(rows, stages, words):
    with pytest.raises(InputError, match=words):
        sampler(rows, Schedule.of(stages))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Stage(["depth"]), "depth"),
        (lambda: Stage([]), "expected some of"),
        (lambda: Stage([MASKS, MASKS]), "expected some of"),
        (lambda: Stage(epochs=0), "epochs=0"),
        (lambda: Schedule.of([]), "empty"),
        (lambda: Schedule.of([Stage(), Stage()]), "stage 1 of 2"),
    ],
)
def test_bad_stages_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
