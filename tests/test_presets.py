"""A preset is one method on any recipe, fitted to the width, k and steps of the run."""

from typing import Any

import pytest

from unbraid.cli import main
from unbraid.config import RunConfig, overridden
from unbraid.errors import ConfigError
from unbraid.presets import PRESETS, with_preset
from unbraid.recipes import RECIPES


def asked(recipe: str, preset: str, given: dict[str, Any]) -> RunConfig:
    """A recipe with a preset, and settings by hand over both."""
    return overridden(with_preset(RECIPES[recipe](), preset, given), given)[0]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_every_preset(recipe, preset):
    config = with_preset(RECIPES[recipe](), preset)
    assert config.sae.architecture == {"paper": "relu", "apart": "batch_topk", "best": "matryoshka"}[preset]
    assert list(config.variants) == ["decorrelated", "twin"]
    assert [config.variant(name).decorrelation.weight > 0 for name in config.variants] == [True, False]


def test_the_strongest_recipe_follows_what_is_given_by_hand():
    given = {"sae.n_features": 4096, "sae.k": 25, "training.tokens": 5_120_000}
    sae = asked("demo", "best", given).sae
    assert (sae.k, sae.k_start) == (25, 80)
    assert sae.matryoshka_widths == [32, 128, 512, 1024, 2048, 4096]
    assert (sae.reorder_from, sae.reorder_every) == (200, 100)
    assert asked("demo", "best", given).decorrelation.fraction == 0.000977
    assert asked("tiny", "apart", {"sae.n_features": 100}).decorrelation.fraction == 0.01
    assert asked("tiny", "best", {"sae.n_features": 100}).sae.matryoshka_widths == [12, 25, 50, 100]
    assert asked("tiny", "best", {"sae.k": 100}).sae.k_start == 128, "k cannot begin above the width"


def test_a_setting_by_hand_goes_over_the_preset():
    assert asked("tiny", "best", {"sae.k_start": 20, "sae.robust": 0.0}).sae.k_start == 20
    assert asked("tiny", "best", {"sae.architecture": "topk"}).sae.architecture == "topk"


def test_what_does_not_fit_is_refused_in_one_message():
    with pytest.raises(ConfigError, match=r"sae\.k is 200 but sae\.n_features only 128; lower sae\.k$"):
        asked("tiny", "best", {"sae.k": 200})
    with pytest.raises(ConfigError, match=r"preset = 'bset' is unknown"):
        asked("tiny", "bset", {})


def test_flags_reach_the_preset(capsys, tmp_path):
    words = ["train", "tiny", "--preset", "best", "--sae.n-features", "100", "--sae.k", "12", "--dry-run"]
    main([*words, "--training.threads", "1", "--run", str(tmp_path / "run")])
    assert "100 steps" in capsys.readouterr().out
