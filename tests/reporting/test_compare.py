"""Comparing runs: seeds become intervals, and nothing but what differs is told."""

import json
import shutil
from pathlib import Path

import pytest

from unbraid.config import RunConfig
from unbraid.errors import EvaluationError, TrainingError
from unbraid.recipes import tiny
from unbraid.reporting.compare import _look, frontier, frontier_figure, write_comparison
from unbraid.training.changes import record_changes
from unbraid.training.run_folder import RunFolder


def finished(folder: Path, config: RunConfig, r2: float, l0: float = 20.0, **more: float) -> Path:
    RunFolder.create(folder, config)
    names = [config.sae_name(site, variant) for site in config.sites for variant in config.variants]
    metrics = {
        "l0": l0,
        "r2": r2,
        "correlation_top": 0.4,
        "correlation_mean": 0.05,
        "correlation_reduction": None,
    } | more
    (folder / "summary.json").write_text(json.dumps({"saes": dict.fromkeys(names, metrics)}))
    return folder


def evaluated(run: Path, ce_loss_score: float) -> None:
    core = {"model_performance_preservation": {"ce_loss_score": ce_loss_score}}
    names = json.loads((run / "summary.json").read_text())["saes"]
    saes = {name: {"core": core} for name in names} | {"another suite only": {"geometry": {}}}
    (run / "evaluation.json").write_text(json.dumps({"saes": saes}))


def one_sae(**changes) -> RunConfig:
    return tiny().model_copy(
        update={"variants": {"": changes}, "model": tiny().model.model_copy(update={"sites": ["resid_post.0"]})}
    )


def test_runs_that_differ_only_in_their_seed_are_one_point_with_an_interval(tmp_path: Path):
    runs = [finished(tmp_path / str(seed), one_sae(seed=seed), r2) for seed, r2 in enumerate((0.80, 0.82, 0.84))]
    (point,) = frontier(list(runs))
    assert (point.site, point.seeds, point.label) == ("resid_post.0", 3, "all alike")
    estimate = point.metrics["r2"]
    assert estimate.mean == pytest.approx(0.82)
    # Student's t with 2 degrees of freedom: 4.3027 * 0.02 / sqrt(3)
    assert estimate.high - estimate.mean == pytest.approx(0.04968, abs=1e-5)
    assert str(estimate) == "0.82 ± 0.05"


@pytest.mark.parametrize(
    ("group", "setting", "value"),
    [
        ("training", "batch_tokens", 128),
        ("training", "held_out_tokens", 1024),
        ("text", "context_length", 64),
        ("text", "shuffle_seed", 3),
        ("text", "held_out_fraction", 0.3),
        ("buffer", "norm_limit", 1.2),
        ("buffer", "drop_first_position", False),
        ("model", "dtype", "bfloat16"),
        ("model", "batch_contexts", 4),
        ("optimiser", "lr", 1e-5),
    ],
)
def test_runs_that_differ_in_any_setting_are_points_of_their_own(tmp_path: Path, group: str, setting: str, value):
    config = one_sae()
    changed = config.model_copy(update={group: getattr(config, group).model_copy(update={setting: value})})
    points = frontier([finished(tmp_path / "a", config, 0.8), finished(tmp_path / "b", changed, 0.9)])
    assert [point.seeds for point in points] == [1, 1]
    assert any(f"{setting} {value}" in point.label for point in points)


def tell(run: Path, **more) -> Path:
    """The run, with more in its summary."""
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | more))
    return run


@pytest.mark.parametrize(
    "more",
    [
        {"source": {"model": "a", "text": "c"}},
        {"source": {"model": "c", "text": "b"}},
        {"steps": {"planned": 100, "executed": 9}},
    ],
)
def test_runs_that_read_other_text_or_stopped_elsewhere_are_points_of_their_own(tmp_path: Path, more):
    whole = {"source": {"model": "a", "text": "b"}, "steps": {"planned": 100, "executed": 100}}
    runs = [tell(finished(tmp_path / str(seed), one_sae(seed=seed), 0.8), **whole) for seed in range(2)]
    assert [point.seeds for point in frontier(runs)] == [2]
    points = frontier([*runs, tell(finished(tmp_path / "other", one_sae(seed=2), 0.9), **(whole | more))])
    assert sorted(point.seeds for point in points) == [1, 2] and len({point.label for point in points}) == 2


def test_a_learning_rate_that_changed_on_the_way_is_not_that_of_the_whole_run(tmp_path: Path):
    slow = one_sae(**{"optimiser.lr": 1e-5})
    config = slow.model_copy(update={"variants": {"": {}}, "optimiser": slow.variant("").optimiser})
    runs = [finished(tmp_path / str(seed), config.model_copy(update={"seed": seed}), 0.8) for seed in range(2)]
    began = config.model_copy(update={"optimiser": tiny().optimiser, "seed": 2})
    changed = finished(tmp_path / "changed", began, 0.9)
    record_changes(changed, 400, {"optimiser.lr": 1e-5, "training.threads": 2})
    points = frontier([*runs, changed])
    assert sorted(point.seeds for point in points) == [1, 2]
    assert any("optimiser.lr 1e-05 after step 400" in point.label for point in points)


def test_the_same_run_twice_is_one_seed_also_through_another_path_or_as_a_copy(tmp_path: Path):
    run = finished(tmp_path / "run", one_sae(), 0.8)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    other = finished(tmp_path / "other", one_sae(seed=1), 0.9)
    (point,) = frontier([run, run, tmp_path / "other" / ".." / "run", copy, other])
    assert point.seeds == 2 and point.metrics["r2"].mean == pytest.approx(0.85)


def test_an_sae_trained_beside_others_is_a_seed_of_the_same_trained_alone(tmp_path: Path):
    alone = finished(tmp_path / "alone", one_sae(seed=3), 0.8)
    both = tiny().model_copy(update={"variants": {"a": {}, "b": {"decorrelation.lambda2": 0.0}}})
    points = frontier([alone, finished(tmp_path / "both", both, 0.9)])
    assert sorted(point.seeds for point in points if point.site == "resid_post.0") == [1, 2]


def test_no_two_of_many_settings_look_alike():
    looks = [(look["color"], look["marker"]) for look in map(_look, range(200))]
    assert len(set(looks)) == 200


def test_points_are_told_apart_by_the_settings_in_which_they_differ(tmp_path: Path):
    runs = [
        finished(tmp_path / str(at), one_sae(**{"decorrelation.lambda2": lambda2, "sae.lambda1": 0.02}), 0.8)
        for at, lambda2 in enumerate((0.0, 0.1))
    ]
    assert [point.label for point in frontier(list(runs))] == ["lambda2 0.0", "lambda2 0.1"]
    assert str(frontier(list(runs))[0].metrics["r2"]) == "0.8", "one seed has no interval"


def test_sites_are_kept_apart_and_a_metric_not_measured_everywhere_is_left_out(tmp_path: Path):
    runs = [finished(tmp_path / str(seed), tiny().model_copy(update={"seed": seed}), 0.8) for seed in (0, 1)]
    evaluated(runs[0], 0.9)
    points = frontier(list(runs))
    assert {point.site for point in points} == {"resid_post.0", "resid_post.1"}
    assert all(point.seeds == 2 and "ce_loss_score" not in point.metrics for point in points)
    evaluated(runs[1], 0.8)
    points = frontier(list(runs))
    assert [point.metrics["ce_loss_score"].mean for point in points] == pytest.approx([0.85] * len(points))


def test_a_damaged_evaluation_is_refused_by_name(tmp_path: Path):
    run = finished(tmp_path / "run", tiny(), 0.8)
    (run / "evaluation.json").write_text('{"saes"')
    with pytest.raises(EvaluationError, match=r"evaluation\.json"):
        frontier([run])


def test_the_frontier_is_drawn_with_a_panel_a_metric_and_the_same_bytes_each_time(tmp_path: Path):
    runs = [
        finished(tmp_path / str(seed), tiny().model_copy(update={"seed": seed}), 0.8 + seed / 50) for seed in range(3)
    ]
    points = frontier(list(runs))
    figure = frontier_figure(points)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [r"$R^2$", "top correlation", "mean correlation"]
    first = [path.read_bytes() for path in write_comparison(points, tmp_path / "one")]
    second = [path.read_bytes() for path in write_comparison(points, tmp_path / "two")]
    assert first == second


def test_nothing_to_compare_and_unfinished_runs_are_refused(tmp_path: Path):
    with pytest.raises(EvaluationError, match="no run"):
        frontier([])
    RunFolder.create(tmp_path / "run", tiny())
    with pytest.raises(TrainingError, match="summary"):
        frontier([tmp_path / "run"])
