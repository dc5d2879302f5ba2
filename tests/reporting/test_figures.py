"""Figure 1: drawn from nothing but the log, the same bytes every time, and never with a measurement made up."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unbraid.errors import TrainingError, UnbraidError
from unbraid.reporting.figures import draw_training, training_figure
from unbraid.reporting.training_log import TrainingLog, split_name

SITES = ("resid_post.2", "resid_post.5", "resid_post.8")


def record(step: int, site: int, lambda2: float, noise: random.Random) -> dict:
    mean = 0.2 * math.exp(-step / 60) + 0.01 * (site + 1) + noise.gauss(0, 0.0005)
    std = 0.1 * math.exp(-step / 90) + (0.03 if lambda2 else 0.06)
    return {
        "loss": 1.5 * math.exp(-step / 40) + 0.1 * (site + 1),
        "updates": step,
        "lambda2": lambda2,
        "tau": mean + std,
        "correlation_mean": mean,
        "correlation_std": std,
        "correlation_top": 0.3 + mean,
        "l0": 40.0 + 30 * math.exp(-step / 40) + site,
        "r2": 0.9 - math.exp(-step / 30) - 0.01 * site,
    }


def write_log(run: Path, steps: int = 200, every: int = 5, sites=SITES, measured: bool = True) -> Path:
    noise = random.Random(0)
    lines = []
    for step in [1, *range(every, steps + 1, every)]:
        saes = {}
        for at, site in enumerate(sites):
            for variant, lambda2 in (("decorrelated", 0.1), ("twin", 0.0)):
                saes[f"{site}_{variant}"] = record(step, at, lambda2, noise)
                if not measured:
                    for name in ("tau", "correlation_mean", "correlation_std", "correlation_top", "r2"):
                        saes[f"{site}_{variant}"][name] = None
        lines.append(json.dumps({"step": step, "tokens": step * 512, "lr": 1e-3, "saes": saes}))
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def texts(figure) -> str:
    from matplotlib.text import Text

    return "\n".join(item.get_text() for item in figure.findobj(Text))


def test_the_same_log_gives_the_same_bytes_in_another_process(tmp_path: Path):
    here = draw_training(write_log(tmp_path / "here"))
    there = write_log(tmp_path / "there")
    subprocess.run([sys.executable, "-m", "unbraid", "figure", str(there)], check=True, capture_output=True)
    assert [path.name for path in here] == ["figure1.png", "figure1.svg"]
    for path in here:
        assert path.read_bytes() == (there / "figures" / path.name).read_bytes()
        assert not list(path.parent.glob(".*")), "nothing half-written is left behind"
    assert b"<dc:date>" not in here[1].read_bytes()


def test_the_png_has_the_resolution_print_asks_for(tmp_path: Path):
    from PIL import Image

    with Image.open(draw_training(write_log(tmp_path))[0]) as image:
        assert image.size == (1650, 1290)
        assert round(image.info["dpi"][0]) == 300


@pytest.mark.parametrize("paper", [False, True])
def test_no_text_overlaps_another_or_leaves_the_figure(tmp_path: Path, paper: bool):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figure = training_figure(TrainingLog.read(write_log(tmp_path) / "metrics.jsonl"), paper=paper)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [
        (item.get_text(), item.get_window_extent())
        for item in figure.findobj(Text)
        if item.get_text() and item.get_visible() and item.get_fontsize() > 0
    ]
    shown = [(text, box) for text, box in boxes if box.width > 0 and box.height > 0]
    assert len(shown) > 30
    width, height = canvas.get_width_height()
    inside = [(text, box) for text, box in shown if box.x0 < width and box.x1 > 0 and box.y0 < height and box.y1 > 0]
    for text, box in inside:
        assert box.x0 >= -0.5 and box.x1 <= width + 0.5 and box.y0 >= -0.5 and box.y1 <= height + 0.5, text
    drawn_by_ticks = {label for axes in figure.axes for label in _out_of_range_labels(axes)}
    for at, (text, box) in enumerate(inside):
        for other, other_box in inside[at + 1 :]:
            if text in drawn_by_ticks or other in drawn_by_ticks:
                continue
            overlap = (
                box.x0 < other_box.x1 and other_box.x0 < box.x1 and box.y0 < other_box.y1 and other_box.y0 < box.y1
            )
            assert not overlap, (text, other)


def _out_of_range_labels(axes) -> set[str]:
    """Tick labels matplotlib keeps but does not draw, because their ticks lie outside the axis."""
    hidden = set()
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not low <= tick.get_loc() <= high:
                hidden.add(tick.label1.get_text())
    return hidden


def test_sites_and_the_twin_are_named(tmp_path: Path):
    words = texts(training_figure(TrainingLog.read(write_log(tmp_path) / "metrics.jsonl"), paper=True))
    for expected in (
        "resid_post 2",
        "resid_post 8",
        "decorrelated",
        r"twin ($\lambda_2 = 0$)",
        "all 6 SAEs:\n200 of 200",
    ):
        assert expected in words


def test_what_was_not_measured_is_said_and_not_drawn(tmp_path: Path):
    log = TrainingLog.read(write_log(tmp_path, measured=False) / "metrics.jsonl")
    assert texts(training_figure(log, paper=True)).count("not measured in this run") == 1 + len(SITES)
    assert texts(training_figure(log)).count("not measured in this run") == 3


def test_the_figure_shows_what_a_penalty_does_and_what_it_costs_and_the_papers_panels_on_request(tmp_path: Path):
    run = write_log(tmp_path)
    titles = [axes.get_title(loc="left") for axes in training_figure(TrainingLog.read(run / "metrics.jsonl")).axes]
    assert [title for title in titles if title] == [
        r"(a) adaptive threshold $\tau$",
        "(b) top correlation of pairs",
        "(c) L0",
        r"$R^2$",
        "(d) loss",
    ]
    assert [path.name for path in draw_training(run)] == ["figure1.png", "figure1.svg"]
    assert [path.name for path in draw_training(run, paper=True)] == ["figure1-paper.png", "figure1-paper.svg"]


def test_a_failed_update_shows_in_its_panel(tmp_path: Path):
    run = write_log(tmp_path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[10:]:
        line["saes"]["resid_post.2_twin"]["updates"] -= 7
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    words = texts(training_figure(TrainingLog.read(run / "metrics.jsonl"), paper=True))
    assert "all 6 SAEs" not in words


@pytest.mark.parametrize(
    ("steps", "sites"), [(1, SITES[:1]), (2, SITES), (60, (*SITES, "mlp_out.1", "attn_out.3", "x.0"))]
)
def test_any_number_of_sites_and_steps_can_be_drawn(tmp_path: Path, steps: int, sites: tuple[str, ...]):
    for path in draw_training(write_log(tmp_path, steps=steps, every=1, sites=sites)):
        assert path.stat().st_size > 1000


def test_a_long_run_is_thinned_to_bin_means_that_end_where_the_run_ended(tmp_path: Path):
    curve = TrainingLog.read(write_log(tmp_path, steps=3000, every=1) / "metrics.jsonl").curve(
        "resid_post.2_twin", "loss"
    )
    thin = curve.thinned(100)
    assert len(thin.step) == 100
    assert (thin.step[-1], thin.value[-1]) == (curve.step[-1], curve.value[-1])
    assert thin.value[:-1].mean() == pytest.approx(curve.value[:-1].mean(), rel=0.01)
    assert np.all(np.diff(thin.step) > 0)


def test_a_missing_empty_or_foreign_log_is_refused_with_one_message(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"metrics\.jsonl"):
        draw_training(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(TrainingError, match="no line yet"):
        draw_training(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(TrainingError, match="saes"):
        draw_training(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    run = write_log(tmp_path)
    (run / "figures").write_text("in the way")
    with pytest.raises(UnbraidError, match="figure1"):
        draw_training(run)


def test_names_fall_into_site_and_variant():
    assert split_name("resid_post.12_twin") == ("resid_post.12", "twin")
    assert split_name("mlp_out.0") == ("mlp_out.0", "")
    assert split_name("anything else") == ("anything else", "")
