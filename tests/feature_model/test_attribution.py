"""Contributions add up to what they should, by every method, and edges to the derivative they split."""

import pytest
import torch
from feature_models import PROMPT, random_feature_model

from unbraid.errors import FeatureError
from unbraid.feature_model import Ablate, logit
from unbraid.feature_model.attribution import gradients_at, parts_of
from unbraid.feature_model.logit_metric import bound_metric
from unbraid.feature_model.passes import Recorded

FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox", "qwen2"]
METRIC = logit(30, minus=70)
SITES = ["resid_post.0", "resid_post.1"]


@pytest.fixture(params=FAMILIES, scope="module")
def fm(request):
    return random_feature_model(request.param)


def test_the_recorded_pass_is_the_models_own_and_needs_no_second_one(fm):
    batch = fm.prompt(PROMPT)
    places = [fm.dictionaries[name].writes for name in SITES]
    recorded = Recorded(fm, batch, places, graph=True)
    assert torch.equal(recorded.logits.detach(), fm.hf_model(batch.tokens_BT).logits.detach())
    value = bound_metric(fm, batch, METRIC)(recorded.logits)
    found = gradients_at(value, recorded, places)
    for place in places:  # the same as a pass of its own for each site, so nothing is counted twice
        alone = Recorded(fm, batch, [place], graph=True)
        own = gradients_at(bound_metric(fm, batch, METRIC)(alone.logits), alone, [place])[place]
        torch.testing.assert_close(found[place], own, atol=1e-6, rtol=1e-4)


def test_first_order_contributions_error_and_bias_add_up_to_the_derivative(fm):
    found = fm.attribute(PROMPT, METRIC)
    batch = fm.prompt(PROMPT)
    places = {name: fm.dictionaries[name].writes for name in SITES}
    recorded = Recorded(fm, batch, list(places.values()), graph=True)
    gradients = gradients_at(bound_metric(fm, batch, METRIC)(recorded.logits), recorded, list(places.values()))
    for name, place in places.items():
        expected = float((gradients[place] * recorded.activations[place].detach()).sum())
        site = found.sites[name]
        assert site.total + float(site.error.sum()) + site.bias == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert found.error[name].shape == (batch.tokens_BT.shape[1],)


def test_integrated_gradients_add_up_to_the_true_change(fm):
    found = fm.attribute(PROMPT, METRIC, method="ig")
    for name, site in found.sites.items():
        ablated = fm.run(PROMPT, [Ablate(f"{name}/all")]).logits[0, -1]
        assert site.without == pytest.approx(float(ablated[30] - ablated[70]), abs=1e-4)
        assert abs(site.total - (found.metric - site.without)) <= 0.01 * abs(found.metric - site.without)
    assert found.gap <= 0.01


def test_ablation_is_a_loop_of_runs(fm):
    found = fm.attribute(PROMPT, METRIC, method="ablate", sites=SITES[:1])
    site = found.sites[SITES[0]]
    assert len(site.features) > 3
    for index, value in list(zip(site.features.tolist(), site.values.tolist(), strict=True))[:4]:
        ablated = fm.run(PROMPT, [Ablate(f"{SITES[0]}/{index}")]).logits[0, -1]
        assert value == pytest.approx(found.metric - float(ablated[30] - ablated[70]), abs=1e-4)


def test_edges_error_and_bias_add_up_to_the_derivative_of_each_target(fm):
    for metric in (None, METRIC):
        found = fm.edges(PROMPT, *SITES, top=5, metric=metric)
        assert len(found.targets) == 5 and {at for at, _ in found.targets} == {fm.prompt(PROMPT).tokens_BT.shape[1] - 1}
        total = found.values.to_dense().sum((1, 2)) + found.error.sum(1) + found.bias
        torch.testing.assert_close(total, found.total, atol=1e-5, rtol=1e-4)


def test_an_edge_is_the_derivative_of_its_target(fm):
    found = fm.edges(PROMPT, *SITES, top=3)
    (at, index), batch = found.targets[0], fm.prompt(PROMPT)
    source, target = (fm.dictionaries[name] for name in SITES)
    recorded = Recorded(fm, batch, [source.writes, target.reads], graph=True)
    code = target.sae.encode(recorded.activations[target.reads])[0, at, index]
    (g,) = torch.autograd.grad(code, recorded.activations[source.writes])
    torch.testing.assert_close(
        found.values[0].to_dense(), parts_of(source, recorded).codes.to_dense() * (g[0] @ source.W_dec.T)
    )


def test_a_trace_joins_the_strongest_features_of_neighbouring_sites():
    fm = random_feature_model()
    graph = fm.trace(PROMPT, METRIC, sites=SITES[::-1], top=3)
    assert len(graph.nodes) == 6 and graph.edges
    assert all(a.startswith("resid_post.0/") and b.startswith("resid_post.1/") for a, b, _ in graph.edges)
    best = fm.attribute(PROMPT, METRIC).top(1)[0]
    assert any(node["feature"] == best["feature"] for node in graph.nodes.values())
    made = graph.to_networkx()
    assert set(made.nodes) == set(graph.nodes) and made.number_of_edges() == len(graph.edges)


def test_a_baseline_of_ones_own_is_where_the_path_begins():
    fm = random_feature_model()
    ids = fm.prompt(PROMPT).tokens_BT.clone()
    ids[0, 4] = 40
    other = fm.read(ids)
    assert fm.attribute(PROMPT, METRIC, method="ig", to=fm.read(PROMPT)).sites["resid_post.0"].total == 0
    assert fm.attribute(PROMPT, METRIC, method="ig", to=other, sites=SITES[:1]).gap <= 0.01


def test_the_gap_is_always_printed():
    fm = random_feature_model()
    for method in ("gradient", "ig", "ablate"):
        found = fm.attribute(PROMPT, METRIC, method=method)
        assert repr(found).count("gap") == 2 and "gap" in found._repr_html_()
        assert found.to_dict()["sites"]["resid_post.0"]["gap"] == found.gaps["resid_post.0"]


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (logit("kate bola"), "is 5 tokens"),
        (logit(10**6), "does not exist"),
        (lambda logits: 3.0, "finite scalar"),
        (lambda logits: logits.sum() * torch.inf, "finite scalar"),
        (lambda logits: torch.tensor(1.0), "does not depend"),
        (logit(3, at=100), "outside the prompt"),
    ],
)
def test_a_wrong_metric_is_refused(metric, said):
    with pytest.raises(FeatureError, match=said):
        random_feature_model().attribute(PROMPT, metric)


def test_several_prompts_or_sites_in_the_wrong_order_are_refused():
    fm = random_feature_model()
    with pytest.raises(FeatureError, match="expected one"):
        fm.attribute([PROMPT, PROMPT], METRIC)
    with pytest.raises(FeatureError, match="does not come before"):
        fm.edges(PROMPT, *SITES[::-1])
