"""Comparing two SAEs: the features they share are found, whatever library wrote them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sae_samples import make_sae

import unbraid
from unbraid import formats
from unbraid.cli import main
from unbraid.errors import EvaluationError
from unbraid.reporting.compare_saes import SAEComparison, compare_saes

METADATA = {"model_name": "gpt2", "hook_name": "blocks.2.hook_resid_post", "training_tokens": 1000}


@pytest.fixture
def saes(tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """An SAE, the same with its features in another order and layout, and that order."""
    one, other = make_sae("topk"), make_sae("topk")
    order = torch.randperm(one.n_features, generator=torch.Generator().manual_seed(1))
    for name in ("encoder_ND", "b_enc", "W_dec"):
        getattr(other, name).copy_(getattr(one, name)[order])
    a = formats.save(one, tmp_path / "a", metadata=METADATA)
    b = formats.save(other, tmp_path / "b", layout="dictionary_learning", metadata=METADATA)
    return a, b, order


def test_the_same_features_in_another_order_are_found_across_layouts(saes):
    a, b, order = saes
    found = compare_saes(a, b)
    numbers = found.numbers()
    assert order[found.match.pairs[:, 1]].tolist() == found.match.pairs[:, 0].tolist()
    assert numbers["matched"] == numbers["shared_above_0.9"] == len(order)
    assert numbers["mean_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert 0 < numbers["mean_cosine_of_random_rows"] < 0.9
    assert numbers["only_in_a"] == numbers["only_in_b"] == 0


def test_features_without_a_partner_are_counted_on_both_sides(tmp_path: Path, saes):
    wider = formats.save(make_sae("topk", seed=3, n_features=50), tmp_path / "wider")
    assert compare_saes(saes[0], wider).numbers()["only_in_b"] == 10
    back = compare_saes(wider, saes[0]).numbers()
    assert (back["only_in_a"], back["only_in_b"]) == (10, 0)


def test_compare_prints_both_saes_and_their_match(saes, capsys):
    main(["compare", str(saes[0]), str(saes[1])])
    said = capsys.readouterr().out
    assert "N=40, D=12, k=5, site=blocks.2.hook_resid_post, model=gpt2, trained_tokens=1000" in said
    assert "40 features matched one to one" in said and "40 with a cosine above 0.9" in said
    assert "... 20 more; --json lists all" in said
    main(["compare", str(saes[0]), str(saes[1]), "--json"])
    read = json.loads(capsys.readouterr().out)
    assert len(read["pairs"]) == 40 and read["saes"][1]["architecture"] == "topk" and read["orphans"] == []


def test_an_sae_with_a_single_feature_gives_no_next_best(saes):
    one, other = formats.load(saes[0]), formats.load(saes[1])
    single = unbraid.match(one, SimpleNamespace(W_dec=other.W_dec[:1]))
    found = SAEComparison(("a", "b"), (one, other), single, None)
    assert found.pairs()[0]["runner-up"] is None
    json.dumps(found.to_dict(), allow_nan=False)
    assert str(found).splitlines()[-1].endswith("  -")


def test_saes_of_different_widths_and_flags_of_runs_are_refused(tmp_path: Path, saes, capsys):
    from sae_settings import sae_settings

    from unbraid.sae import build

    other = formats.save(build(sae_settings("topk", n_features=8, k=2), 6, torch.Generator()), tmp_path / "narrow")
    with pytest.raises(EvaluationError, match=r"width 12 .* width 6; expected the same width"):
        compare_saes(saes[0], other)
    for words in (["--out", "elsewhere"], ["--overwrite"]):
        with pytest.raises(SystemExit):
            main(["compare", str(saes[0]), str(saes[1]), *words])
        assert "are for comparing runs" in capsys.readouterr().err


def test_a_run_and_an_sae_are_not_compared(tmp_path: Path, saes, capsys):
    (tmp_path / "run" / "saes").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "run"), str(saes[0])])
    assert "found 1 run folders and 1 other paths" in capsys.readouterr().err
