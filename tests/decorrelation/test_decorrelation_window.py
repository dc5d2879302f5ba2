"""Select on a window, penalise on the batch: when S changes, what is remembered, and what the log says of it."""

import copy
import json
import math

import naive
import pytest
import torch
from made_codes import SparseRows, planted_codes, sparse_codes

from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.decorrelation.window import CodesWindow, Threshold, chance_level
from unbraid.errors import CodesError, ConfigError
from unbraid.kernels.codes import Codes


def batches(count: int, n_features: int = 200) -> list[dict]:
    return [
        dict(zip(("indices", "values"), sparse_codes(64, n_features, 8, seed=seed), strict=True))
        | {"n_features": n_features}
        for seed in range(count)
    ]


def dense(batch: dict) -> torch.Tensor:
    return Codes.from_topk(batch["indices"], batch["values"], batch["n_features"]).to_dense()


def test_selection_is_of_the_last_batches_and_the_penalty_of_this_one():
    decorrelate = SelectiveDecorrelation(0.01, window=3)
    made = batches(7)
    for step, batch in enumerate(made):
        batch = batch | {"values": batch["values"].double().requires_grad_()}
        penalty, stats = decorrelate(**batch)
        if step < 2:
            assert (stats.path, penalty.item(), stats.pairs.numel()) == ("filling", 0.0, 0)
            continue
        assert stats.refreshed == (step in (2, 5))
        chosen_at = step - (step - 2) % 3
        windowed = torch.cat([dense(earlier).double() for earlier in made[chosen_at - 2 : chosen_at + 1]])
        chosen = naive.select(Codes.from_dense(windowed), 0.01, "cosine")
        assert stats.pairs.tolist() == torch.stack([chosen.first, chosen.second], dim=1).tolist()
        f_BN = dense(batch).detach().requires_grad_()
        expected, correlations = naive.penalty(
            f_BN, chosen.first, chosen.second, chosen.nominal, chosen.mean + chosen.std, "cosine"
        )
        assert abs(penalty - expected) <= 1e-10
        torch.testing.assert_close(stats.correlations, correlations.detach(), rtol=0, atol=1e-10)
        penalty.backward()
        expected.backward()
        torch.testing.assert_close(batch["values"].grad, f_BN.grad.gather(1, batch["indices"]), rtol=0, atol=1e-10)


def test_refresh_may_be_slower_than_the_window_and_still_sees_the_newest_batches():
    made = batches(12)
    slow, fast = SelectiveDecorrelation(0.01, window=2, refresh=5), SelectiveDecorrelation(0.01, window=2)
    refreshed = [slow(**batch)[1].refreshed for batch in made]
    assert [step for step, is_new in enumerate(refreshed) if is_new and step > 0] == [1, 6, 11]
    for batch in made[:6]:
        fast(**batch)
    late = SelectiveDecorrelation(0.01, window=2)
    for batch in made[10:]:
        _, stats = late(**batch)
    assert torch.equal(stats.pairs, slow(**made[0])[1].pairs)


def test_every_t_th_call_acts_with_weight_t():
    made = batches(7)
    always, every_third = SelectiveDecorrelation(0.01), SelectiveDecorrelation(0.01, interval=3)
    for step, batch in enumerate(made):
        penalty, stats = every_third(**batch)
        expected, _ = always(**batch)
        assert stats.penalised == (step % 3 == 0)
        assert penalty.item() == (pytest.approx(3 * expected.item()) if step % 3 == 0 else 0.0)


def test_the_paper_form_has_no_state_and_its_settings_are_the_default():
    decorrelate = SelectiveDecorrelation()
    batch = batches(1)[0]
    first = decorrelate(**batch)[0]
    assert decorrelate.state_dict() == {}
    assert decorrelate(**batch)[0] == first


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 3},
        {"window": 2, "refresh": 5},
        {"window": 3, "interval": 2, "threshold": "running"},
        {"interval": 3},
        {"threshold": "running"},
        {"window": 2, "space": "co-active"},
        {"space": "decoder", "refresh": 3, "scan_rows": 30},
    ],
)
def test_a_state_saved_anywhere_goes_on_to_the_same_bytes(settings):
    made = batches(12)
    decoder_ND = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))

    def call(decorrelate: SelectiveDecorrelation, batch: dict):
        batch = batch | {"values": batch["values"].clone().requires_grad_()}
        leaf = decoder_ND.clone().requires_grad_()
        penalty, stats = decorrelate(**batch, decoder=leaf)
        (penalty + 0 * leaf.sum() + 0 * batch["values"].sum()).backward()
        return penalty.item(), stats.scalars(), batch["values"].grad, leaf.grad

    whole = SelectiveDecorrelation(0.02, **settings)
    expected = [call(whole, batch) for batch in made]
    for stop in (1, 4, 5, 7):
        before = SelectiveDecorrelation(0.02, **settings)
        for batch in made[:stop]:
            call(before, batch)
        state = copy.deepcopy(before.state_dict())
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
        after = SelectiveDecorrelation(0.02, **settings)
        after.load_state_dict(state)
        for batch, (value, scalars, values_grad, decoder_grad) in zip(made[stop:], expected[stop:], strict=True):
            found = call(after, batch)
            assert found[:2] == (value, scalars)
            assert torch.equal(found[2], values_grad) and torch.equal(found[3], decoder_grad)


@pytest.mark.parametrize("space", ["codes", "decoder", "co-active"])
def test_every_third_call_penalises_three_times_as_hard(space):
    """Value and gradient of a call that acts are `interval` times those of a penalty on every call; others are zero."""
    decoder_ND = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    settings: dict = {"scan_rows": 200} if space == "decoder" else {}
    each, third = (SelectiveDecorrelation(0.05, space=space, interval=interval, **settings) for interval in (1, 3))
    for call, batch in enumerate(batches(7)):
        found = []
        for decorrelate in (each, third):
            leaves = batch["values"].clone().requires_grad_(), decoder_ND.clone().requires_grad_()
            penalty, stats = decorrelate(**batch | {"values": leaves[0]}, decoder=leaves[1])
            penalty.backward()
            found.append((penalty.item(), stats.penalty, leaves[space != "codes"].grad))
        (value, logged, gradient), (thirds, thirds_logged, thirds_gradient) = found
        assert value > 0 and float(gradient.abs().sum()) > 0
        if call % 3 == 0:
            assert (thirds, thirds_logged) == (pytest.approx(3 * value), logged)
            torch.testing.assert_close(thirds_gradient, 3 * gradient)
        else:
            assert thirds == 0 and (thirds_gradient is None or not thirds_gradient.any())


def test_evaluation_mode_reads_what_is_remembered_and_changes_nothing():
    made = batches(6)
    decorrelate = SelectiveDecorrelation(0.01, window=2, threshold="running")
    for batch in made[:3]:
        decorrelate(**batch)
    state = copy.deepcopy(decorrelate.state_dict())
    decorrelate.eval()
    _, stats = decorrelate(**made[4])
    assert not stats.refreshed and stats.pairs.numel()
    assert all(torch.equal(tensor, state[name]) for name, tensor in decorrelate.state_dict().items())


def test_a_window_holds_the_last_batches_in_order_and_as_little_as_it_can():
    window = CodesWindow(2)
    made = [Codes.from_topk(batch["indices"], batch["values"], 200) for batch in batches(3)]
    made.insert(1, Codes.from_dense(torch.zeros(5, 200)))
    for codes in made:
        window.push(codes)
    assert (window.n_batches, window.full) == (2, True)
    assert torch.equal(window.codes(200).to_dense(), torch.cat([codes.to_dense() for codes in made[-2:]]))
    held = sum(tensor.numel() * tensor.element_size() for tensor in window.state_dict().values())
    assert held <= 2 * 64 * 8 * 8 + 2 * 64 * 8 + 16
    window.clear()
    assert window.n_batches == 0 and window.codes(200).n_rows == 0


def test_every_refresh_logs_what_the_selection_rests_on():
    decorrelate = SelectiveDecorrelation(window=2)
    lines = [decorrelate(codes=planted_codes(2048, 4096, 100, seed=seed)[0])[1].scalars() for seed in range(4)]
    assert {"low_support", "limit", "mean", "std", "tau", "cut", "pairs", "n_live", "co_activations"} <= set(lines[1])
    assert "overlap" not in lines[1] and 0 < lines[3]["overlap"] < 1
    assert lines[3]["tau"] == lines[3]["mean"] + lines[3]["std"] < lines[3]["cut"]
    assert json.loads(json.dumps(lines)) == lines


def test_codes_of_another_width_are_refused_once_something_is_remembered():
    decorrelate = SelectiveDecorrelation(window=2)
    for batch in batches(2):
        decorrelate(**batch)
    with pytest.raises(CodesError, match="300 features, but the remembered selection is for 200"):
        decorrelate(**batches(1, n_features=300)[0])


def test_codes_of_another_width_are_refused_while_the_window_fills():
    decorrelate = SelectiveDecorrelation(window=3)
    decorrelate(**batches(1, n_features=300)[0])
    for call in (decorrelate, decorrelate.advance):
        with pytest.raises(CodesError, match="200 features, but the remembered batches are for 300"):
            call(**batches(1)[0])


def test_a_running_threshold_is_the_exponential_mean_of_what_it_saw():
    threshold = Threshold("running", tau=0.0, decay=0.9, floor=None)
    assert threshold(0.1, 0.2, 10, 10) == pytest.approx(0.3)
    assert threshold(0.2, 0.3, 10, 10) == pytest.approx(0.9 * 0.3 + 0.1 * 0.5)
    threshold.eval()
    assert threshold(1.0, 1.0, 10, 10) == threshold(1.0, 1.0, 10, 10)


def test_a_fixed_threshold_ignores_the_batch_and_a_floor_holds_any_of_them():
    assert Threshold("fixed", 0.4, 0.9, None)(0.9, 0.9, 10, 10) == 0.4
    assert Threshold("fixed", 0.4, 0.9, 0.5)(0.0, 0.0, 10, 10) == 0.5
    assert Threshold("batch", 0.4, 0.9, 0.25)(0.01, 0.02, 10, 10) == 0.25
    assert Threshold("batch", 0.4, 0.9, 0.25)(0.3, 0.02, 10, 10) == pytest.approx(0.32)
    assert Threshold("running", 0.4, 0.9, "chance")(0.0, 0.0, 384, 96) == chance_level(384, 96)


def test_the_chance_level_is_the_largest_overlap_of_random_directions():
    assert chance_level(384, 96) == pytest.approx(math.sqrt(2 * math.log(384) / 96))
    rows = torch.nn.functional.normalize(torch.randn(2000, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-1)
    assert float(cosines.max(1).values.mean()) == pytest.approx(chance_level(2000, 512), rel=0.2)


def test_a_floor_ends_the_ratchet():
    """As pairs come apart mu + sigma falls and keeps pushing; with a floor, pairs below it are left alone."""
    decoder_ND = torch.randn(60, 24, generator=torch.Generator().manual_seed(0))
    ends = {}
    for floor in (None, 0.5):
        rows = torch.nn.functional.normalize(decoder_ND, dim=1).requires_grad_()
        decorrelate = SelectiveDecorrelation(0.3, space="decoder", path="tiled", floor=floor)
        for _ in range(150):
            penalty, stats = decorrelate(decoder=rows)
            (gradient,) = torch.autograd.grad(penalty, rows) if penalty.requires_grad else (torch.zeros_like(rows),)
            with torch.no_grad():
                rows.sub_(2.0 * gradient).div_(rows.norm(dim=1, keepdim=True))
        ends[floor] = stats
    assert ends[None].tau < 0.16 < ends[0.5].tau == 0.5
    assert ends[0.5].penalty < 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.0}, "fraction = 0.0"),
        ({"fraction": 1.5}, "fraction = 1.5"),
        ({"window": 0}, "window = 0"),
        ({"refresh": 0}, "refresh = 0"),
        ({"interval": -1}, "interval = -1"),
        ({"tau": 2.0}, "tau = 2.0"),
    ],
)
def test_settings_out_of_range_are_named_with_their_value(settings, message):
    with pytest.raises(ConfigError, match=message):
        SelectiveDecorrelation(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "0 forms of codes"),
        ({"f": torch.ones(2, 3), "codes": SparseRows(*[torch.zeros(1)] * 3, 3)}, "2 forms of codes"),
        ({"indices": torch.zeros(2, 3, dtype=torch.int64)}, "belong together"),
        ({"f": torch.ones(2, 3, 4)}, r"\(2, 3, 4\); expected \[B, N\]"),
        ({"f": -torch.ones(2, 3)}, "range from -1.0"),
        ({"f": torch.tensor([[1.0, float("nan")]])}, "range from nan"),
        ({"f": torch.tensor([[1.0, float("inf")]])}, "to inf"),
        ({"f": torch.ones(2, 3, dtype=torch.int64)}, "torch.int64"),
        (
            {"indices": torch.full((1, 2), 7), "values": torch.ones(1, 2), "n_features": 7},
            "from 7 to 7; expected 0 to 6",
        ),
        (
            {"indices": torch.zeros(1, 3, dtype=torch.int64), "values": torch.ones(1, 2), "n_features": 7},
            "differ in shape",
        ),
    ],
)
def test_codes_that_cannot_be_codes_are_refused(arguments, message):
    with pytest.raises(CodesError, match=message):
        SelectiveDecorrelation()(**arguments)
