"""The settings of what is measured: `unbraid eval`, synthetic worlds and `unbraid synth`."""

from typing import Annotated, Literal

import tyro
from pydantic import Field, model_validator
from tyro.constructors import PrimitiveConstructorSpec

from unbraid.config.checks import Section
from unbraid.config.decorrelation import DecorrelationConfig
from unbraid.config.run import Architecture, TextConfig
from unbraid.errors import ConfigError


class WorldConfig(Section):
    """A synthetic world after SynthSAEBench (arXiv 2602.14687); the defaults are its full-size benchmark world."""

    n_features: int = Field(default=16_384, ge=2)
    """True features G."""
    d_model: int = Field(default=768, ge=1)
    """Width D of the activations."""
    seed: int = Field(default=0, ge=0)
    """The one seed the world itself derives from; samples have their own generator."""
    max_probability: float = Field(default=0.4, gt=0.0, lt=1.0)
    """Firing probability of the most common feature."""
    min_probability: float = Field(default=5e-4, gt=0.0, lt=1.0)
    """Firing probability of the rarest feature."""
    zipf_exponent: float = Field(default=0.5, gt=0.0)
    """How fast the firing probability falls with the rank of a feature."""
    roots: int = Field(default=128, ge=0)
    """Features at the top of a hierarchy; features beyond the trees stand alone."""
    branching: int = Field(default=4, ge=1)
    """Children of every parent."""
    depth: int = Field(default=3, ge=0)
    """Levels below the roots."""
    exclusive_siblings: bool = True
    """At most one child of a parent fires at a time."""
    correlation_rank: int = Field(default=25, ge=0)
    """Shared factors of the Gaussian copula; 0 makes families fire independently."""
    correlation_scale: float = Field(default=0.1, ge=0.0)
    """Standard deviation of a feature's loading on each factor."""
    magnitude_first: float = Field(default=5.0, gt=0.0)
    """Mean magnitude of the most common feature."""
    magnitude_last: float = Field(default=4.0, gt=0.0)
    """Mean magnitude of the rarest feature; linear in the rank between them."""
    magnitude_sd_mean: float = Field(default=0.5, ge=0.0)
    """Mean of the normal whose absolute value is a feature's standard deviation of magnitude."""
    magnitude_sd_sd: float = Field(default=0.5, ge=0.0)
    """Its standard deviation."""
    bias_norm: float = Field(default=1.0, ge=0.0)
    """Norm of the constant added to every activation."""
    orthogonalise_steps: int = Field(default=100, ge=0)
    """Adam steps that push the true directions apart."""
    orthogonalise_lr: float = Field(default=3e-4, gt=0.0)
    """Their learning rate."""

    @model_validator(mode="after")
    def _trees_fit(self) -> "WorldConfig":
        needed = self.roots * sum(self.branching**level for level in range(self.depth + 1))
        if needed > self.n_features:
            raise ConfigError(
                f"{self.roots} roots x {self.branching} children x {self.depth} levels need {needed} features; "
                f"expected at most n_features = {self.n_features}; lower roots, branching or depth"
            )
        if self.min_probability > self.max_probability:
            raise ConfigError(
                f"min_probability {self.min_probability} is above max_probability {self.max_probability}; swap them"
            )
        return self


Suite = Literal["core", "correlation", "contexts", "geometry", "probing", "absorption", "ground-truth"]
SUITES: list[Suite] = ["core", "correlation", "contexts", "geometry", "probing", "absorption", "ground-truth"]


def _read_suites(text: str) -> list[Suite]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SUITES:
            raise ConfigError(f"there is no suite {name!r}; expected some of {','.join(SUITES)}")
    return [suite for suite in SUITES if suite in names]


Suites = Annotated[
    list[Suite],
    tyro.conf.arg(name="suite"),
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="SUITE,...",
        instance_from_str=lambda words: _read_suites(words[0]),
        is_instance=lambda value: isinstance(value, list),
        str_from_instance=lambda value: [",".join(value)],
    ),
]


class ProbingConfig(Section):
    """k-sparse probing: which labelled texts, and how many."""

    train: int = Field(default=128, ge=4)
    """Texts per task a probe is fitted on, half of them positive."""
    test: int = Field(default=64, ge=4)
    """Texts per task it is scored on."""
    max_tokens: int = Field(default=48, ge=2)
    """A text is cut to its beginning of this many tokens, BOS included."""
    tasks: list[str] = [
        "158_code_C",
        "159_code_Python",
        "160_code_HTML",
        "161_agnews_0",
        "162_agnews_1",
        "140_news_class_Technology",
        "145_disease_class_digestive system diseases",
        "149_twt_emotion_happiness",
        "152_it_tick_Hardware",
        "92_glue_sst2",
        "96_spam_is",
        "94_ai_gen",
    ]
    """Binary tasks: files of the sae-probes package, without their ending."""


class SpellingConfig(Section):
    """First-letter absorption: how many words the model is asked about."""

    train: int = Field(default=80, ge=4)
    """Words a letter that probes are fitted on (fewer where the vocabulary has fewer)."""
    test: int = Field(default=20, ge=2)
    """Held-out words a letter."""
    examples: int = Field(default=5, ge=1)
    """Solved examples before the first word of a prompt."""
    asked: int = Field(default=105, ge=1)
    """Words whose first letter the model must name, to see whether it can spell at all; in whole prompts of 15."""


class EvaluationConfig(Section):
    """What `unbraid eval` measures, and on how much."""

    suites: Suites = SUITES
    """What to run, separated by commas; suites that do not apply are skipped with the reason."""
    tokens: int = Field(default=12_288, ge=1)
    """Held-out tokens for core and correlation, in whole contexts."""
    splice_contexts: int = Field(default=6, ge=1)
    """Held-out contexts on which reconstructions are spliced into the model: several full passes each."""
    fraction: float = Field(default=1e-3, gt=0.0, le=1.0)
    """Share of live pairs that counts as the top of the correlations."""
    replicates: int = Field(default=20, ge=2)
    """Bootstrap samples behind each interval of the correlation suite."""
    context_features: int = Field(default=48, ge=1)
    """Features per SAE whose contexts are scored by the sentence encoder, drawn from those with enough of them."""
    meta_steps: int = Field(default=200, ge=1)
    """Training steps of the meta-SAE behind the composition rate; SAEBench takes 1500. Compare only at equal steps."""
    probing: ProbingConfig = ProbingConfig()
    spelling: SpellingConfig = SpellingConfig()
    controls: bool = True
    """Measure what has learned nothing beside the SAEs: a random SAE, a permuted decoder, PCA."""
    world: str | None = None
    """Synthetic world the SAEs were trained on, for the ground-truth suite."""
    world_samples: int = Field(default=100_000, ge=1)
    """Samples of that world."""
    model: str | None = None
    """Language model, where the SAE's folder does not say (or under another name here)."""
    site: str | None = None
    """Site, where the SAE's folder does not say."""
    text: TextConfig = TextConfig()
    """Held-out text for an SAE folder; a run brings its own."""
    seed: int = Field(default=0, ge=0)
    """Of controls, bootstraps, meta-SAEs and the choice of words."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


class SynthConfig(Section):
    """What `unbraid synth` trains on a synthetic world."""

    world: str = "small"
    """Name of the world: unit (seconds), small, medium, full."""
    architectures: list[Architecture] = ["relu", "topk", "batch_topk", "jumprelu", "matryoshka"]
    """Trained side by side on the same samples, each with every seed."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Of weights and samples."""
    n_features: int | None = Field(default=None, ge=2)
    """Width of the SAEs; none takes a third of the world's features."""
    k: int | None = Field(default=None, ge=1)
    """Active features per token for the top-k family; none takes three quarters of the world's L0."""
    lambda1: float = Field(default=0.01, ge=0.0)
    """Weight of the sparsity loss for the others."""
    samples: int | None = Field(default=None, ge=1)
    """Training samples; none takes 16,000 per feature of the world."""
    batch: int = Field(default=1024, ge=1)
    """Samples per step."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Learning rate after warm-up."""
    decorrelation: DecorrelationConfig = DecorrelationConfig(lambda2=0.0)
    """Penalty, off by default."""
    eval_samples: int = Field(default=100_000, ge=1)
    """Samples they are judged on."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
