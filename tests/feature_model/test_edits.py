"""The one rule x' = x + (f' - f) W_dec: exact where nothing changes, exact where everything is replaced."""

import pytest
import torch
from feature_models import PROMPT, random_feature_model, random_sae

from unbraid.activations.hooks import visited
from unbraid.errors import FeatureError
from unbraid.feature_model import Ablate, Clamp, Patch, Scale, Splice, Steer

SITE = "resid_post.0"
FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox", "qwen2"]


@pytest.fixture(params=[(f, d) for f in FAMILIES for d in ("float32", "bfloat16")], ids="-".join, scope="module")
def fm(request):
    return random_feature_model(*request.param)


def active(fm, site: str = SITE, at=2) -> str:
    return next(row["feature"] for row in fm.read(PROMPT).top(200, at=at) if row["feature"].startswith(site + "/"))


def seen_at(fm, site: str, edits) -> torch.Tensor:
    """The activations of a site with the edits, as the next module gets them."""
    kept = []
    with fm.edited(edits), visited(fm.dictionaries[site].writes, kept.append), torch.no_grad():
        fm.forward(fm.prompt(PROMPT))
    return kept[0]


def test_edits_that_change_nothing_change_no_bit(fm):
    plain = fm.hf_model(fm.prompt(PROMPT).tokens_BT).logits
    nothing = [Steer(active(fm), 0), Scale(f"{SITE}/1", 1), Splice("resid_post.1", error=True)]
    for edits in ([], nothing[:1], nothing):
        effect = fm.run(PROMPT, edits)
        assert torch.equal(effect.logits, plain) and torch.equal(effect.plain_logits, plain)
        assert not effect.kl.any()


def test_ablating_everything_leaves_the_bias_or_the_bias_and_the_error(fm):
    sae, content_BT = fm.dictionaries[SITE].sae, fm.prompt(PROMPT).span.content_BT
    x = seen_at(fm, SITE, [])[content_BT]
    spliced = seen_at(fm, SITE, [Splice(SITE), Ablate(f"{SITE}/all")])[content_BT]
    assert torch.equal(spliced, sae.b_dec.to(x.dtype).expand_as(spliced))
    held = seen_at(fm, SITE, [Ablate(f"{SITE}/all")])[content_BT].float()
    expected = sae.b_dec + (x.float() - sae(x.float()))
    torch.testing.assert_close(held, expected, atol=1e-5 if x.dtype == torch.float32 else 0.05, rtol=0.01)


def test_position_0_and_special_tokens_are_left_alone_and_have_no_codes(fm):
    reading = fm.read(PROMPT)
    assert all(not codes.to_dense()[:, 0].any() for codes in reading.codes.values())
    assert int(reading.ids_BT[0, 0]) == fm.tokenizer.bos_token_id and int(reading.ids_BT[0, 1]) != reading.ids_BT[0, 0]
    before, after = (seen_at(fm, SITE, edits) for edits in ([], [Steer(f"{SITE}/5", 50, unit="code")]))
    assert torch.equal(before[:, 0], after[:, 0]) and (before[:, 1:] != after[:, 1:]).any(-1).all()


def test_codes_are_those_of_the_dictionary_on_the_models_own_hidden_states(fm):
    ids = fm.prompt(PROMPT).tokens_BT
    x = fm.hf_model(ids, output_hidden_states=True).hidden_states[1].detach().float()
    f = fm.dictionaries[SITE].sae.encode(x)
    reading = fm.read(PROMPT)
    torch.testing.assert_close(reading.codes[SITE].to_dense()[:, 1:], f[:, 1:])
    error = (x - fm.dictionaries[SITE].sae(x)).norm(dim=-1) / x.norm(dim=-1)
    torch.testing.assert_close(reading.error[SITE][:, 1:], error[:, 1:])


def test_an_edit_writes_what_the_rule_says(fm):
    address, row_M = active(fm), fm.dictionaries[SITE].W_dec[int(active(fm).rpartition("/")[2])]
    f_T = fm.read(PROMPT, at="all").code(SITE, int(address.rpartition("/")[2]))[0]
    before = seen_at(fm, SITE, []).float()[0]
    changes = {
        Steer(address, 3.0, unit="code"): torch.full_like(f_T, 3.0),
        Scale(address, 2.5): 1.5 * f_T,
        Clamp(address, 4.0): 4.0 - f_T,
        Ablate(address): -f_T,
        Steer(address, 2.0): torch.full_like(f_T, 2.0 * fm.held_out.maximum(fm.feature(address))),
        Steer(address, 0.5, unit="norm"): torch.full_like(f_T, 0.5 * fm.held_out.norms[SITE] / float(row_M.norm())),
    }
    for edit, change_T in changes.items():
        after = seen_at(fm, SITE, [edit]).float()[0]
        tolerance = {"atol": 1e-4, "rtol": 1e-4} if fm.hf_model.dtype == torch.float32 else {"atol": 0.2, "rtol": 0.02}
        torch.testing.assert_close(after[1:], before[1:] + change_T[1:, None] * row_M, **tolerance)


def test_edits_of_a_site_add_up_and_later_sites_see_them():
    fm = random_feature_model()
    both = [Steer(f"{SITE}/1", 2, unit="code"), Clamp(f"{SITE}/2", 3.0)]
    before, one, two, all_ = (seen_at(fm, SITE, edits) for edits in ([], both[:1], both[1:], both))
    torch.testing.assert_close(all_ - before, (one - before) + (two - before), atol=1e-5, rtol=1e-4)
    alone = fm.read(PROMPT, both).codes["resid_post.1"].to_dense()
    assert not torch.equal(alone, fm.read(PROMPT).codes["resid_post.1"].to_dense())


def test_what_a_clamp_re_encodes_as_is_told():
    fm = random_feature_model()
    address = active(fm)
    effect = fm.run(PROMPT, [Clamp(address, 3.0)])
    x = seen_at(fm, SITE, [Clamp(address, 3.0)])
    index = int(address.rpartition("/")[2])
    torch.testing.assert_close(effect.readback[address][:, 1:], fm.dictionaries[SITE].sae.encode(x)[:, 1:, index])
    assert f"{address} re-encodes as" in repr(effect)


def test_a_patch_brings_the_codes_of_another_prompt():
    fm = random_feature_model()
    other = fm.read("roda tuko mima")
    address = next(row["feature"] for row in other.top(200, at=-1) if row["feature"].startswith(SITE))
    index = int(address.rpartition("/")[2])
    own, theirs = fm.read(PROMPT).code(SITE, index)[0, -1], other.code(SITE, index)[0, -1]
    before, after = (seen_at(fm, SITE, edits) for edits in ([], [Patch(address, other, at=-1)]))
    torch.testing.assert_close(after[0, -1], before[0, -1] + (theirs - own) * fm.dictionaries[SITE].W_dec[index])
    assert torch.equal(after[:, :-1], before[:, :-1])
    same = fm.run(PROMPT, [Patch(f"{SITE}/all", fm.read(PROMPT))])
    torch.testing.assert_close(same.logits, same.plain_logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(FeatureError, match=r"names \d+ tokens of the prompt and \d+ of the reading"):
        fm.run(PROMPT, [Patch(address, other)])
    with pytest.raises(FeatureError, match="was not read"):
        fm.run(PROMPT, [Patch(address, other, at=0)])


def test_without_takes_the_pull_on_a_partner_away():
    fm = random_feature_model()
    W_dec = fm.dictionaries[SITE].W_dec
    with torch.no_grad():
        W_dec[3] = 0.77 * W_dec[4] / W_dec[4].norm() + 0.2 * W_dec[3] / W_dec[3].norm()
    pulls = {}
    for without in ((), (f"{SITE}/4",), (f"{SITE}/4", f"{SITE}/7")):
        edits = [Steer(f"{SITE}/3", 4.0, unit="code", without=without)]
        moved = (seen_at(fm, SITE, edits) - seen_at(fm, SITE, []))[0, 2]
        pulls[len(without)] = [abs(float(moved @ W_dec[i])) for i in (4, 7)]
    assert pulls[0][0] > 1 and pulls[1][0] < 1e-4 and max(pulls[2]) < 1e-4


def test_two_values_for_one_code_are_refused_and_two_places_are_not():
    fm = random_feature_model()
    with pytest.raises(FeatureError, match="same token"):
        fm.run(PROMPT, [Clamp(f"{SITE}/1", 1.0), Ablate(f"{SITE}/all")])
    fm.run(PROMPT, [Clamp(f"{SITE}/1", 1.0, at=1), Ablate(f"{SITE}/1", at=2)])


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu", "gated", "matryoshka"])
def test_every_architecture_holds_its_error(architecture):
    saes = {SITE: random_sae(0, architecture), "mlp_out.1": random_sae(2, architecture)}
    fm = random_feature_model("gemma2", saes=saes)
    plain = fm.hf_model(fm.prompt(PROMPT).tokens_BT).logits
    assert torch.equal(fm.run(PROMPT, [Scale(f"{SITE}/1", 1), Splice("mlp_out.1", error=True)]).logits, plain)


class Normalised:
    """A dictionary of another library: it divides each token by its norm, and gives it back when it decodes."""

    def __init__(self, sae):
        self.sae, self.W_dec = sae, sae.W_dec

    def encode(self, x):
        self.norm = x.norm(dim=-1, keepdim=True)
        return self.sae.encode(x / self.norm)

    def decode(self, f):
        return self.sae.decode(f) * self.norm


def test_a_dictionary_that_normalises_tokens_writes_at_the_scale_of_each():
    fm = random_feature_model(saes={SITE: Normalised(random_sae(0))})
    before, after = (seen_at(fm, SITE, edits) for edits in ([], [Steer(f"{SITE}/3", 2.0, unit="code")]))
    expected = 2.0 * before[0, 1:].norm(dim=-1, keepdim=True) * fm.dictionaries[SITE].W_dec[3]
    torch.testing.assert_close(after[0, 1:] - before[0, 1:], expected, atol=1e-4, rtol=1e-3)
    assert torch.equal(fm.run(PROMPT, [Scale(f"{SITE}/3", 1.0)]).logits, fm.run(PROMPT, []).plain_logits)


def test_a_decoder_that_does_not_write_its_W_dec_is_refused():
    class Wrong(Normalised):
        def decode(self, f):
            return self.sae.decode(f.roll(1, -1))

    fm = random_feature_model(saes={SITE: Wrong(random_sae(0))})
    with pytest.raises(FeatureError, match="decode is not f W_dec"):
        fm.read(PROMPT)


class Transcoder:
    """Reads 64 wide, writes 64 wide elsewhere."""

    def __init__(self):
        self.sae = random_sae(5)
        self.W_dec = self.sae.W_dec

    def encode(self, x):
        return self.sae.encode(x)

    def decode(self, f):
        return f @ self.W_dec + 0.1


def test_a_transcoder_reads_at_one_site_and_writes_at_another():
    fm = random_feature_model(saes={"mlp": Transcoder()}, sites={"mlp": "mlp_in.1 -> mlp_out.1"})
    kept = []
    with visited(fm.dictionaries["mlp"].reads, kept.append), torch.no_grad():
        fm.forward(fm.prompt(PROMPT))
    f = fm.dictionaries["mlp"].sae.encode(kept[0])
    torch.testing.assert_close(fm.read(PROMPT).codes["mlp"].to_dense()[:, 1:], f[:, 1:])
    before, after = (seen_at(fm, "mlp", edits) for edits in ([], [Ablate("mlp/3")]))
    torch.testing.assert_close((before - after)[0, 1:], f[0, 1:, 3:4] * fm.dictionaries["mlp"].W_dec[3])
    assert torch.equal(fm.run(PROMPT, [Scale("mlp/3", 1)]).logits, fm.run(PROMPT, []).plain_logits)


def test_no_hook_stays_whatever_happens():
    fm = random_feature_model()

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in fm.hf_model.modules())

    fm.run(PROMPT, [Steer(f"{SITE}/1", 1, unit="code")])
    with pytest.raises(FeatureError):
        fm.read(torch.tensor([[10**6]]))
    with pytest.raises(ZeroDivisionError), fm.edited([Ablate(f"{SITE}/1")]):
        raise ZeroDivisionError
    assert hooks() == 0 and all("forward" not in vars(block) for block in fm.blocks)


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ([Steer("resid_post.0/96", 1)], "expected an index from 0 to 95"),
        ([Steer("resid_post.7/1", 1)], "no dictionary 'resid_post.7'"),
        ([Steer("resid_post.0", 1)], "no feature's address"),
        ([Steer("resid_post.0/-1", 1)], "no feature's address"),
        ([Steer("resid_post.0/all", 1)], "no feature's address"),
        ([Ablate("all")], "no feature's address"),
        ([Steer("resid_post.0/1", 1, unit="loud")], "unit 'loud'"),
        ([Splice("nowhere")], "no dictionary"),
        (["steer"], "is no edit"),
        (Steer("resid_post.0/1", 1), "expected a list"),
        ([Steer("resid_post.0/1", 1, unit="code", at=99)], "position 99 is outside"),
        ([Steer("resid_post.0/1", 1, unit="code", at="first")], "not understood"),
        ([Steer("resid_post.0/1", 1, unit="code", without="resid_post.1/1")], "the same site"),
    ],
)
def test_a_wrong_edit_is_refused_with_what_was_expected(edits, said):
    with pytest.raises(FeatureError, match=said):
        random_feature_model().run(PROMPT, edits)


def test_without_held_out_text_max_is_refused_and_codes_are_not():
    fm = random_feature_model(text=None)
    with pytest.raises(FeatureError, match="no held-out text"):
        fm.run(PROMPT, [Steer(f"{SITE}/1", 1)])
    fm.run(PROMPT, [Steer(f"{SITE}/1", 1, unit="code")])


def test_a_splice_is_what_the_evaluation_measures():
    from unbraid.activations.language_model import LanguageModel
    from unbraid.evaluation.splice import preservation

    fm = random_feature_model()
    batch = fm.prompt(PROMPT)
    language_model = LanguageModel(fm.hf_model, fm.tokenizer, [SITE])
    saes = {SITE: {"sae": fm.dictionaries[SITE].sae}}
    measured = preservation(language_model, saes, [(batch.tokens_BT, batch.span.content_BT)])["sae"]
    effect = fm.run(PROMPT, [Splice(SITE)])
    kl = float(effect.kl[batch.span.content_BT].mean())
    assert measured["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(kl, rel=1e-4)
