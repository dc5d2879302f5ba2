"""docs/study.md: every number comes from a file of results, and the files hold what their own settings say."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unbraid.decorrelation.penalty import SelectiveDecorrelation

ROOT = Path(__file__).parents[2]
STUDY, PAGE = ROOT / "study", ROOT / "docs" / "study.md"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(STUDY))
    return pytest.importorskip("page")


def test_the_page_is_what_the_results_say():
    done = subprocess.run([sys.executable, STUDY / "page.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_of_named_features_is_what_the_answers_say(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    naming = pytest.importorskip("naming")
    assert naming.page() == (ROOT / "docs" / "naming.md").read_text(encoding="utf-8")
    drawn, answers = (json.loads(path.read_text(encoding="utf-8")) for path in (naming.SHEETS, naming.ANSWERS))
    assert len(drawn["sheets"]) == len(answers["names"]) == len(answers["choices"]) == naming.FEATURES
    assert {one["answer"] for one in drawn["sheets"]} == set("ABC"), "the place of the right set says nothing"


def test_a_changed_result_is_noticed(page, tmp_path, monkeypatch):
    for path in (STUDY / "results").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    assert page.page() == PAGE.read_text(encoding="utf-8")
    first, *others = (tmp_path / "grid.jsonl").read_text(encoding="utf-8").splitlines()
    line = json.loads(first)
    line["metrics"]["f1"] -= 0.1
    (tmp_path / "grid.jsonl").write_text("\n".join([json.dumps(line), *others]) + "\n", encoding="utf-8")
    assert page.page() != PAGE.read_text(encoding="utf-8")


def test_a_cell_of_the_page_is_the_mean_of_its_lines():
    trials = [json.loads(line) for line in (STUDY / "results" / "grid.jsonl").read_text().splitlines()]
    own = [
        line["metrics"]["f1"]
        for line in trials
        if (line["trial"]["architecture"], line["trial"]["method"]) == ("batch_topk", "codes")
    ]
    assert len(own) >= 3
    shown = f"{statistics.mean(own):.3f} ({statistics.stdev(own):.3f})".replace("0.", ".")
    (row,) = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| codes |")][:1]
    assert shown in row


def test_numbers_of_the_prose_are_looked_up_and_not_written_down():
    prose = "\n".join(line for line in (STUDY / "page.md").read_text(encoding="utf-8").splitlines() if line[:1] != "|")
    written = page_numbers(prose)
    assert not written, f"in study/page.md, but not from a file of results: {written}"


def page_numbers(text: str) -> list[str]:
    """Measurements written down by hand: decimals such as .604 that no directive or code span holds."""
    import re

    text = re.sub(r"\{\{.*?\}\}|`[^`]*`|^    .*$", "", text, flags=re.MULTILINE)
    return re.findall(r"(?<![\w.])-?0?\.\d{3,}", text)


def test_a_difference_is_noise_when_its_interval_holds_zero(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    from estimates import difference

    zeros = {0: 0.0, 1: 0.0, 2: 0.0}
    clear = difference({0: 1.0, 1: 1.1, 2: 0.9}, zeros)
    assert not clear.noise and difference({0: 1.0, 1: -1.0}, zeros).noise and difference({0: 1.0}, zeros).noise
    assert clear.mean == pytest.approx(1.0) and clear.reach == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)


def test_metrics_at_an_l0_lie_between_those_of_its_neighbours(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    from estimates import at_l0

    several = [{"l0": 8.0, "f1": 0.2, "gap": None}, {"l0": 4.0, "f1": 0.6, "gap": 1.0}, {"l0": 2.0, "f1": 0.1}]
    assert at_l0(several, 5.0) == pytest.approx({"l0": 5.0, "f1": 0.5})
    assert at_l0(several, 9.0) == {} and at_l0(several, 1.0) == {}


@pytest.mark.parametrize("moves", ["both", "rarer"])
def test_a_hybrid_without_a_variation_is_the_librarys_penalty(monkeypatch, moves):
    monkeypatch.syspath_prepend(str(STUDY))
    hybrids = pytest.importorskip("hybrids")
    draws = torch.Generator().manual_seed(0)
    f_BN = torch.rand(64, 40, generator=draws).sub(torch.linspace(0.3, 0.95, 40)).clamp(min=0)
    decoder_ND = torch.randn(40, 12, generator=draws)
    own, expected = decoder_ND.clone().requires_grad_(), decoder_ND.clone().requires_grad_()
    penalty, _ = hybrids.Hybrid(1, moves=moves, floor=0.2)(f_BN, decoder=own)
    settings = {"fraction": hybrids.FRACTION, "space": "decoder", "path": "tiled", "floor": 0.2, "push": moves}
    value, _ = SelectiveDecorrelation(**settings)(f_BN, decoder=expected)
    penalty.backward()
    value.backward()
    assert float(expected.grad.abs().sum()) > 0
    torch.testing.assert_close(own.grad, expected.grad)
