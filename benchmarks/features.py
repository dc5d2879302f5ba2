"""What working with features costs, as ratios to a plain forward pass or generation of SmolLM2-135M.

    python benchmarks/features.py                # all sections; a few minutes on two quiet cores
    python benchmarks/features.py passes         # one section

Calls take turns in one process, so that whatever else the machine does falls on all of them. Every figure is a median
of wall time with its quartiles; the ratio's target stands beside it. Dictionaries are random TopK SAEs of 8 D features
at three depths: what they hold does not change what they cost.
"""

from collections.abc import Callable
from typing import Any

import torch
from support.timing import Times, arguments, progress, record, take_turns

from unbraid.activations.load import load_model_and_tokenizer
from unbraid.config import ModelConfig, SAEConfig
from unbraid.feature_model import Ablate, Clamp, FeatureModel, Scale, Splice, Steer, attribution, logit
from unbraid.sae import build

SITES = ["resid_post.6", "resid_post.14", "resid_post.22"]
TOKENS, NEW_TOKENS, TURNS = 64, 24, 9
TARGETS = {
    "read, 3 sites": 1.15,
    "steer": 1.05,
    "clamp": 1.08,
    "ablate": 1.08,
    "scale": 1.08,
    "splice": 1.15,
    "gradient, 3 sites": 4.0,
    "ig, 1 site, 8 steps": 32.0,
    "edges, 4 targets": 11.5,
}


def opened(device: str) -> tuple[FeatureModel, torch.Tensor, str]:
    """The model, one prompt, and a feature that fires in it."""
    model, tokenizer = load_model_and_tokenizer(ModelConfig())
    model, draws = model.to(device), torch.Generator().manual_seed(0)
    settings = SAEConfig(architecture="topk", n_features=8 * 576, k=32)
    saes = {site: build(settings, 576, draws).eval().requires_grad_(False).to(device) for site in SITES}
    fm = FeatureModel(model, tokenizer, saes)
    ids = torch.randint(1000, 40_000, (1, TOKENS), generator=draws).to(device)
    return fm, ids, fm.read(ids).of(SITES[0]).top(1)[0]["feature"]


def forward_with(fm: FeatureModel, ids: torch.Tensor, edits: list[Any]) -> Callable[[], Any]:
    """One pass with edits, as `edited` makes it."""

    def call() -> Any:
        with torch.no_grad(), fm.edited(edits) as model:
            return model(ids, use_cache=False)

    return call


def passes(asked: Any) -> dict[str, Any]:
    """Edits and questions beside one plain forward pass."""
    fm, ids, feature = opened(asked.device)
    metric = logit(500, minus=600)

    def plain() -> Any:
        with torch.no_grad():
            return fm.hf_model(ids, use_cache=False)

    one = SITES[:1]
    attribution.CLOSE = float("inf")  # as many steps as it begins with: what a step costs, not how many are needed
    contenders: dict[str, Callable[[], Any]] = {
        "forward": plain,
        "read, 3 sites": lambda: fm.read(ids),
        "steer": forward_with(fm, ids, [Steer(feature, 5.0, unit="code")]),
        "clamp": forward_with(fm, ids, [Clamp(feature, 5.0)]),
        "ablate": forward_with(fm, ids, [Ablate(feature)]),
        "scale": forward_with(fm, ids, [Scale(feature, 2.0)]),
        "splice": forward_with(fm, ids, [Splice(SITES[0])]),
        "gradient, 3 sites": lambda: fm.attribute(ids, metric),
        "ig, 1 site, 8 steps": lambda: fm.attribute(ids, metric, method="ig", sites=one),
        "edges, 4 targets": lambda: fm.edges(ids, SITES[0], SITES[1], top=4),
    }
    times = take_turns(contenders, TURNS, asked.device)
    progress("one pass", times)
    return compared(times, "forward")


def generation(asked: Any) -> dict[str, Any]:
    """Generation with edits beside the model's own."""
    fm, ids, feature = opened(asked.device)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    contenders: dict[str, Callable[[], Any]] = {
        "generate": lambda: fm.hf_model.generate(ids, attention_mask=torch.ones_like(ids), **options),  # pyright: ignore
        "steer": lambda: fm.generate(ids, [Steer(feature, 5.0, unit="code")], **options).ids,
        "clamp": lambda: fm.generate(ids, [Clamp(feature, 5.0)], **options).ids,
        "splice": lambda: fm.generate(ids, [Splice(SITES[0])], **options).ids,
    }
    times = take_turns(contenders, TURNS, asked.device)
    progress(f"{NEW_TOKENS} tokens", times)
    return compared(times, "generate")


def compared(times: dict[str, Times], baseline: str) -> dict[str, Any]:
    """Each contender's report with its ratios turn by turn to the baseline (median, quartiles) and the target."""
    found: dict[str, Any] = {}
    for name, own in times.items():
        ratios = torch.tensor([a / b for a, b in zip(own.wall, times[baseline].wall, strict=True)])
        low, middle, high = torch.quantile(ratios, torch.tensor([0.25, 0.5, 0.75])).tolist()
        found[name] = own.report() | {"ratio": round(middle, 3), "ratio_quartiles": [round(low, 3), round(high, 3)]}
        if name in TARGETS:
            found[name] |= {"target": TARGETS[name], "met": low <= TARGETS[name]}
            print(f"  {name}: {middle:.2f} ({low:.2f} to {high:.2f}), target {TARGETS[name]}", flush=True)
    return found


if __name__ == "__main__":
    asked = arguments(__doc__).parse_args()
    record({"passes": lambda: passes(asked), "generation": lambda: generation(asked)}, asked, "features")
