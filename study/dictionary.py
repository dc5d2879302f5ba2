"""The dictionary that comes with unbraid, made again by one command: `python study/dictionary.py`.

SmolLM2's residual stream after block 3, Matryoshka with the penalty of the preset `apart`. The model is run once over
2.58 million rows of the packaged text, and the dictionary is trained on these more than once. Each part is left alone
where it is complete and goes on where it was cut off; on two quiet cores all of it takes about 40 minutes.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import unbraid
from unbraid import formats, recipes
from unbraid.activations.cache import CachedActivations
from unbraid.activations.live import LiveActivations
from unbraid.activations.rows import Chunk, RowFilter
from unbraid.bundled import bundled_folder
from unbraid.config import EvaluationConfig, RunConfig, overridden
from unbraid.evaluation.suites import run_suites
from unbraid.feature_model.held_out import HeldOut
from unbraid.feature_model.stored_held_out import FILE, corpus_texts, digest, opening_ids, save_held_out
from unbraid.presets import ROWS_APART
from unbraid.reporting.dashboard.passes import held_out_pass
from unbraid.run import fill_cache
from unbraid.text.contexts import is_held_out

NAME = "smollm2-demo"
SETTINGS = {
    "sae.n_features": 4608,
    "sae.k": 32,
    # At 2e-3 R² stands still after 1.3 million tokens and features die steadily from then on (docs/log.md).
    "optimiser.lr": 1e-3,
    "optimiser.warmup_steps": 100,
    "optimiser.decay_fraction": 0.4,
    # As many dead features as there are live ones per token: more share the residual, and none comes near firing.
    "sae.aux_k": 32,
    "sae.dead_after_tokens": 10_240,
    "training.tokens": 7_340_032,
    "training.epochs": 4,
    "training.held_out_tokens": 49_152,
    "training.checkpoint_every": 250,
    "buffer.contexts": 1024,
    "buffer.dtype": "bfloat16",
}

HARVESTED = 2_576_384
"""Rows of text to harvest; whole model batches give a few more."""
ROWS_OF_TEXT = 2_577_091
TEXT = f"{ROWS_OF_TEXT:,} rows of the packaged text, read {{:.1f}} times"
ROWS = 16_000
"""Held-out rows whose codes come along."""
MEASURED: dict[str, Any] = {"tokens": 32_768, "splice_contexts": 48}
"""Of the card."""


def settings(cache: Path) -> RunConfig:
    """Of the run: the demo's text, model and site."""
    config = recipes.demo().model_copy(update={"variants": {"": {}}, "name": NAME})
    penalty = ROWS_APART | {"decorrelation.fraction": 1e-3}
    return overridden(config, penalty | SETTINGS, NAME)[0].model_copy(update={"cache": str(cache)})


def train(work: Path) -> unbraid.Run:
    """Harvest and train, or go on with either."""
    cache, run = work / "cache", work / "run"
    config = settings(cache)
    once = {"training.tokens": HARVESTED, "training.epochs": 1}
    fill_cache(overridden(config.model_copy(update={"cache": None}), once, NAME)[0], cache)
    return unbraid.resume(run) if (run / "config.json").is_file() else unbraid.train(config, run)


class Openings:
    """A `ChunkSource` of the first tokens of held-out documents, one context each, in an order that a digest gives.

    Documents of Python's standard library are left out: they differ from one Python to another.
    """

    def __init__(self, live: LiveActivations, config: RunConfig):
        self.live, self.sites, self.widths = live, live.sites, live.widths
        self.context_length, self.batch_contexts = live.context_length, live.batch_contexts
        self.special_ids, self.identity = live.special_ids, live.identity
        tokenizer, length = live.model.tokenizer, live.context_length
        held_out = (
            text
            for text, domain in zip(*corpus_texts(), strict=True)
            if domain != "standard_library" and is_held_out(text, config.text.held_out_fraction)
        )
        opened = ((text, opening_ids(tokenizer, text, length)) for text in sorted(held_out, key=digest))
        self.documents = [(text, ids) for text, ids in opened if len(ids) == length]

    def chunks(self, position: dict[str, Any] | None, held_out: bool = False) -> Iterator[Chunk]:
        """All documents, a model batch at a time."""
        for first in range(0, len(self.documents), self.batch_contexts):
            few = self.documents[first : first + self.batch_contexts]
            tokens_BT = torch.tensor([ids for _, ids in few])
            yield Chunk(tokens_BT, self.live.model.activations(tokens_BT, None), {})


def package(work: Path, out: Path) -> None:
    """Write the folder that comes with unbraid: weights in bfloat16, where features fire, and the card."""
    run = unbraid.Run(work / "run")
    config = run.config
    (name,) = run.saes
    stored = formats.open_folder(run.path / "saes" / name)
    seen_N, rows, largest_N = _on_cached_held_out(config, stored.sae)
    formats.save(
        stored.sae,
        out,
        metadata=stored.metadata | {"training_text": TEXT.format(config.training.tokens / ROWS_OF_TEXT)},
        frequency_N=seen_N / rows,
    )
    tensors = load_file(out / "sae_weights.safetensors")
    halved = {key: value.bfloat16() if value.ndim == 2 else value for key, value in tensors.items()}
    save_file(halved, out / "sae_weights.safetensors", metadata={"format": "pt"})

    sae = formats.load(out)
    live = LiveActivations(config.model_copy(update={"cache": None}), torch.device("cpu"))
    openings = Openings(live, config)
    seen = held_out_pass(config, openings, {NAME: ((0,), sae)}, ROWS, torch.device("cpu"))
    contexts = len(seen.tokens_CT)
    shown = HeldOut(seen, seen.norms, np.full(contexts, config.text.context_length))
    largest_N = np.maximum(shown.maxima[NAME], largest_N)
    save_held_out(out / FILE, shown, NAME, [text for text, _ in openings.documents[:contexts]], largest_N)

    report = run_suites(out, EvaluationConfig(suites=["core"], controls=False, **MEASURED), out=work / "evaluation")
    (found,) = report["saes"].values()
    facts = {
        "ce": found["core"]["model_performance_preservation"],
        "r2": found["core"]["reconstruction_quality"]["r2"],
        "l0": found["core"]["sparsity"]["l0"],
        "rows": rows,
        "silent": float((seen_N == 0).double().mean()),
        "summary": run.summary,
        "contexts": contexts,
        "shown_rows": len(seen.context_R),
        "with_contexts": float((shown.maxima[NAME] > 0).mean()),
    }
    (out / "README.md").write_text(card(config, facts))
    bytes_in_all = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {bytes_in_all / 1e6:.2f} MB, {facts}")


def card(config: RunConfig, facts: dict[str, Any]) -> str:
    """README.md of the folder, from the template beside this file."""
    ce = facts["ce"]
    low, high = ce["ce_loss_score_interval"]
    (trained,) = facts["summary"]["saes"].values()
    values = facts | {
        "name": NAME,
        "text": TEXT.format(config.training.tokens / ROWS_OF_TEXT),
        "config": config,
        "ce_score": f"{ce['ce_loss_score']:.4f} (95 % interval {low:.4f} to {high:.4f})",
        "nats": " / ".join(f"{ce[f'ce_loss_{which}']:.3f}" for which in ("without_sae", "with_sae", "with_ablation")),
        "dead": trained["dead_fraction"],
        "dead_after": config.sae.dead_after_tokens,
        "maxima_rows": facts["rows"] + facts["shown_rows"],
    }
    return (Path(__file__).parent / "dictionary_card.md").read_text().format(**values)


@torch.no_grad()
def _on_cached_held_out(config: RunConfig, sae: Any) -> tuple[torch.Tensor, int, np.ndarray]:
    """On the harvest's held-out rows: how often each feature fires [N], out of how many, its largest code [N]."""
    source = CachedActivations(config, Path(str(config.cache)))
    rows_filter = RowFilter(config.buffer, config.sites, source.special_ids)
    seen_N, largest_N = torch.zeros(sae.n_features), torch.zeros(sae.n_features)
    for chunk in source.chunks(None, held_out=True):
        (x_RD,) = rows_filter(chunk)
        f_RN = sae.encode(x_RD.float())
        seen_N += (f_RN > 0).sum(0)
        largest_N = largest_N.maximum(f_RN.amax(0))
    return seen_N, rows_filter.kept, largest_N.numpy()


def main() -> None:
    """Train and package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "cache" / NAME, help="cache and run")
    parser.add_argument("--out", type=Path, default=bundled_folder(NAME), help="the folder that comes with unbraid")
    options = parser.parse_args()
    train(options.work)
    package(options.work, options.out)


if __name__ == "__main__":
    main()
