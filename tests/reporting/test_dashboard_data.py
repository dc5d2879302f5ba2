"""What the dashboard says about features and pairs is what the codes say."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unbraid.reporting.dashboard.entangled import MIN_SUPPORT, entangled_pairs, pair_contexts, pairs_here_or_in_twin
from unbraid.reporting.dashboard.features import (
    excerpt,
    firing,
    histogram,
    logit_lens,
    neighbours,
    partners,
    strongest_contexts,
)
from unbraid.reporting.dashboard.passes import BYTE_OF, HeldOutPass, single_token_text, token_texts
from unbraid.reporting.dashboard.site import LONGEST_TOKEN, clip, short

C, T, N, D = 30, 16, 24, 8


def held_out(density: float = 0.2, seed: int = 0) -> tuple[HeldOutPass, np.ndarray]:
    """A pass over C contexts whose first position is left out, and its codes as a dense [R, N] matrix."""
    chance = np.random.default_rng(seed)
    f_RN = chance.random((C * (T - 1), N)) * (chance.random((C * (T - 1), N)) < density)
    f_RN[:, 3] = f_RN[:, 2] * 0.5 + (chance.random(C * (T - 1)) < 0.02) * 0.1
    f_RN[:, 5] = 0.0
    context_R, position_R = (part.ravel() for part in np.meshgrid(np.arange(C), np.arange(1, T), indexing="ij"))
    codes = {"sae": sparse.csc_array(f_RN.astype(np.float32))}
    return HeldOutPass(np.arange(C * T).reshape(C, T), context_R, position_R, codes), f_RN.astype(np.float32)


def cosine(f_RN: np.ndarray) -> np.ndarray:
    norm_N = np.linalg.norm(f_RN, axis=0)
    return f_RN.T @ f_RN / np.maximum(norm_N[:, None] * norm_N, 1e-12)


def test_an_excerpt_shows_every_code_of_its_features_where_it_lies_in_the_text():
    passed, f_RN = held_out()
    fires = [firing(passed.codes["sae"], feature) for feature in (2, 7)]
    for row in (0, 17, 200, len(f_RN) - 1):
        item = excerpt(passed, row, fires)
        assert item.context == passed.context_R[row] and item.start <= passed.position_R[row] < item.stop
        for feature, values in zip((2, 7), item.activations, strict=True):
            expected = np.zeros(T)
            expected[1:] = f_RN.reshape(C, T - 1, N)[item.context, :, feature]
            np.testing.assert_array_equal(values, expected[item.start : item.stop].astype(np.float64))


def test_the_strongest_contexts_come_first_then_some_of_each_quarter_of_the_others():
    passed, f_RN = held_out()
    fires = firing(passed.codes["sae"], 4)
    strongest, quarters = strongest_contexts(passed, fires.rows, fires.values)
    shown = [*strongest, *(row for quarter in quarters for row in quarter.rows)]
    contexts = passed.context_R[shown].tolist()
    assert len(set(contexts)) == len(contexts) == 8 + 4 * 3, "each context only once"
    best = f_RN[:, 4].reshape(C, T - 1).max(1)
    assert [f_RN[row, 4] for row in shown] == [best[context] for context in contexts]
    assert sorted((best[c] for c in contexts), reverse=True) == [best[c] for c in contexts]
    others = np.sort(best[best > 0])[::-1][8:]
    assert [quarter.contexts for quarter in quarters] == [len(part) for part in np.array_split(others, 4)]
    for quarter, part in zip(quarters, np.array_split(others, 4), strict=True):
        assert (quarter.lowest, quarter.highest) == (part.min(), part.max())
    few, none = strongest_contexts(passed, fires.rows[:3], fires.values[:3])
    assert len(few) <= 3 and none == []


def test_an_excerpt_knows_the_codes_of_its_whole_context():
    passed, f_RN = held_out()
    item = excerpt(passed, 17, [firing(passed.codes["sae"], 2)])
    positions, values = item.fired[0]
    expected = f_RN[:, 2].reshape(C, T - 1)[item.context]
    np.testing.assert_array_equal(positions, np.flatnonzero(expected) + 1)
    np.testing.assert_array_equal(values, expected[expected > 0])


@pytest.mark.parametrize("density", [0.02, 0.2])
def test_partners_are_the_most_correlated_codes_by_the_sparse_and_the_dense_way(density: float):
    passed, f_RN = held_out(density)
    ids, values = partners(passed.codes["sae"])
    correlation = cosine(f_RN)
    np.fill_diagonal(correlation, -1)
    np.testing.assert_allclose(
        values, np.maximum(np.sort(correlation, axis=1)[:, ::-1][:, : values.shape[1]], 0), atol=1e-5
    )
    assert ids[2, 0] == 3 and ids[3, 0] == 2
    assert (values[5] == 0).all(), "a silent feature has no partner"


def test_neighbours_are_the_nearest_decoder_rows():
    W_dec = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    ids, values = neighbours(W_dec)
    unit = nn.functional.normalize(W_dec, dim=1)
    expected = (unit @ unit.T - 3 * torch.eye(N)).topk(ids.shape[1], dim=1)
    np.testing.assert_array_equal(ids, expected.indices.numpy())
    np.testing.assert_allclose(values, expected.values.numpy(), atol=1e-6)


def test_a_histogram_counts_every_firing_once():
    values = np.array([0.1, 0.2, 1.0, 1.0, 0.5])
    assert sum(histogram(values)) == 5 and histogram(values)[-1] == 2
    assert histogram(np.zeros(0)) == []


def test_entangled_pairs_are_the_most_correlated_of_those_that_fire_often_enough():
    _, f_RN = held_out()
    f_RN[:, 9] = 0
    f_RN[:3, 9] = f_RN[:3, 4] = 1.0
    codes = sparse.csc_array(f_RN)
    pairs = entangled_pairs(codes, torch.eye(N), None, None)
    assert pairs[0].features == (2, 3) and pairs[0].twin_correlation is None
    assert pairs[0].correlation == pytest.approx(cosine(f_RN)[2, 3], abs=1e-5)
    assert pairs[0].together == int(((f_RN[:, 2] > 0) & (f_RN[:, 3] > 0)).sum())
    assert all(min(pair.fires) >= MIN_SUPPORT for pair in pairs), "features that barely fire correlate by chance"
    assert [pair.correlation for pair in pairs] == sorted((pair.correlation for pair in pairs), reverse=True)


def test_a_pair_is_followed_into_the_twin_by_its_decoder_rows():
    passed, f_RN = held_out()
    W_dec = torch.eye(N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    twin_f = np.zeros_like(f_RN)
    twin_f[:, order.numpy()] = f_RN
    twin_W = torch.zeros(N, N)
    twin_W[order] = W_dec
    pair = entangled_pairs(passed.codes["sae"], W_dec, sparse.csc_array(twin_f), twin_W)[0]
    assert pair.counterparts == (int(order[2]), int(order[3])) and pair.match == (1.0, 1.0)
    assert pair.twin_correlation == pytest.approx(pair.correlation, abs=1e-5)
    merged = entangled_pairs(passed.codes["sae"], W_dec, sparse.csc_array(twin_f), twin_W[[0]].expand(N, N))[0]
    assert merged.twin_correlation == 1.0, "both have the same counterpart"


def test_pairs_are_those_entangled_here_or_in_the_twin_and_what_changed_most_comes_first():
    passed, f_RN = held_out(density=0.03)
    apart = f_RN.copy()
    apart[:, 3] = np.random.default_rng(1).permutation(f_RN[:, 3])
    W_dec = torch.eye(N)
    pairs = pairs_here_or_in_twin(sparse.csc_array(apart), W_dec, passed.codes["sae"], W_dec)
    first = pairs[0]
    assert first.features == first.counterparts == (2, 3) and first.match == (1.0, 1.0)
    assert first.correlation == pytest.approx(cosine(apart)[2, 3], abs=1e-5)
    assert first.twin_correlation == pytest.approx(cosine(f_RN)[2, 3], abs=1e-5)
    assert first.fires == ((apart[:, 2] > 0).sum(), (apart[:, 3] > 0).sum()), "what is counted is counted here"
    assert len({pair.features for pair in pairs}) == len(pairs)
    sizes = [abs(pair.change) for pair in pairs]
    assert sizes == sorted(sizes, reverse=True)
    without = pairs_here_or_in_twin(passed.codes["sae"], W_dec, None, None)
    (alone,) = [pair for pair in without if pair.features == (2, 3)]
    assert alone.twin_correlation is None and alone.entangled_in == "here" and not alone.comparable


def test_a_pair_of_the_twin_alone_is_seen_from_here_and_counted_once():
    """Features are numbered differently in the twin, where features 2 and 3 fire together; here they do not."""
    _, f_RN = held_out(density=0.03)
    apart = f_RN.copy()
    apart[:, 3] = 0
    apart[:20, 3] = f_RN[:, 2].max() * (f_RN[:20, 2] == 0)
    order = torch.arange(N).flip(0)
    twin = sparse.csc_array(f_RN[:, order.numpy()])
    found = pairs_here_or_in_twin(sparse.csc_array(apart), torch.eye(N), twin, torch.eye(N)[order])
    pair = found[0]
    assert pair.features == (2, 3) and pair.counterparts == (N - 3, N - 4) and pair.entangled_in == "twin"
    assert pair.correlation < 0.1 < 0.9 < pair.twin_correlation and pair.together == 0


def test_a_pair_is_entangled_in_both_only_if_its_own_counterparts_are_entangled_there():
    """The twin has copies of features 2 and 3 that fire together and point nearly, not exactly, their way."""
    _, f_RN = held_out(density=0.03)
    here = f_RN[:, :8].copy()
    twin = np.concatenate([here, here[:, [2, 3]]], axis=1)
    twin[:, [2, 3]] = np.random.default_rng(3).permutation(here[:, [2, 3]], axis=0) * (here[:, [2, 3]] == 0)
    twin[:, 3] *= twin[:, 2] == 0
    near = torch.eye(8)[[2, 3]] + 0.3 * torch.eye(8)[[0, 0]]
    pairs = pairs_here_or_in_twin(
        sparse.csc_array(here), torch.eye(8), sparse.csc_array(twin), torch.cat([torch.eye(8), near])
    )
    (pair,) = [pair for pair in pairs if pair.features == (2, 3)]
    assert pair.correlation > 0.9 and pair.twin_correlation == 0
    assert pair.counterparts == (2, 3) and pair.entangled_in == "here"


def test_pairs_that_compare_different_features_come_last():
    passed, _ = held_out()
    W_dec, elsewhere = torch.eye(N), torch.eye(N)
    elsewhere[2] = torch.ones(N)
    pairs = pairs_here_or_in_twin(passed.codes["sae"], elsewhere, passed.codes["sae"], W_dec)
    assert any(pair.entangled_in == "both" for pair in pairs)
    comparable = [pair.comparable for pair in pairs]
    assert comparable == sorted(comparable, reverse=True) and {*comparable} == {True, False}


def test_a_pair_that_lives_on_rows_of_large_norm_says_so():
    passed, f_RN = held_out(density=0.03)
    norm_R = np.ones(len(f_RN), dtype=np.float32)
    norm_R[:12] = 3.5
    f_RN[:, [6, 8]] = 0.01 * f_RN[:, [6, 8]]
    f_RN[:12, [6, 8]] = 5.0
    codes = {"sae": sparse.csc_array(f_RN)}
    passed = HeldOutPass(passed.tokens_CT, passed.context_R, passed.position_R, codes, {}, {"sae": norm_R})
    large_R = passed.large_rows("sae")
    assert large_R.sum() == 12
    pairs = {p.features: p for p in pairs_here_or_in_twin(codes["sae"], torch.eye(N), None, None, large_R)}
    assert pairs[6, 8].correlation > 0.9 and pairs[6, 8].lives_on_large_rows
    assert pairs[6, 8].without_large == pytest.approx(cosine(f_RN[12:])[6, 8], abs=1e-5)
    assert not pairs[2, 3].lives_on_large_rows
    assert pairs[2, 3].without_large == pytest.approx(cosine(f_RN[12:])[2, 3], abs=1e-5)
    assert not HeldOutPass(passed.tokens_CT, passed.context_R, passed.position_R, codes).large_rows("sae").any()


def test_shared_and_separate_contexts_are_what_they_are_called():
    passed, f_RN = held_out(density=0.03)
    pairs = entangled_pairs(passed.codes["sae"], torch.eye(N), None, None)
    for pair in pairs[:20]:
        found = pair_contexts(passed, passed.codes["sae"], pair)
        for item in found["both"]:
            assert ((item.activations[0] > 0) & (item.activations[1] > 0)).any()
        per_context = f_RN.reshape(C, T - 1, N).max(1)
        for which, (one, other) in (("first", (0, 1)), ("second", (1, 0))):
            for item in found[which]:
                assert ((item.activations[one] > 0) & (item.activations[other] == 0)).any()
            shared = [bool(per_context[item.context, pair.features[other]] > 0) for item in found[which]]
            assert shared == sorted(shared), "contexts without the other come first"


def test_the_logit_lens_reads_a_decoder_row_through_the_final_norm_and_the_unembedding():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=D, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.uniform_(-0.5, 0.5)  # a gain of 1 + weight
    W_dec = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    lens = logit_lens(W_dec, model, count=3)
    logits = (W_dec * (1 + model.model.norm.weight)) @ model.lm_head.weight.T
    assert torch.equal(lens[0], logits.topk(3, dim=1).indices)
    assert torch.equal(lens[2], logits.topk(3, dim=1, largest=False).indices)
    assert logit_lens(torch.randn(N, D + 2), model) is None


class ByteTokenizer:
    """One token a byte, as the worst case of byte-level vocabularies."""

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool = False) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="�"), max_size=40))
def test_token_texts_put_characters_together_again(text: str):
    texts = token_texts(ByteTokenizer(), list(text.encode()))
    assert len(texts) == len(text.encode())
    assert "".join(texts) == text


class NamedBytes(ByteTokenizer):
    """Bytes with the names that vocabularies give them."""

    def __init__(self, names: dict[int, str]):
        self.names = names

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.names[token]


GPT2_NAMES = {byte: letter for letter, byte in BYTE_OF.items()}
FALLBACK_NAMES = {byte: f"<0x{byte:02X}>" for byte in range(256)}


@pytest.mark.parametrize("names", [GPT2_NAMES, FALLBACK_NAMES])
def test_bytes_that_never_become_a_character_are_shown_in_hexadecimal(names: dict[int, str]):
    tokenizer = NamedBytes(names)
    assert token_texts(tokenizer, list("ab €".encode())[:-1]) == ["a", "b", " ", "⟨E2⟩", "⟨82⟩"], "cut inside €"
    assert "".join(token_texts(tokenizer, [0x80, 0x61, 0xFF])) == "⟨80⟩a⟨FF⟩"
    assert "".join(token_texts(tokenizer, list("x�y".encode()))) == "x�y", "one that stands in the text stays"
    assert "".join(token_texts(tokenizer, list("a€🧬".encode()))) == "a€🧬"
    assert single_token_text(tokenizer, 0xE2) == "⟨E2⟩" and single_token_text(tokenizer, 0x61) == "a"


def test_gpt2_names_are_those_of_the_tokenizers_library():
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(ByteLevel.alphabet()) == set(BYTE_OF) and len(BYTE_OF) == 256
    assert (BYTE_OF["Ġ"], BYTE_OF["Ċ"], BYTE_OF["A"]) == (0x20, 0x0A, 0x41)


def test_numbers_are_short_and_long_tokens_are_cut():
    assert [short(value) for value in (0.123456, 2.0, 0, 1e-9, 123456.0)] == [0.1235, 2, 0, 1e-9, 123500]
    assert clip("x" * LONGEST_TOKEN) == "x" * LONGEST_TOKEN
    assert clip("x" * 100_000).endswith("(100,000 characters)") and len(clip("x" * 100_000)) < 200


def test_the_assets_hold_no_address_outside_and_never_parse_text_as_markup():
    folder = Path(__file__).parents[2] / "src" / "unbraid" / "reporting" / "dashboard" / "assets"
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.iterdir())
    assert "https://" not in text and text.replace("http://www.w3.org/2000/svg", "").count("http://") == 0
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert forbidden not in text
    asking = [path.name for path in folder.iterdir() if "fetch(" in path.read_text(encoding="utf-8")]
    assert asking == ["labels.js"] and text.count("fetch(") == 1, "only labels are asked for, of the page's own server"
