"""What may be handed to a penalty and to `Codes`: the right number, or one sentence that says what is wrong."""

import pytest
import torch
from made_codes import SparseRows, sparse_codes
from sae_settings import sae_settings
from torch import Tensor

from unbraid import SelectiveDecorrelation
from unbraid.errors import ActivationError, CodesError, UnbraidError
from unbraid.sae import Codes, build
from unbraid.sae.build import ARCHITECTURES

B, K, N = 200, 6, 40
LAYOUT = {"offsets": [0, 2, 4], "indices": [1, 2, 0, 3], "values": [1.0, 2.0, 3.0, 4.0], "n_features": 4}
WRONG = {
    "unsorted ids": {"indices": [2, 1, 0, 3]},
    "a feature twice in a row": {"indices": [1, 1, 0, 3]},
    "a stored zero": {"values": [1.0, 0.0, 3.0, 4.0]},
    "a negative value": {"values": [1.0, -2.0, 3.0, 4.0]},
    "NaN": {"values": [1.0, float("nan"), 3.0, 4.0]},
    "infinity": {"values": [1.0, float("inf"), 3.0, 4.0]},
    "whole numbers": {"values": [1, 2, 3, 4]},
    "complex numbers": {"values": [1j, 2, 3, 4]},
    "an id beyond the last": {"indices": [1, 2, 0, 4]},
    "a negative id": {"indices": [-1, 2, 0, 3]},
    "fractional ids": {"indices": [1.0, 2.0, 0.0, 3.0]},
    "truth values as ids": {"indices": [False, True, False, True]},
    "offsets beyond the entries": {"offsets": [0, 2, 9]},
    "offsets before the entries end": {"offsets": [0, 2]},
    "offsets that fall": {"offsets": [0, 3, 2, 4]},
    "offsets that start late": {"offsets": [1, 2, 4]},
    "no offsets": {"offsets": []},
    "fewer values than ids": {"values": [1.0, 2.0, 3.0]},
    "a matrix of ids": {"indices": [[1, 2], [0, 3]]},
    "no features": {"n_features": 0},
    "a width of True": {"n_features": True},
}


def parts_of(change: dict) -> tuple:
    parts = LAYOUT | change
    tensors = (torch.tensor(parts[name]) for name in ("offsets", "indices", "values"))
    offsets, *rest = tensors
    return offsets.long() if offsets.numel() == 0 else offsets, *rest, parts["n_features"]


def assert_one_sentence(error: UnbraidError) -> None:
    assert "expected" in str(error) and "\n" not in str(error) and len(str(error)) < 300


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_layout_that_is_not_that_of_codes_is_refused(change):
    for attempt in (
        lambda parts: Codes(*parts),
        lambda parts: SelectiveDecorrelation()(codes=SparseRows(*parts)),
    ):
        with pytest.raises(CodesError) as caught:
            attempt(parts_of(change))
        assert_one_sentence(caught.value)
    assert Codes(*parts_of({})).to_dense().tolist() == [[0, 1, 2, 0], [3, 0, 0, 4]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_whole_dtype_are_the_same_codes(dtype):
    offsets, indices, values, n_features = parts_of({})
    codes = Codes(offsets.to(dtype), indices.to(dtype), values, n_features)
    assert codes.indices.dtype == codes.offsets.dtype == torch.int64
    found, _ = SelectiveDecorrelation(1.0)(codes=SparseRows(offsets.to(dtype), indices.to(dtype), values, n_features))
    assert found.item() == SelectiveDecorrelation(1.0)(codes.to_dense())[0].item()


def test_any_order_of_top_k_gives_the_same_penalty_and_gradient():
    indices_BK, values_BK = sparse_codes(B, N, K, seed=0)
    ids, order = indices_BK.sort(1)
    results = []
    for indices, values in ((indices_BK, values_BK), (ids, values_BK.gather(1, order))):
        leaf = values.clone().requires_grad_()
        penalty, stats = SelectiveDecorrelation(0.05)(indices=indices, values=leaf, n_features=N)
        penalty.backward()
        results.append((penalty.item(), stats.tau, torch.zeros(B, N).scatter(1, indices, leaf.grad)))
    assert results[0][:2] == results[1][:2] and results[0][0] > 0
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize(
    "change",
    [
        {"values": torch.full((B, K), -1.0)},
        {"values": torch.full((B, K), float("nan"))},
        {"values": torch.full((B, K), float("inf"))},
        {"values": torch.ones(B, K, dtype=torch.int64)},
        {"values": torch.ones(B)},
        {"values": torch.ones(B, K).to(torch.float8_e4m3fn)},
        {"values": torch.ones(B, K, device="meta")},
        {"indices": torch.full((B, K), N)},
        {"indices": torch.full((B, K), -1)},
        {"indices": torch.full((B, K), 1.7)},
        {"indices": torch.zeros(B, K + 1, dtype=torch.int64)},
        {"indices": torch.zeros(B, K, dtype=torch.int64, device="meta")},
        {"n_features": 0},
    ],
)
def test_pairs_of_ids_and_values_that_are_not_codes_are_refused(change):
    indices_BK, values_BK = sparse_codes(B, N, K, seed=0)
    with pytest.raises(CodesError) as caught:
        SelectiveDecorrelation()(**{"indices": indices_BK, "values": values_BK, "n_features": N} | change)
    assert_one_sentence(caught.value)


def dense_codes() -> Tensor:
    return (torch.rand(64, N, generator=torch.Generator().manual_seed(0)) - 0.7).relu()


@pytest.mark.parametrize("path", ["coactive", "blocks"])
@pytest.mark.parametrize("scale", [1.0, 1e-22, 1e-38, 1e-40, 1e22, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_of_any_precision_and_size_have_the_penalty_of_the_same_numbers_in_float64(dtype, scale, path):
    f_BN = (dense_codes() * scale).to(dtype)
    if not bool(f_BN.isfinite().all()) or not bool((f_BN > 0).any()):
        return
    penalty, stats = SelectiveDecorrelation(0.02, path=path, **({"block": 64} if path == "blocks" else {}))(f_BN)
    expected, exact = SelectiveDecorrelation(0.02)(f_BN.double())
    assert penalty.item() == pytest.approx(expected.item(), abs=1e-5) and penalty.item() > 0.02
    assert stats.tau == pytest.approx(exact.tau, abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("settings", [{"path": "tiled"}, {"scan_rows": 50}, {"space": "co-active"}])
def test_decoder_rows_that_are_not_finite_are_named(settings, bad):
    decoder_ND = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
    decoder_ND[3, 2] = bad
    with pytest.raises(CodesError, match=r"rows 3 hold NaN or infinity") as caught:
        SelectiveDecorrelation(**{"space": "decoder", "fraction": 0.02} | settings)(dense_codes(), decoder=decoder_ND)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-18, 1e18, 1e30])
def test_decoder_rows_of_any_size_have_the_same_overlaps(scale):
    decoder_ND = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
    decoder_ND[7] = 0
    sizes = torch.ones(N, 1)
    sizes[::2] = scale
    settings = {"space": "decoder", "path": "tiled", "fraction": 0.02}
    expected, exact = SelectiveDecorrelation(**settings)(decoder=decoder_ND)
    penalty, stats = SelectiveDecorrelation(**settings)(decoder=decoder_ND * sizes)
    assert expected.item() > 0.1 and penalty.item() == pytest.approx(expected.item(), rel=1e-4)
    assert stats.tau == pytest.approx(exact.tau, rel=1e-5)


@pytest.mark.parametrize(
    "decoder",
    [
        torch.ones(N, 0),
        torch.ones(N),
        torch.ones(N + 1, 8),
        torch.ones(N, 8, dtype=torch.int64),
        torch.ones(N, 8).to("meta"),
    ],
)
def test_decoders_that_do_not_fit_are_refused(decoder):
    with pytest.raises(CodesError) as caught:
        SelectiveDecorrelation(space="co-active")(dense_codes(), decoder=decoder)
    assert_one_sentence(caught.value)


def test_codes_of_another_type_are_named():
    with pytest.raises(CodesError, match="codes= is a Tensor; expected an object with offsets"):
        SelectiveDecorrelation()(codes=dense_codes())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(5, 1), (16,), (5, 9), (0, 7)])
def test_activations_and_codes_of_another_width_are_refused(architecture, shape):
    sae = build(sae_settings(architecture, n_features=32, k=4), 8, torch.Generator().manual_seed(0))
    with pytest.raises(ActivationError, match=r"expected \[\.\.\., 8\]") as caught:
        sae.encode(torch.zeros(shape))
    assert_one_sentence(caught.value)
    with pytest.raises(CodesError, match=r"expected \[\.\.\., 32\]") as caught:
        sae.decode(torch.zeros(shape))
    assert_one_sentence(caught.value)
    for rows in ((), (3,), (0,), (2, 3)):
        f = sae.encode(torch.randn(*rows, 8))
        assert f.shape == (*rows, 32) and sae.decode(f).shape == (*rows, 8)
