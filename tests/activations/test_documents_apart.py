"""`text.separate_documents`: documents packed into one context give the activations that each gives alone."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.model_families import build

import unbraid
from unbraid.activations.cache import CachedActivations, harvest
from unbraid.activations.live import LiveActivations
from unbraid.activations.random_model import word_tokenizer
from unbraid.activations.rows import Chunk, RowFilter
from unbraid.config import BufferConfig, ModelConfig, RunConfig, TextConfig, TrainingConfig, overridden
from unbraid.errors import ConfigError, ModelError
from unbraid.evaluation.splice import preservation
from unbraid.text import Contexts
from unbraid.text.handed_in import HandedInText

CPU = torch.device("cpu")
T = 24
DRAWS = torch.Generator().manual_seed(0)
ROWS = [torch.randint(20, 900, (n,), generator=DRAWS).tolist() for n in (5, 30, 1, 9, 40, 7, 3, 26) * 10]


def settings(folder: Path, model: str = "random:llama", **text: Any) -> RunConfig:
    (folder / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ROWS))
    apart = {"bos": "document", "separate_documents": True, "context_length": T, "held_out_fraction": 0.0}
    files = {"source": "files", "paths": [str(folder / "ids.jsonl")], "column": "input_ids"}
    return RunConfig(
        text=TextConfig.model_validate(files | apart | text),
        model=ModelConfig(name=model, sites=["resid_post.0", "attn_out.1", "resid_post.1"], batch_contexts=3),
        buffer=BufferConfig(norm_limit=None),
        training=TrainingConfig(tokens=4096, held_out_tokens=256),
    )


def documents(chunk: Chunk) -> list[tuple[int, slice]]:
    """(context, positions in it) of every document of a chunk."""
    assert chunk.positions_BT is not None
    found = []
    for context, positions_T in enumerate(chunk.positions_BT):
        starts = [*(positions_T == 0).nonzero().squeeze(1).tolist(), T]
        found += [(context, slice(*ends)) for ends in pairwise(starts)]
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("bos", ["document", "none"])
def test_each_document_of_a_packed_context_gives_what_it_gives_alone(family: str, bos: str, tmp_path: Path):
    live = LiveActivations(settings(tmp_path, f"random:{family}", bos=bos), CPU)
    seen = 0
    for chunk in live.chunks(None):
        for context, here in documents(chunk):
            tokens_1T = chunk.tokens_BT[context, here][None]
            with torch.inference_mode():
                hidden = live.model.model(tokens_1T, output_hidden_states=True, use_cache=False).hidden_states
            torch.testing.assert_close(chunk.activations[0][context, here], hidden[1][0], rtol=1e-5, atol=1e-5)
            for found, alone in zip(chunk.activations, live.model.activations(tokens_1T), strict=True):
                torch.testing.assert_close(found[context, here], alone[0], rtol=1e-5, atol=1e-5)
            seen += 1
    assert seen > 20


def test_without_it_a_document_sees_the_ones_before_it(tmp_path: Path):
    config = settings(tmp_path)
    apart = next(LiveActivations(config, CPU).chunks(None))
    together = next(LiveActivations(settings(tmp_path, separate_documents=False), CPU).chunks(None))
    assert torch.equal(apart.tokens_BT, together.tokens_BT) and together.positions_BT is None
    context, here = next((context, here) for context, here in documents(apart) if here.start > 0)
    first = slice(0, documents(apart)[0][1].stop)
    torch.testing.assert_close(apart.activations[0][0, first], together.activations[0][0, first])
    assert not torch.allclose(apart.activations[0][context, here], together.activations[0][context, here], atol=1e-2)


def test_positions_start_anew_with_each_document_and_each_context():
    config = TextConfig(source="handed_in", context_length=8, bos="document", separate_documents=True)
    text = HandedInText([[5, 6, 7], [8], list(range(20, 29))], 100)
    rows = list(Contexts(text, word_tokenizer(), config.model_copy(update={"held_out_fraction": 0.0})).with_masks())
    assert [row.tokens.tolist() for row in rows] == [[0, 5, 6, 7, 1, 0, 8, 1], [0, *range(20, 27)]]
    assert [row.positions.tolist() for row in rows] == [[0, 1, 2, 3, 4, 0, 1, 2], list(range(8))]


def test_the_first_row_of_every_document_is_left_out_as_that_of_a_context_is(tmp_path: Path):
    live = LiveActivations(settings(tmp_path, bos="none"), CPU)
    rows = RowFilter(BufferConfig(norm_limit=None), live.sites, live.special_ids)
    kept = 0
    for chunk in live.chunks(None):
        keep_BT = rows.mask(chunk)
        assert not keep_BT[chunk.positions_BT == 0].any()
        kept += int(keep_BT.sum())
    assert rows.dropped["first_position"] > 20
    assert live.count_rows(10**6) == kept


def test_a_cache_gives_the_same_rows(tmp_path: Path):
    config = settings(tmp_path, held_out_fraction=0.4)
    config = config.model_copy(update={"training": TrainingConfig(tokens=128, batch_tokens=64, held_out_tokens=256)})
    harvest(config, tmp_path / "cache", CPU)
    live, cached = LiveActivations(config, CPU), CachedActivations(config, tmp_path / "cache")
    pairs = list(zip(live.chunks(None, held_out=True), cached.chunks(None, held_out=True), strict=False))
    assert pairs
    for ours, theirs in pairs:
        assert torch.equal(ours.positions_BT, theirs.positions_BT)  # pyright: ignore
        rows = [RowFilter(config.buffer, live.sites, live.special_ids)(chunk) for chunk in (ours, theirs)]
        assert all(torch.equal(one, other) for one, other in zip(*rows, strict=True))


def test_the_model_is_continued_behind_a_reconstruction_with_documents_apart(tmp_path: Path):
    live = LiveActivations(settings(tmp_path), CPU)
    chunk = next(live.chunks(None))
    keep_BT = ~torch.isin(chunk.tokens_BT, torch.tensor(sorted(live.special_ids)))
    losses: list[float] = []
    for context, here in documents(chunk):
        tokens_1T, keep_T = chunk.tokens_BT[context, here][None], keep_BT[context, here]
        scores = torch.nn.functional.cross_entropy(
            live.model.logits(tokens_1T)[0, :-1], tokens_1T[0, 1:], reduction="none"
        )
        losses += scores[keep_T[:-1]].tolist()
        keep_BT[context, here.stop - 1] = False  # what follows a document is not its own
    identity: Any = type("Identity", (), {"encode": staticmethod(lambda x: x), "decode": staticmethod(lambda f: f)})
    tables = (chunk.tokens_BT, keep_BT, chunk.positions_BT)
    found = preservation(live.model, {"resid_post.1": {"a": identity}}, [tables])  # pyright: ignore
    performance = found["a"]["model_performance_preservation"]
    assert performance["ce_loss_without_sae"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert performance["ce_loss_with_sae"] == pytest.approx(performance["ce_loss_without_sae"], rel=1e-5)


@pytest.mark.parametrize("family", ["Mamba", "RWKV 4", "RecurrentGemma", "BLOOM", "OPT"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_in_which_it_has_no_effect_is_refused_by_name_before_anything_is_written(family: str, tmp_path: Path):
    model = build(family)
    model.resize_token_embeddings(1200)
    config = settings(tmp_path, "handed_in", held_out_fraction=0.4)
    config, _ = overridden(config, {"model.sites": ["resid_post.0"]})
    with pytest.raises(ModelError, match=r"cannot keep the documents of a context apart.*text\.separate_documents"):
        unbraid.train(config, tmp_path / "run", model=model, tokenizer=word_tokenizer())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", [{"text.bos": "context"}, {"text.pack": False}])
def test_it_is_refused_where_it_could_not_hold(setting: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"separate_documents.*is read only while"):
        overridden(RunConfig(), {"text.separate_documents": True, "text.bos": "document"} | setting)


def test_a_run_trains_evaluates_and_resumes_with_documents_apart(tmp_path: Path):
    config, _ = overridden(unbraid.recipes.tiny(), {"text.separate_documents": True, "text.bos": "document"})
    config, _ = overridden(config, {"training.tokens": 5120, "training.held_out_tokens": 512})
    run = unbraid.train(config, tmp_path / "run")
    scores = [entry["ce_loss_score"] for entry in run.summary["saes"].values()]
    assert all(score is not None for score in scores)
    before = run.summary["steps"]["executed"]
    assert unbraid.resume(run.path, changes={"training.tokens": 7680}).summary["steps"]["executed"] > before
