"""Search, contexts, pairs, matches, runs opened by path, and what results turn into."""

import io
import json

import numpy as np
import pytest
import torch
from feature_models import PROMPT, TEXT, random_feature_model, random_sae
from rich.console import Console

import unbraid
from unbraid.errors import FeatureError, UnbraidError
from unbraid.feature_model import Scale, Steer, matching
from unbraid.feature_model.tables import HTML_LIMIT, Table

SITE = "resid_post.0"


@pytest.fixture(scope="module")
def fm():
    return random_feature_model(
        saes={SITE: random_sae(0), f"{SITE}_twin": random_sae(0), "resid_post.1": random_sae(1)},
        sites={f"{SITE}_twin": SITE},
        twins={SITE: f"{SITE}_twin"},
    )


def test_a_search_ranks_features_and_a_contrast_takes_the_other_prompt_away(fm):
    codes = fm.read(PROMPT).codes[SITE].to_dense()[0]
    for by, expected in (("max", codes.amax(0)), ("sum", codes.sum(0)), ("mean", codes.sum(0) / (len(codes) - 1))):
        found = [row for row in fm.search(PROMPT, by=by, k=400) if row["feature"].startswith(f"{SITE}/")]
        assert found[0]["score"] == pytest.approx(float(expected.max()), rel=1e-5)
        assert found[0]["feature"] == f"{SITE}/{int(expected.argmax())}"
    assert len(fm.search(PROMPT, contrast=PROMPT)) == 0
    row = fm.search(PROMPT, contrast="mima")[0]
    assert row["score"] == pytest.approx(row["prompt"] - row["contrast"], abs=1e-6)


def test_contexts_hold_the_largest_codes_of_the_text(fm):
    readings = [fm.read(text) for text in TEXT]
    index = int(torch.stack([r.codes[SITE].to_dense()[0].amax(0) for r in readings]).sum(0).argmax())
    contexts = fm.contexts(f"{SITE}/{index}")
    peaks = sorted((float(r.code(SITE, index).max()) for r in readings), reverse=True)
    assert [float(one.codes.max()) for one in contexts] == pytest.approx([peak for peak in peaks if peak > 0])
    assert contexts[0].tokens[contexts[0].peak] and contexts[0].codes[contexts[0].peak] == contexts[0].codes.max()
    assert fm.held_out.maximum(fm.feature(f"{SITE}/{index}")) == pytest.approx(peaks[0])


def test_contexts_alone_from_another_are_where_it_is_silent(fm):
    partner = next(row["partner"] for row in fm.pairs(f"{SITE}/{_busy(fm)}", 30))
    alone = fm.contexts(f"{SITE}/{_busy(fm)}", alone_from=partner)
    assert all(one.others is not None and one.others[one.peak] == 0 for one in alone)
    assert len(alone) <= len(fm.contexts(f"{SITE}/{_busy(fm)}"))
    codes = fm.held_out.seen.codes[SITE].toarray() > 0
    own, other = (codes[:, int(address.split("/")[1])] for address in (alone.feature, partner))
    assert alone.alone == int((own & ~other).sum()) and f"on {alone.alone:,} of them without {partner}" in alone.caption


def _busy(fm) -> int:
    return int(np.diff(fm.held_out.seen.codes[SITE].indptr).argmax())


def test_partners_are_the_most_correlated_and_the_twins_stand_beside_them(fm):
    codes = fm.held_out.seen.codes[SITE].toarray().astype(np.float64)
    index = _busy(fm)
    unit = codes / np.maximum(np.linalg.norm(codes, axis=0), 1e-30)
    correlation = unit.T @ unit[:, index]
    correlation[index] = -1
    pairs = fm.pairs(f"{SITE}/{index}", 3)
    assert [row["partner"] for row in pairs] == [f"{SITE}/{i}" for i in np.argsort(-correlation)[:3]]
    assert [row["correlation"] for row in pairs] == pytest.approx(sorted(correlation)[::-1][:3])
    assert pairs.counterpart == f"{SITE}_twin/{index}" and pairs.likeness == pytest.approx(1, abs=1e-5)
    assert [row["twin correlation"] for row in pairs] == pytest.approx([row["correlation"] for row in pairs])


def test_steering_shows_what_the_partners_and_the_twins_do(fm):
    address = f"{SITE}/{_busy(fm)}"
    effect = fm.run(PROMPT, [Steer(address, 2)])
    row = effect.partners[0]
    index = int(row["partner"].rpartition("/")[2])
    for name, reading in (("before", effect.before), ("after", effect.after)):
        assert row[name] == pytest.approx(float(reading.code(SITE, index)[0, 1:].mean()), abs=1e-6)
    assert row["twin before"] == pytest.approx(row["before"]) and row["twin after"] == pytest.approx(row["after"])
    held = fm.run(PROMPT, [Steer(address, 2, without=[f"{SITE}/90"])]).partners
    assert any(row["partner"] == f"{SITE}/90" for row in held)


def test_what_moved_is_the_difference_of_two_readings(fm):
    effect = fm.run(PROMPT, [Scale(f"{SITE}/{_busy(fm)}", 3)])
    row = effect.moved(1)[0]
    name, _, index = row["feature"].rpartition("/")
    difference = fm.read(PROMPT, [Scale(f"{SITE}/{_busy(fm)}", 3)]).code(name, int(index)) - fm.read(PROMPT).code(
        name, int(index)
    )
    assert row["change"] == pytest.approx(float(difference[0, row["position"]]), abs=1e-5)


def test_a_bare_site_is_a_name_where_one_dictionary_stands(fm):
    assert fm.feature("resid_post.1/3").dictionary.name == "resid_post.1"
    alone = random_feature_model(saes={"mine": random_sae(0)}, sites={"mine": SITE})
    assert str(alone.feature(f"{SITE}/3")) == "mine/3"
    two = random_feature_model(saes={"a": random_sae(0), "b": random_sae(1)}, sites={"a": SITE, "b": SITE})
    with pytest.raises(FeatureError, match="2 dictionaries stand at"):
        two.feature(f"{SITE}/3")


@pytest.mark.parametrize("by", ["decoder", "codes"])
def test_a_permuted_copy_is_matched_by_its_permutation(by):
    sae, other = random_sae(0), random_sae(0)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    other.encoder_ND.data, other.W_dec.data = sae.encoder_ND[order], sae.W_dec[order]
    other.b_enc.data = sae.b_enc[order]
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    found = unbraid.match(sae, other, by=by, x=x)
    live = sae.encode(x).any(0) if by == "codes" else torch.ones(96, dtype=torch.bool)
    assert bool((order[found.pairs[:, 1]] == found.pairs[:, 0])[live[found.pairs[:, 0]]].all())
    assert float(found.cosine[live].min()) == pytest.approx(1, abs=1e-5) and len(found.orphans) == 0
    assert bool((found.runner_up <= found.cosine + 1e-6)[live].all())


def test_mutual_neighbours_leave_orphans_and_agree_where_the_match_is_clear(monkeypatch):
    sae, half = random_sae(0), random_sae(0, n_features=96)
    half.W_dec.data = half.W_dec.data[:40]
    clear = unbraid.match(sae, half)
    monkeypatch.setattr(matching, "HUNGARIAN_UP_TO", 10)
    found = unbraid.match(sae, half)
    assert found.pairs.tolist() == clear.pairs.tolist() == [[i, i] for i in range(40)]
    assert found.orphans.tolist() == list(range(40, 96))
    with pytest.raises(FeatureError, match="wide"):
        unbraid.match(sae, type("Narrow", (), {"W_dec": torch.ones(3, 5)})())


def test_a_run_is_opened_with_its_text_and_keeps_what_it_computed(run):
    said = io.StringIO()
    console = Console(file=said, width=200)
    fm = unbraid.features(run.path, console=console)
    assert set(fm.dictionaries) == set(run.saes) and fm.twins
    feature = next(row["feature"] for row in fm.read(PROMPT).top(1))
    contexts = fm.contexts(feature)
    assert "of 16,384 rows" in said.getvalue() and (run.path / "held_out.safetensors").is_file()
    again, more = unbraid.features(run, console=console), said.getvalue()
    assert again.contexts(feature).to_dict() == contexts.to_dict() and said.getvalue() == more
    assert fm.prompt("kate").tokens_BT[0, 0] == fm.tokenizer.bos_token_id, "as in training"
    (run.path / "held_out.safetensors").write_bytes(b"damaged")
    assert unbraid.features(run, console=console).contexts(feature).to_dict() == contexts.to_dict()


def test_one_sae_of_a_run_is_opened_alone(run):
    name = next(iter(run.saes))
    assert list(unbraid.features(run.path / "saes" / name).dictionaries) == [name]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UnbraidError):
        unbraid.features(tmp_path)


HOSTILE = "<script>alert(1)</script>\x1b[31m\" onmouseover='x' [red]b[/red]\n"


def test_results_show_hostile_text_as_text_and_stay_small(fm):
    texts = [text + HOSTILE for text in TEXT]
    hostile = random_feature_model(saes={SITE: random_sae(0)}, text=texts)
    reading = hostile.read([HOSTILE * 3, PROMPT])
    results = [reading, reading.top(5), hostile.search(HOSTILE), hostile.contexts(reading.top(1)[0]["feature"])]
    results += [hostile.run(HOSTILE, [Scale(f"{SITE}/1", 2)]), hostile.lens(f"{SITE}/1"), hostile.pairs(f"{SITE}/1")]
    results += [hostile.generate(HOSTILE, [], max_new_tokens=4)]
    for result in results:
        page = result._repr_html_()
        assert "<script" not in page and "onmouseover='x'" not in page.replace("&#x27;", "")
        assert len(page.encode()) <= HTML_LIMIT and "\x1b" not in page and "http" not in page
        assert "\x1b" not in repr(result) and repr(result)
        json.loads(result.to_json())
        assert len(result.to_pandas()) >= 0
    table = Table(["a"], [{"a": HOSTILE}], caption=HOSTILE, notes=(HOSTILE,))
    assert "[red]b[/red]" in repr(table) and "<script" not in table._repr_html_()


def test_a_table_beyond_the_limit_says_what_it_leaves_out():
    table = Table(["a"], [{"a": "x" * 300}] * 1000, "many")
    assert len(table._repr_html_().encode()) <= HTML_LIMIT and "more rows not shown" in table._repr_html_()
    assert "960 more rows" in repr(table) and len(table.to_pandas()) == 1000


def test_json_is_written_where_asked(tmp_path, fm):
    path = tmp_path / "reading.json"
    fm.read(PROMPT).to_json(path)
    tokens = json.loads(path.read_text())["prompts"][0]
    assert tokens[0]["features"] == {} and tokens[2]["features"]
    with pytest.raises(FeatureError, match="cannot be written"):
        fm.read(PROMPT).to_json(tmp_path / "no" / "such.json")


def test_a_feature_is_described_by_the_tokens_it_fires_on_where_they_are_known_and_else_by_those_it_raises():
    fresh = random_feature_model()
    index = 3
    raised = fresh.words(SITE, index)
    assert raised.startswith("↑ ")
    column = fresh.held_out.seen.codes[SITE][:, [index]].toarray().ravel()
    row = int(column.argmax())
    seen = fresh.held_out.seen
    strongest = fresh.tokenizer.decode([int(seen.tokens_CT[seen.context_R[row], seen.position_R[row]])]).strip()
    fires_on = fresh.held_out.peaks(fresh, fresh.feature(f"{SITE}/{index}"), 100)
    assert strongest in fires_on and len(set(fires_on)) == len(fires_on)
    assert fresh.words(SITE, index) == " ".join(fires_on[:3]) != raised
