"""The settings of a run: text, model, buffer, SAEs, decorrelation, optimiser, training."""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails

from unbraid.config.checks import (
    UNREAD,
    AsTuple,
    Common,
    Condition,
    Location,
    Section,
    above,
    activation,
    active_when,
    complaint,
    including,
    unread,
    wrong,
)
from unbraid.config.decorrelation import DecorrelationConfig
from unbraid.config.overrides import merge
from unbraid.config.sae import SAEConfig
from unbraid.config.sources import BufferConfig, ModelConfig, TextConfig
from unbraid.files import is_folder_name
from unbraid.sites import Route, Site

VARIED = ("sae", "decorrelation", "optimiser")
"""Groups of settings in which variants may differ."""
VERSION = "0.2"
"""Of the settings in a run's config.json."""
READ_BY_THE_RUN = {("decorrelation", "fraction"), ("sae", "architecture"), ("decorrelation", "method")}
"""Settings of an SAE that the run itself reads too, or that say which others there are."""


Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimiserConfig(Section):
    """Adam and its schedules.

    Example:
        >>> OptimiserConfig(lr=1e-3, warmup_steps=200).decay_fraction
        0.2
    """

    group = "optimiser"

    lr: Annotated[float, Common] = Field(default=3e-4, gt=0.0, le=1.0)
    """Learning rate after warm-up."""
    betas: Annotated[tuple[Share, Share], AsTuple] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = Field(default=1e-8, gt=0.0, le=1.0)
    """Adam's epsilon."""
    warmup_steps: Annotated[int, Common] = Field(default=1000, ge=0)
    """Steps over which the learning rate rises linearly; the first one is already above zero."""
    decay_fraction: float = Field(default=0.2, ge=0.0, le=1.0)
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    sparsity_warmup_steps: Annotated[int, active_when(sae__lambda1=above(0))] = Field(default=0, ge=0)
    """Steps over which lambda1 rises linearly."""
    decorrelation_warmup_steps: Annotated[int, active_when(decorrelation__lambda2=above(0))] = Field(default=0, ge=0)
    """Steps over which lambda2 rises linearly."""
    clip_norm: float | None = Field(default=1.0, gt=0.0)
    """Clip the global gradient norm of each SAE; none disables clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the encoder's product, by far the largest of a step; weights, gradients and Adam's state stay float32.
    bfloat16 is slower than float32 on most CPUs."""


MOST_THREADS = 1024
"""Far more than any machine has use for; torch ends the process somewhere above."""


def _checked_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d{1,3})?", device):
        raise wrong(f"training.device = {device!r} cannot be used; expected auto, cpu or cuda[:N]")
    return device


Device = Annotated[str, AfterValidator(_checked_device), Common]


class TrainingConfig(Section):
    """How long, how often and where."""

    group = "training"

    tokens: Annotated[int, Common] = Field(default=20_000_000, ge=0)
    """Training tokens; steps = tokens // batch_tokens."""
    epochs: Annotated[int, Common] = Field(default=1, ge=1, le=1 << 20)
    """Times the training text may be read before it counts as used up; each reading goes through the same text."""
    batch_tokens: Annotated[int, Common] = Field(default=2048, ge=1, le=1 << 24)
    """Token rows B per training step."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    loggers: Annotated[list[Literal["tensorboard", "wandb", "trackio"]], Common] = []
    """Where metrics go besides metrics.jsonl; each is an extra: pip install 'unbraid[wandb]'."""
    log_project: Annotated[str, active_when(loggers=including("wandb", "trackio"))] = "unbraid"
    """Project under which wandb and trackio file the run."""
    checkpoint_every: int = Field(default=1000, ge=0)
    """Steps between checkpoints; 0 writes one only when interrupted."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Older checkpoints are deleted."""
    held_out_tokens: int = Field(default=32_768, ge=256)
    """Held-out token rows for the final metrics."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: Annotated[int | None, Common] = Field(default=None, ge=1, le=MOST_THREADS)
    """CPU threads; none keeps torch's default."""
    tf32: Annotated[bool, active_when(device=Condition(lambda device: device.startswith(("auto", "cuda")), "cuda"))] = (
        False
    )
    """Let float32 matrix products, the language model's too, go by TF32 on GPUs that have it."""
    feature_shards: int | None = Field(default=None, ge=1)
    """Under `torchrun`: over how many ranks each SAE's features are split (at most; it must divide their number); none
    splits no further than needed to give every rank an SAE."""

    @field_validator("log_project")
    @classmethod
    def _project_is_a_name(cls, name: str) -> str:
        if not is_folder_name(name):
            raise wrong(
                f"training.log_project = {name!r} cannot name a project; expected a name without slashes, since "
                "loggers keep files under it; change it"
            )
        return name


def _checked_variants(variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if not variants:
        raise wrong('variants is empty; expected at least one, such as {"": {}}')
    for name in variants:
        if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}", name):
            raise wrong(
                f"variant name {name[:80]!r} cannot be part of a folder name; expected at most 64 letters, "
                "digits and '-'"
            )
    return variants


Variants = Annotated[dict[str, dict[str, Any]], AfterValidator(_checked_variants)]


class VariantConfig(Section):
    """What may differ between SAEs that share a run's text, model pass and buffer.

    Example:
        >>> unbraid.recipes.tiny().variant("twin").decorrelation.lambda2
        0.0
    """

    seed: int = Field(ge=0)
    sae: SerializeAsAny[SAEConfig]
    decorrelation: SerializeAsAny[DecorrelationConfig]
    optimiser: OptimiserConfig

    def unread(self) -> dict[Location, str]:
        """See `Section.unread`; some settings are read only beside others of another group."""
        found = super().unread()
        for group in VARIED:
            for name, conditions in getattr(self, group).conditions_elsewhere().items():
                own = {path: one for path, one in conditions.items() if path.partition(".")[0] in VARIED}
                needs = [(path, wanted.words) for path, wanted in own.items() if not _meets(self, path, wanted)]
                if needs:
                    found[(group, name)] = activation(needs)
        if not self.decorrelation.selects:
            found["decorrelation", "fraction"] = "is read here by methods that select pairs only; set it for the run"
        return found

    @model_validator(mode="after")
    def _widths_fit(self) -> "VariantConfig":
        problem = self.decorrelation.problem_with_width(self.sae.n_features)
        if problem:
            raise wrong(problem)
        return self


class RunConfig(Section):
    """One run: text -> language model -> buffer -> SAEs, for every site and every variant.

    Example:
        >>> config = RunConfig(
        ...     model={"name": "random:llama", "sites": ["resid_post.0"]},
        ...     sae={"architecture": "topk", "n_features": 256, "k": 8},
        ...     training={"tokens": 100_000, "batch_tokens": 1_000},
        ...     variants={"decorrelated": {}, "twin": {"decorrelation.lambda2": 0.0}},
        ... )
        >>> config.steps, config.sae_names
        (100, ['resid_post.0_decorrelated', 'resid_post.0_twin'])
    """

    name: str = "custom"
    """Name of the recipe."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """The one seed every generator derives from."""
    cache: Annotated[str | None, Common] = None
    """Train from the activations in this folder, made by `unbraid harvest` from the same text, model and settings,
    instead of running the model."""
    text: TextConfig = Field(default_factory=TextConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    buffer: BufferConfig = Field(default_factory=BufferConfig)
    sae: SerializeAsAny[SAEConfig] = Field(default_factory=SAEConfig)
    decorrelation: SerializeAsAny[DecorrelationConfig] = Field(default_factory=DecorrelationConfig)
    optimiser: OptimiserConfig = Field(default_factory=OptimiserConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    variants: Annotated[Variants, Common] = Field(default_factory=lambda: {"": {}})
    """SAEs trained side by side at every site: name -> overrides of seed, sae.*, decorrelation.* or optimiser.*, as in
    {"decorrelated": {}, "twin": {"decorrelation.lambda2": 0}}."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_known_version(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "version" not in data:
            return data
        version = data["version"]
        if version != VERSION:
            raise wrong(f"version = {version!r} of these settings; expected {VERSION!r}; update unbraid to read them")
        return {name: value for name, value in data.items() if name != "version"}

    @model_serializer(mode="wrap")
    def _only_what_is_read(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {"version": VERSION} | super()._only_what_is_read(handler)

    def unread(self) -> dict[Location, str]:
        """See `Section.unread`; what an SAE has is read while some variant takes it from here and reads it."""
        found, variants = super().unread(), {name: self.variant(name) for name in self.variants}
        found |= self._unread_beside_the_run()
        unread_by = {name: settings.unread() for name, settings in variants.items()}
        for group in VARIED:
            for setting in type(getattr(self, group)).model_fields:
                reasons = [
                    _not_taken(group, setting, self.variants[name], settings, unread_by[name])
                    for name, settings in variants.items()
                ]
                if all(reasons) and (group, setting) not in READ_BY_THE_RUN:
                    found[group, setting] = reasons[0]
        return found

    def _unread_beside_the_run(self) -> dict[Location, str]:
        """Settings of SAEs that are read only beside others that all variants share, such as model.sites."""
        found: dict[Location, str] = {}
        for group in VARIED:
            for name, conditions in getattr(self, group).conditions_elsewhere().items():
                shared = {path: one for path, one in conditions.items() if path.partition(".")[0] not in VARIED}
                needs = [(path, wanted.words) for path, wanted in shared.items() if not _meets(self, path, wanted)]
                if needs:
                    found[group, name] = activation(needs)
        return found

    @model_validator(mode="after")
    def _variants_resolve(self) -> "RunConfig":
        unread_here = {".".join(location): why for location, why in self._unread_beside_the_run().items()}
        for name, overrides in self.variants.items():
            settings = self.variant(name)
            for path in overrides:
                if path in unread_here:
                    raise wrong(f"variants.{name or repr(name)}: {path} {unread_here[path]}")
            penalty = settings.decorrelation
            frozen, space = settings.sae.frozen, getattr(penalty, "space", "")
            if frozen in ("decoder", "both") and penalty.weight > 0 and space == "decoder":
                raise wrong(
                    f"sae.frozen = {frozen!r} keeps every decoder row, and decorrelation.space = 'decoder' would move "
                    "them; expected one or the other; set decorrelation.lambda2 to 0 or sae.frozen to 'none'"
                )
            first = settings.decorrelation.first_penalised_step(settings.sae.n_features)
            if settings.decorrelation.weight > 0 and 0 < self.steps < first:
                raise wrong(
                    f"the run has {self.steps:,} steps, but decorrelation would act first at step {first:,} (window, "
                    "interval and scan_rows decide); raise training.tokens, or lower decorrelation.window or .interval"
                )
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps the token budget pays for."""
        return self.training.tokens // self.training.batch_tokens

    @property
    def routes(self) -> list[Route]:
        """Where the dictionaries stand: `model.sites`, parsed."""
        return self.model.routes

    @property
    def sites(self) -> list[Site]:
        """The sites that are read: the ends of the routes."""
        return self.model.ends

    def variant(self, name: str) -> VariantConfig:
        """The settings one variant trains with: the run's, under the variant's own."""
        base = {key: getattr(self, key).model_dump() for key in VARIED}
        for path in self.variants[name]:
            if path.partition(".")[0] not in VariantConfig.model_fields:
                raise wrong(
                    f"variants.{name or repr(name)}: {path!r} cannot differ between variants; expected seed, sae.*, "
                    "decorrelation.* or optimiser.*"
                )
        try:
            return merge(VariantConfig, base | {"seed": self.seed}, self.variants[name])[0]
        except ValidationError as error:
            details = [
                InitErrorDetails(
                    type=unread(item["msg"])
                    if item["type"] == UNREAD
                    else wrong(f"variants.{name or repr(name)}: {complaint(item, VariantConfig)}"),
                    loc=("variants", name, ".".join(map(str, item["loc"]))),
                    input=item["input"],
                )
                for item in error.errors(include_url=False)
            ]
            raise ValidationError.from_exception_data("RunConfig", details) from None

    @property
    def dictionaries(self) -> dict[str, tuple[Route, str]]:
        """Name of each SAE -> its route and variant: all routes x variants, in the order of the settings."""
        return {self.sae_name(route, variant): (route, variant) for route in self.routes for variant in self.variants}

    @property
    def sae_names(self) -> list[str]:
        """Names of all SAEs, in the order of the settings."""
        return list(self.dictionaries)

    def sae_name(self, route: Route | Site, variant: str) -> str:
        """Folder and metric name of one SAE: `resid_post.6_twin`, or the bare site for an unnamed variant."""
        return f"{route.folder}_{variant}" if variant else route.folder

    @property
    def twins(self) -> dict[str, str]:
        """Name of each SAE with lambda2 > 0 -> name of the one that differs from it in nothing but lambda2 = 0."""
        settings = {variant: self.variant(variant) for variant in self.variants}
        twins: dict[str, str] = {}
        for variant, own in settings.items():
            for other, candidate in settings.items():
                if own.decorrelation.weight > 0 == candidate.decorrelation.weight and _alike(own, candidate):
                    twins |= {self.sae_name(at, variant): self.sae_name(at, other) for at in self.routes}
        return twins


def _meets(settings: VariantConfig | RunConfig, path: str, wanted: Condition) -> bool:
    """Whether the setting at `path` exists and is what is wanted."""
    group, _, name = path.partition(".")
    section = getattr(settings, group)
    return name in type(section).model_fields and wanted.holds(getattr(section, name))


def _alike(own: VariantConfig, other: VariantConfig) -> bool:
    """Whether two variants differ in nothing but their penalty."""
    ours, theirs = (settings.optimiser.model_dump(exclude={"decorrelation_warmup_steps"}) for settings in (own, other))
    return (own.seed, own.sae, ours) == (other.seed, other.sae, theirs)


def _not_taken(
    group: str, setting: str, overrides: dict[str, Any], settings: VariantConfig, unread: dict[Location, str]
) -> str:
    """Why a variant does not read a setting of the run; empty if it does."""
    if f"{group}.{setting}" in overrides:
        return "is overridden by every variant; set it in variants"
    if setting not in type(getattr(settings, group)).model_fields:
        return "is not read by what the variants are; set it in variants"
    return unread.get((group, setting), "")
