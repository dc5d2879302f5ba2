"""Where the buffer's rows lie, decided from bytes; and that a batch is the same rows from either place."""

import pytest
import torch

from unbraid.activations import row_store
from unbraid.activations.buffer import ActivationBuffer
from unbraid.activations.row_store import RowStore, fits, place_of_rows
from unbraid.config import BufferConfig
from unbraid.distributed.cost import Job, bytes_of_rank
from unbraid.kernels import host

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "free, place", [(None, CPU), (0, CPU), (1199, CPU), (1200, GPU), (10_000, GPU)], ids=lambda value: str(value)
)
def test_rows_lie_on_the_device_when_they_fit_into_half_of_what_is_left(monkeypatch, free, place):
    monkeypatch.setattr(row_store, "free_bytes", lambda device: free)
    assert place_of_rows(100, GPU, reserved=1000) == place


def test_on_a_cpu_memory_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(row_store, "free_bytes", lambda device: 1 / 0)
    assert place_of_rows(1 << 60, CPU, reserved=0) == CPU


def test_the_buffer_counts_the_bytes_of_every_site(monkeypatch):
    asked = []
    monkeypatch.setattr(row_store, "place_of_rows", lambda *arguments: asked.append(arguments) or CPU)
    RowStore(100, [8, 16], torch.bfloat16, GPU, reserved=7)
    assert asked == [(100 * 24 * 2, GPU, 7)]


def test_rows_of_gemma_2_2b_fit_beside_one_wide_sae_on_24_gib_and_beside_six_on_80():
    rows, one = 2048 * 128 * 2304 * 4, bytes_of_rank(Job(2048, 2304, 65_536, 64), 1)
    in_bfloat16 = 5 << 30
    assert fits(rows, (24 << 30) - in_bfloat16, one)
    assert fits(3 * rows, (80 << 30) - in_bfloat16, 6 * one) and not fits(3 * rows, (40 << 30) - in_bfloat16, 6 * one)


@pytest.fixture
def pinned(monkeypatch):
    """A device apart from the host, played by the CPU: what is pinned, what is copied, and from where."""
    asked = {"pinned": 0}
    empty = torch.empty

    def counted(*shape, pin_memory=False, **settings):
        asked["pinned"] += pin_memory
        return empty(*shape, **settings)

    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    to = torch.Tensor.to

    def moved(tensor, *arguments, **settings):
        onto = [CPU if getattr(argument, "type", "") == "cuda" else argument for argument in arguments]
        return to(tensor, *onto, **settings)

    monkeypatch.setattr(torch.Tensor, "to", moved)
    return asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_goes_through_pinned_memory_when_rows_do_not_fit(monkeypatch, pinned, dtype):
    monkeypatch.setattr(row_store, "free_bytes", lambda device: 0)
    apart, alone = RowStore(20, [4, 6], dtype, GPU), RowStore(20, [4, 6], dtype, CPU)
    slots = torch.tensor([7, 3, 19, 0])
    rows = [torch.randn(4, 4), torch.randn(4, 6)]
    for store in (apart, alone):
        store.write(slots, rows)
    wanted = slots.flip(0)[:3]
    for mine, theirs, given in zip(apart.batch(wanted), alone.batch(wanted), rows, strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)
        assert torch.equal(mine, given.to(dtype).float().flip(0)[:3])
    assert pinned["pinned"] == 2


def test_what_is_saved_is_the_same_from_a_device(monkeypatch):
    store = RowStore(20_000, [3], torch.float32, CPU)
    slots = torch.randperm(20_000)[:17_000]
    store.write(slots, [torch.randn(17_000, 3)])
    near = store.stored(0, slots)
    monkeypatch.setattr(host, "reading_waits", lambda tensor: True)
    assert torch.equal(store.stored(0, slots), near)
    assert store.stored(0, slots[:0]).shape == (0, 3)


@pytest.mark.gpu
def test_rows_on_a_gpu_are_those_of_the_cpu(monkeypatch):
    from fake_source import FakeSource

    batches = {}
    for name, free in {"cpu": None, "device": 1 << 40, "pinned": 0}.items():
        monkeypatch.setattr(row_store, "free_bytes", lambda device, free=free: free)
        device = "cpu" if name == "cpu" else "cuda"
        buffer = ActivationBuffer(FakeSource(64, n_sites=2), BufferConfig(contexts=16), 16, seed=0, device=device)
        assert buffer.place.type == ("cuda" if name == "device" else "cpu")
        batches[name] = [part.cpu() for _ in range(20) for part in buffer.next_batch()]
    for name in ("device", "pinned"):
        for mine, theirs in zip(batches[name], batches["cpu"], strict=True):
            assert torch.equal(mine, theirs)
