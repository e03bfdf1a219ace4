"""Alternating rounds, ratios of medians, peak memory, the machine's ceiling, the table."""

import time
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.report import SPEED, about, table
from benchmarks.rooflines import Ceiling, least_seconds, measure_ceiling
from benchmarks.timing import Settings, Subject, compare, compare_halving, compare_models
from effseg.benchmark import alternate, model_memory, step_memory


@pytest.fixture
def clock(monkeypatch):
    """A list of one number: the seconds that time.perf_counter gives."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_rounds_alternate_and_medians_are_kept(clock):
    calls = []
    seconds = {"a": iter([1.0, 1.0, 3.0, 1.0, 2.0]), "b": iter([1.0, 1.0, 8.0, 4.0, 4.0])}

    def step(name):
        def run():
            calls.append(name)
            clock[0] += next(seconds[name])

        return run

    steps = {name: step(name) for name in ("a", "b")}
    a, b = compare(steps, Settings(rounds=3, seconds=0.0), items=6)
    assert calls == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert (a["ms"], a["least"], a["most"]) == (2000, 1000, 3000)
    assert (b["ms"], b["least"], b["most"]) == (4000, 4000, 8000)
    assert (a["ratio"], b["ratio"]) == (1.0, 0.5)
    assert (a["per_second"], b["per_second"]) == (3.0, 1.5)


def test_a_round_lasts_about_as_long_as_it_should(clock):
    calls = []

    def run():
        calls.append(clock[0])
        clock[0] += 0.25

    timing = alternate({"a": run}, rounds=2, seconds=2.5)["a"]
    assert len(calls) == 2 + 2 * 10
    assert timing.median == 0.25


def test_roofline_by_hand():
    model = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.ReLU(), nn.MaxPool2d(2))
    flops = 2 * 4 * 8 * 16 * 16
    moved = 4 * (4 * 256 + 32 + 8 * 256)  # input, weights, output
    pool = 4 * (8 * 256 + 8 * 64)
    image = torch.zeros(1, 4, 16, 16)
    assert least_seconds(model, image, Ceiling(1.0, 1e30)) == pytest.approx(flops)
    assert least_seconds(model, image, Ceiling(1e30, 1.0)) == pytest.approx(moved + pool)


def test_ceiling_is_in_operations_and_bytes_a_second():
    ceiling = measure_ceiling(seconds=0.01)
    assert 1e8 < ceiling.flops < 1e15 and 1e7 < ceiling.bandwidth < 1e13


def test_peak_memory_is_what_is_allocated_at_once():
    kept = []

    def step():
        first = torch.ones(1000, dtype=torch.float32)
        second = torch.ones(1000, dtype=torch.float64)
        del first
        kept.append(torch.ones(500, dtype=torch.float32) + second[:1].float())

    assert 12_000 <= step_memory(step) < 16_000
    assert model_memory(nn.Linear(10, 10)) == 4 * 110


def linear():
    model = nn.Linear(1000, 1000)
    x = torch.ones(1, 1000)
    return Subject(model, lambda: model(x).sum())


def test_a_training_step_moves_the_weights_and_its_memory_counts_momentum_and_gradients():
    subject = linear()
    before = subject.model.weight.clone()
    rows = compare_models(
        {"one": lambda: subject}, Settings(rounds=1, seconds=0, train=True), items=1
    )
    assert not torch.equal(subject.model.weight, before)
    weights = 4 * 1001 * 1000 / 2**20
    assert 3 * weights < rows[0]["peak_mib"] < 4.2 * weights
    rows = compare_models({"one": linear}, Settings(rounds=1, seconds=0), items=1)
    assert weights < rows[0]["peak_mib"] < 1.1 * weights


def test_what_fails_has_its_error_and_the_others_are_measured():
    def fail():
        raise RuntimeError("broken on\npurpose")

    makers = {"ours": linear, "peer": fail}
    ours, peer = compare_models(makers, Settings(rounds=1, seconds=0), 1, lambda m: {"gmacs": 1})
    assert ours["ms"] > 0 and ours["gmacs"] == 1
    assert peer == {"name": "peer", "error": "RuntimeError: broken on purpose"}
    text = table([ours, peer], SPEED)
    assert "RuntimeError: broken on purpose" in text.splitlines()[3]
    assert "GMACs" in text and "of the ceiling" not in text
    assert len({len(line) for line in text.splitlines()}) == 1


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_network_that_would_run_eagerly_is_an_error_and_cases_do_not_add_up(monkeypatch):
    graphs, compile = [], nn.Module.compile

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: compile(self, backend=backend))

    def subject(width):
        model = Doubled(4, width)
        return Subject(model, lambda: model(torch.ones(1, 4)))

    makers = {f"{width}": partial(subject, width) for width in range(2, 13)}
    settings = Settings(rounds=1, seconds=0, compile="reduce-overhead")
    for name, make in makers.items():
        before = len(graphs)
        (row,) = compare_models({name: make}, settings, 1)
        assert "error" not in row and "peak_mib" not in row and len(graphs) > before
    rows = compare_models(makers, settings, 1)
    assert "ms" in rows[0] and "recompile_limit" in rows[-1]["error"]


def test_memory_that_ends_halves_the_batch():
    batches = []

    def measure(batch):
        batches.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError("no memory")
        return [{"name": "ours"}]

    assert compare_halving(measure, 8, "cpu") == (2, [{"name": "ours"}])
    assert batches == [8, 4, 2]

    def never(batch):
        raise torch.OutOfMemoryError("no memory")

    assert compare_halving(never, 2, "cpu")[1][0]["error"] == "out of memory with one image"


def test_the_report_names_versions_and_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["speed.py", "a name", "--rounds", "1"])
    facts = about("cpu")
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["command"].endswith("'a name' --rounds 1")
