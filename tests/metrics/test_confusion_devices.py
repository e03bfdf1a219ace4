"""Over several processes and on a GPU; that the counts are right is tested in the file beside."""

import pytest
import torch
from torch import distributed

from effseg.errors import InputError
from effseg.metrics import SegmentationMetrics
from effseg.metrics.confusion import confusion_counts, scores


def draw(shape, ignored=255):
    generator = torch.Generator().manual_seed(0)
    preds, target = torch.randint(21, (2, *shape), generator=generator)
    target[torch.rand(shape, generator=generator) < 0.2] = ignored
    return preds, target


def score_share(rank, folder, preds, target):
    """One of two processes: the first takes three images, the second one."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    share = slice(0, 3) if rank == 0 else slice(3, 4)
    metrics = SegmentationMetrics()
    metrics.update(preds[share], target[share])
    torch.save(metrics.compute(), folder / f"{rank}.pt")
    torch.save(metrics.counts, folder / f"{rank}_alone.pt")
    distributed.destroy_process_group()


def test_two_processes_with_unequal_shares(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    preds, target = draw((4, 20, 30))
    # fork, because a spawned process would import everything again, which takes seconds.
    context = torch.multiprocessing.get_context("fork")
    workers = [
        context.Process(target=score_share, args=(rank, tmp_path, preds, target)) for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        worker.kill()
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    expected = confusion_counts(preds, target)
    alone = [int(torch.load(tmp_path / f"{rank}_alone.pt").sum()) for rank in (0, 1)]
    assert alone[0] > alone[1] > 0
    assert sum(alone) == int(expected.sum())
    for rank in (0, 1):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(result["confusion"], expected)
        assert torch.equal(result["miou"], scores(expected)["miou"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("ignored", [255, 0, -1, None])
def test_gpu_equals_cpu(ignored):
    preds, target = draw((4, 64, 64), 7 if ignored is None else ignored)
    on_cpu, on_gpu = SegmentationMetrics(21, ignored), SegmentationMetrics(21, ignored).cuda()
    on_cpu.update(preds, target)
    torch.use_deterministic_algorithms(True)
    try:
        on_gpu.update(preds.to(torch.uint8).cuda(), target.cuda())
        logits = torch.nn.functional.one_hot(preds, 21).permute(0, 3, 1, 2).bfloat16()
        on_gpu.update(logits.cuda(), target.cuda())
    finally:
        torch.use_deterministic_algorithms(False)
    result = on_gpu.compute()
    assert result["confusion"].is_cuda
    assert torch.equal(result["confusion"].cpu(), 2 * on_cpu.compute()["confusion"])
    assert float(result["miou"]) == pytest.approx(float(on_cpu.compute()["miou"]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_names_a_wrong_value_at_compute():
    metrics = SegmentationMetrics(21).cuda()
    metrics.update(torch.zeros(1, 2, 2).long().cuda(), torch.full((1, 2, 2), 200).cuda())
    with pytest.raises(InputError, match="target contains the value 200"):
        metrics.compute()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_refuses_nan_at_compute_and_update_does_not_wait():
    logits = torch.zeros(1, 21, 2, 2).cuda()
    target = torch.zeros(1, 2, 2).long().cuda()
    metrics = SegmentationMetrics(21).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.update(logits, target)
        metrics.update(logits * torch.nan, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(InputError, match="nan or infinity"):
        metrics.compute()
