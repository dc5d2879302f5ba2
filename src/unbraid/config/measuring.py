"""The settings of what is measured: `unbraid eval`, synthetic worlds and `unbraid synth`."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from unbraid.config.checks import GIVEN, Common, Condition, Location, Section, above, active_when, including, wrong
from unbraid.config.decorrelation import DecorrelationConfig
from unbraid.config.kinds import Registry
from unbraid.config.run import Device, TextConfig
from unbraid.config.sae import MOST_FEATURES, SAEConfig

if TYPE_CHECKING:
    from unbraid.evaluation.suite import Suite


class WorldConfig(Section):
    """A synthetic world after SynthSAEBench (arXiv 2602.14687); the defaults are its full-size benchmark world."""

    n_features: int = Field(default=16_384, ge=2)
    """True features G."""
    d_model: int = Field(default=768, ge=1)
    """Width D of the activations."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """The one seed the world itself derives from; samples have their own generator."""
    max_probability: float = Field(default=0.4, gt=0.0, lt=1.0)
    """Firing probability of the most common feature."""
    min_probability: float = Field(default=5e-4, gt=0.0, lt=1.0)
    """Firing probability of the rarest feature."""
    zipf_exponent: float = Field(default=0.5, gt=0.0)
    """How fast the firing probability falls with the rank of a feature."""
    roots: int = Field(default=128, ge=0)
    """Features at the top of a hierarchy; features beyond the trees stand alone."""
    branching: Annotated[int, active_when(roots=above(0), depth=above(0))] = Field(default=4, ge=1)
    """Children of every parent."""
    depth: Annotated[int, active_when(roots=above(0))] = Field(default=3, ge=0, le=64)
    """Levels below the roots."""
    exclusive_siblings: Annotated[bool, active_when(roots=above(0), depth=above(0))] = True
    """At most one child of a parent fires at a time."""
    correlation_rank: int = Field(default=25, ge=0)
    """Shared factors of the Gaussian copula; 0 makes families fire independently."""
    correlation_scale: Annotated[float, active_when(correlation_rank=above(0))] = Field(default=0.1, ge=0.0)
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
    orthogonalise_lr: Annotated[float, active_when(orthogonalise_steps=above(0))] = Field(default=3e-4, gt=0.0)
    """Their learning rate."""

    @model_validator(mode="after")
    def _trees_fit(self) -> "WorldConfig":
        needed = self.roots * sum(self.branching**level for level in range(self.depth + 1))
        if needed > self.n_features:
            raise wrong(
                f"{self.roots} roots x {self.branching} children x {self.depth} levels need {needed} features; "
                f"expected at most n_features = {self.n_features}; lower roots, branching or depth"
            )
        if self.min_probability > self.max_probability:
            raise wrong(
                f"min_probability {self.min_probability} is above max_probability {self.max_probability}; swap them"
            )
        return self


BUILT_IN = ("core", "correlation", "contexts", "geometry", "probing", "absorption", "ground-truth")
"""Suites of the package in their order, named here so that settings are read without importing them."""
SUITES: "Registry[type[Suite]]" = Registry("the suite", "unbraid.evaluation.suites")
"""Suites by name, with those of plugins."""
READS_TEXT = ("text", "codes")
"""What of `Suite.reads` says that held-out text is read."""


def suite_names() -> list[str]:
    """Names of all suites there are."""
    return list(dict.fromkeys((*BUILT_IN, *SUITES.registered)))


def _reading(suites: list[str], built_in: tuple[str, ...], *ways: str) -> bool:
    others = (suite for name, suite in SUITES.registered.items() if name not in BUILT_IN)
    return any(name in suites for name in built_in) or any(one.name in suites and one.reads in ways for one in others)


ON_TEXT = ("core", "correlation", "contexts")
TEXT = Condition(
    lambda suites: _reading(suites, ON_TEXT, *READS_TEXT),
    "a list with core, correlation, contexts or another that reads text",
)
MODEL = Condition(
    lambda suites: _reading(suites, (*ON_TEXT, "probing", "absorption"), "prompts", *READS_TEXT),
    "a list with one that reads the model, such as core",
)


def _checked_suites(names: Any) -> Any:
    """Names in a list or after commas, in the order they are run in."""
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return names
    names = [name.strip() for words in names for name in words.split(",")]
    for name in names:
        if name not in suite_names():
            raise wrong(f"there is no suite {name[:80]!r}; expected some of {','.join(suite_names())}")
    return [suite for suite in suite_names() if suite in names]


Suites = Annotated[list[str], Field(min_length=1), BeforeValidator(_checked_suites), Common]


class ProbingConfig(Section):
    """k-sparse probing: which labelled texts, and how many."""

    group = "probing"

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

    group = "spelling"

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

    suites: Suites = Field(default_factory=suite_names)
    """What to run, separated by commas: core, correlation, contexts, geometry, probing, absorption, ground-truth, or a
    plugin's; suites that do not apply are skipped with the reason."""
    tokens: Annotated[int, Common, active_when(suites=TEXT)] = Field(default=12_288, ge=1)
    """Held-out tokens that are read, in whole contexts."""
    splice_contexts: Annotated[int, active_when(suites=including("core"))] = Field(default=6, ge=1)
    """Held-out contexts on which reconstructions are spliced into the model: several full passes each."""
    fraction: Annotated[float, active_when(suites=including("correlation"))] = Field(default=1e-3, gt=0.0, le=1.0)
    """Share of live pairs that counts as the top of the correlations."""
    replicates: Annotated[int, active_when(suites=including("correlation"))] = Field(default=20, ge=2)
    """Bootstrap samples behind each interval of the correlation suite."""
    context_features: Annotated[int, active_when(suites=including("contexts"))] = Field(default=48, ge=1)
    """Features per SAE whose contexts are scored by the sentence encoder, drawn from those with enough of them."""
    meta_steps: Annotated[int, active_when(suites=including("geometry"))] = Field(default=200, ge=1)
    """Training steps of the meta-SAE behind the composition rate; SAEBench takes 1500. Compare only at equal steps."""
    probing: Annotated[ProbingConfig, active_when(suites=including("probing"))] = Field(default_factory=ProbingConfig)
    spelling: Annotated[SpellingConfig, active_when(suites=including("absorption"))] = Field(
        default_factory=SpellingConfig
    )
    controls: bool = True
    """Measure what has learned nothing beside the SAEs: a random SAE, a permuted decoder, PCA."""
    control_tokens: Annotated[int, active_when(controls=True, suites=MODEL)] = Field(default=200_000, ge=0)
    """Tokens on which controls are trained once per site, width and L0, and then kept: SAEs with a frozen decoder, a
    decoder that may turn a little, a frozen encoder. 0 leaves them out, as do more than 32,768 features."""
    world: Annotated[str | None, active_when(suites=including("ground-truth"))] = None
    """Synthetic world the SAEs were trained on, for the ground-truth suite."""
    world_samples: Annotated[int, active_when(suites=including("ground-truth"), world=GIVEN)] = Field(
        default=100_000, ge=1
    )
    """Samples of that world."""
    model: Annotated[str | None, Common] = None
    """Language model, where the SAE's folder does not say (or under another name here)."""
    site: Annotated[str | None, Common] = None
    """Site, where the SAE's folder does not say."""
    text: TextConfig = Field(default_factory=TextConfig)
    """Held-out text for an SAE folder; a run brings its own."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of controls, bootstraps, meta-SAEs and the choice of words."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


class SynthConfig(Section):
    """What `unbraid synth` trains on a synthetic world."""

    world: Annotated[str, Common] = "small"
    """Name of the world: unit (seconds), small, medium, full."""
    architectures: Annotated[list[str], Common] = Field(
        default_factory=lambda: ["relu", "topk", "batch_topk", "jumprelu", "matryoshka"], min_length=1
    )
    """Trained side by side on the same samples, each with every seed."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Of weights and samples."""
    n_features: Annotated[int | None, Common] = Field(default=None, ge=2, le=MOST_FEATURES)
    """Width of the SAEs; none takes a third of the world's features."""
    k: Annotated[int | None, Common] = Field(default=None, ge=1)
    """Active features per token for the top-k family; none takes three quarters of the world's L0."""
    lambda1: Annotated[float, Common] = Field(default=0.01, ge=0.0)
    """Weight of the sparsity loss for the others."""
    samples: Annotated[int | None, Common] = Field(default=None, ge=1)
    """Training samples; none takes 16,000 per feature of the world."""
    batch: int = Field(default=1024, ge=1, le=1 << 24)
    """Samples per step."""
    lr: float = Field(default=1e-3, gt=0.0, le=1.0)
    """Learning rate after warm-up."""
    decorrelation: SerializeAsAny[DecorrelationConfig] = Field(default_factory=lambda: DecorrelationConfig(lambda2=0.0))
    """Penalty, off by default."""
    eval_samples: int = Field(default=100_000, ge=1)
    """Samples they are evaluated on."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:1, ..."""

    @model_validator(mode="after")
    def _architectures_exist(self) -> "SynthConfig":
        kinds = SAEConfig.kinds()
        for name in self.architectures:
            if name not in kinds:
                raise wrong(f"architectures names {name[:80]!r}; expected some of {', '.join(kinds)}")
        if len(set(self.architectures)) < len(self.architectures) or len(set(self.seeds)) < len(self.seeds):
            raise wrong("architectures or seeds name one twice; expected each once")
        return self

    def unread(self) -> dict[Location, str]:
        """See `Section.unread`; k and lambda1 belong to some architectures each."""
        found = super().unread()
        for setting in ("k", "lambda1"):
            readers = [name for name, kind in SAEConfig.kinds().items() if setting in kind.model_fields]
            if not set(readers) & set(self.architectures):
                found[(setting,)] = f"is read by {', '.join(readers)}; add one of these to architectures"
        return found
