"""The settings of a run: text, model, buffer, SAEs, decorrelation, optimiser, training."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from tyro.constructors import PrimitiveConstructorSpec

from unbraid.config.checks import Section, set_by_path, validated
from unbraid.config.decorrelation import DecorrelationConfig
from unbraid.errors import ConfigError
from unbraid.json_files import parse_json, read_json_object
from unbraid.sites import Site


class TextConfig(Section):
    """Where documents come from and how they are cut into contexts."""

    source: Literal["packaged", "files", "hub", "generated"] = "packaged"
    """packaged: the corpus installed from the package index; files: local txt, jsonl, csv or parquet, also gzipped, or
    a saved data set; hub: a streamed Hugging Face dataset; generated: seeded pseudo-text, for trying things out."""
    paths: list[str] = []
    """Files or folders, for source=files."""
    dataset: str = ""
    """Dataset name or local dataset folder, for source=hub."""
    dataset_config: str | None = None
    """Configuration name of the hub dataset."""
    revision: str | None = None
    """Revision of the hub dataset."""
    split: str = "train"
    """Split of the hub dataset, or of a saved data set that has several."""
    column: str = "text"
    """Column (csv, parquet, hub) or key (jsonl) that holds documents: strings, chats or lists of token ids."""
    context_length: int = Field(default=128, ge=2, le=1_000_000)
    """Tokens per context T, the beginning-of-sequence token included."""
    bos: Literal["context", "document", "none"] = "context"
    """Where the beginning-of-sequence token stands: at the start of every context, of every document, or nowhere."""
    pack: bool = True
    """Contexts run on from document to document; false: each holds tokens of one document, and the rest of a
    document's last context is filled up with tokens that are not learnt from."""
    special_tokens: bool = False
    """Read the name of a special token inside a text as that token; false: as plain text. Chats always keep theirs."""
    train_on: Literal["all", "assistant"] = "all"
    """assistant: of chats only what the assistant said is learnt from; the rest is still read by the model."""
    held_out_fraction: float = Field(default=0.02, ge=0.0, le=0.5)
    """Share of documents kept for held-out metrics, chosen by a hash of their text, never trained on."""
    shuffle_seed: int = 0
    """Order of the documents; hub streams are put in random order within blocks of 1024 documents."""
    max_skipped_fraction: float = Field(default=0.5, ge=0.0, le=1.0)
    """Stop when more than this share of documents is unusable (empty, not text, not UTF-8, too long)."""
    max_document_characters: int = Field(default=2_000_000, ge=1)
    """Documents longer than this are skipped."""

    @property
    def masked(self) -> bool:
        """Whether contexts may hold tokens that are not learnt from, or filling."""
        return not self.pack or self.train_on != "all"


class ModelConfig(Section):
    """The language model and the sites read from it."""

    name: str = "packaged:smollm2"
    """packaged:smollm2, packaged:gemma3 (after `make gemma`), random:FAMILY (a tiny random model; llama, gemma2, gpt2,
    gpt_neox, qwen2), a hub id, a local folder, or a .gguf file."""
    revision: str | None = None
    """Hub revision."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model's weights and pass; bfloat16 is slower than float32 on most CPUs."""
    sites: list[str] = ["resid_post.6"]
    """KIND.LAYER, KIND one of resid_pre, resid_mid, resid_post, attn_in, attn_z, attn_out, mlp_in, mlp_normed, mlp_act,
    mlp_out; or embed, module:PATH, module:PATH:input; all are read in one pass."""
    batch_contexts: int = Field(default=24, ge=1)
    """Contexts per model pass."""
    trust_remote_code: bool = False
    """Run code shipped with a hub model. Leave off unless you have read that code."""
    bidirectional: bool = False
    """Accept a model in which tokens see later tokens, such as an encoder; otherwise it is refused."""

    @field_validator("sites")
    @classmethod
    def _sites_parse_and_differ(cls, sites: list[str]) -> list[str]:
        parsed = [Site.parse(site) for site in sites]
        if not parsed:
            raise ConfigError("model.sites is empty; expected at least one site such as resid_post.6")
        if len(set(parsed)) < len(parsed):
            raise ConfigError(f"model.sites names a site twice: {sites}; expected distinct sites")
        return [str(site) for site in parsed]


class BufferConfig(Section):
    """The shuffle buffer between model and SAE, and which rows may enter it."""

    contexts: int = Field(default=2048, ge=2)
    """Capacity in contexts; refilled when half has been used."""
    drop_first_position: bool = True
    """Leave out position 0 of every context (an attention sink with about 100x the median norm)."""
    norm_limit: float | None = Field(default=10.0, gt=1.0)
    """Leave out rows whose norm exceeds this many times the site's median norm; none keeps every row."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of stored activations."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Compute the next model batches in a thread while SAEs train; auto does so on CUDA. Never changes a result."""


Architecture = Literal["relu", "topk", "batch_topk", "jumprelu", "gated", "matryoshka", "denoising", "sparse_filtering"]


class SAEConfig(Section):
    """One sparse autoencoder: its architecture, width and sparsity."""

    architecture: Architecture = "relu"
    """Which encoder and sparsity loss."""
    n_features: int = Field(default=16384, ge=2)
    """Width N: number of features."""
    k: int = Field(default=64, ge=1)
    """Active features per token, for topk, batch_topk and matryoshka."""
    k_start: int | None = Field(default=None, ge=1)
    """Topk family: k falls from this to `k`; none keeps it at `k`."""
    k_fall: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the steps over which k falls, from the first one."""
    k_shape: Literal["linear", "geometric", "cosine"] = "linear"
    """How k falls: by equal steps, by equal ratios, or slowly at both ends."""
    lambda1: float = Field(default=0.04, ge=0.0)
    """Weight of the sparsity loss (relu, gated, denoising: L1; jumprelu: L0 or tanh; sparse_filtering: its own), on
    activations without their mean, scaled so that E||x||^2 = 1."""
    aux_k: int | None = Field(default=None, ge=0)
    """Dead features used to explain the residual (topk family); none picks D/2, 0 turns it off."""
    aux_weight: float | None = Field(default=None, ge=0.0)
    """Weight of the loss that revives dead features (topk family: explaining the residual; others: being pulled up to
    their threshold); none takes 1 for the topk family and 1/32 for the others, 0 turns it off."""
    threshold_decay: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Batch_topk and matryoshka: decay of the running mean that is the inference threshold."""
    dead_after_tokens: int | None = Field(default=None, ge=1)
    """A feature that has not fired for this many training tokens counts as dead; none takes 1,000,000, and with a k
    50 N / k, in which the mean feature fires 50 times, or a thousandth of the run if that is more."""
    bandwidth: float = Field(default=0.001, gt=0.0)
    """JumpReLU: width of the straight-through window around the threshold."""
    jumprelu_sparsity: Literal["l0", "tanh"] = "l0"
    """JumpReLU: which sparsity penalty lambda1 weighs."""
    initial_threshold: float = Field(default=0.001, gt=0.0)
    """JumpReLU: threshold at the start."""
    matryoshka_widths: list[int] | None = None
    """Matryoshka: nested prefix widths, ascending, the last equal to n_features; none takes N/16, N/4, N."""
    matryoshka_order: Literal["index", "frequency"] = "index"
    """Matryoshka: which features the narrow levels hold: the first ones, or the ones that fire most often."""
    reorder_from: int = Field(default=2000, ge=1)
    """Matryoshka, order=frequency: steps before features are first ordered."""
    reorder_every: int = Field(default=1000, ge=1)
    """Matryoshka, order=frequency: steps between orderings."""
    frequency_decay: float = Field(default=0.99, ge=0.0, lt=1.0)
    """Matryoshka, order=frequency: decay per step of the running firing frequency."""
    matryoshka_detach: bool = False
    """Matryoshka: the loss of an inner level trains only the features it adds to the levels inside it."""
    matryoshka_weights: float | list[float] = 1.0
    """Matryoshka: weight of the inner levels' losses beside the whole reconstruction's: one, or one per inner level."""
    corruption: float = Field(default=0.1, ge=0.0)
    """Denoising: standard deviation of the input noise relative to the input's root mean square."""
    decoder_init_norm: float | None = Field(default=None, gt=0.0, le=1.0)
    """Encoder columns start as this multiple of the unit decoder rows; none takes the one that reconstructs best."""

    @property
    def revival_weight(self) -> float:
        """`aux_weight`, or its default for this architecture."""
        if self.aux_weight is not None:
            return self.aux_weight
        return 1.0 if self.has_k else 1 / 32

    @property
    def has_k(self) -> bool:
        """Whether k says how sparse the codes are, and not lambda1."""
        return self.architecture in ("topk", "batch_topk", "matryoshka")

    @model_validator(mode="after")
    def _widths_nest(self) -> "SAEConfig":
        widths = self.matryoshka_widths
        if widths is not None and (
            not widths or widths[0] < 1 or widths != sorted(set(widths)) or widths[-1] != self.n_features
        ):
            raise ConfigError(
                f"sae.matryoshka_widths is {widths}; expected ascending widths of at least 1, the last equal to "
                f"sae.n_features, {self.n_features}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _levels_have_weights(self) -> "SAEConfig":
        weights, levels = self.matryoshka_weights, len(self.matryoshka_widths or [1, 2, 3]) - 1
        values = weights if isinstance(weights, list) else [weights]
        if (isinstance(weights, list) and len(weights) != levels) or min(values, default=0.0) < 0:
            raise ConfigError(
                f"sae.matryoshka_weights is {weights}; expected one weight of at least 0, or one for each of the "
                f"{levels} inner levels of sae.matryoshka_widths; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _k_falls(self) -> "SAEConfig":
        if self.has_k and self.k_start is not None and not self.k <= self.k_start <= self.n_features:
            raise ConfigError(
                f"sae.k_start is {self.k_start}; expected sae.k ({self.k}) to sae.n_features ({self.n_features}), "
                "because k falls from it; change one of them"
            )
        return self


class OptimiserConfig(Section):
    """Adam and its schedules."""

    lr: float = Field(default=3e-4, gt=0.0)
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Adam's epsilon."""
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps over which the learning rate rises linearly; the first one is already above zero."""
    decay_fraction: float = Field(default=0.2, ge=0.0, le=1.0)
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    sparsity_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which lambda1 rises linearly."""
    decorrelation_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which lambda2 rises linearly."""
    clip_norm: float | None = Field(default=1.0, gt=0.0)
    """Clip the global gradient norm of each SAE; none leaves it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the encoder's product, by far the largest of a step; weights, gradients and Adam's state stay float32.
    bfloat16 is slower than float32 on most CPUs."""


class TrainingConfig(Section):
    """How long, how often and where."""

    tokens: int = Field(default=20_000_000, ge=0)
    """Training tokens; steps = tokens // batch_tokens."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Token rows B per training step."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where those lines go as well; each is an extra: pip install 'unbraid[wandb]'."""
    log_project: str = "unbraid"
    """Project under which wandb and trackio file the run."""
    checkpoint_every: int = Field(default=1000, ge=0)
    """Steps between checkpoints; 0 writes one only when interrupted."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Older checkpoints are deleted."""
    held_out_tokens: int = Field(default=32_768, ge=256)
    """Held-out token rows for the final metrics."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; none leaves torch's choice."""
    tf32: bool = False
    """Let float32 matrix products, the language model's too, go by TF32 on GPUs that have it."""
    feature_shards: int | None = Field(default=None, ge=1)
    """Under `torchrun`: over how many ranks each SAE's features are split (at most; it must divide their number); none
    splits no further than needed to give every rank an SAE."""


def _read_variants(text: str) -> dict[str, dict[str, Any]]:
    variants = parse_json(text, lambda why: ConfigError(f"variants {why}; expected an object of name -> overrides"))
    if not isinstance(variants, dict) or not all(isinstance(overrides, dict) for overrides in variants.values()):
        raise ConfigError(f"variants = {text!r}; expected a JSON object of name -> object of overrides")
    return variants


Variants = Annotated[
    dict[str, dict[str, Any]],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: _read_variants(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


class RunConfig(Section):
    """One run: text -> language model -> buffer -> SAEs, for every site and every variant."""

    name: str = "custom"
    """Name of the recipe."""
    seed: int = Field(default=0, ge=0)
    """The one seed every generator derives from."""
    cache: str | None = None
    """Train from the activations in this folder, made by `unbraid harvest` from the same text, model and settings,
    instead of running the model."""
    text: TextConfig = TextConfig()
    model: ModelConfig = ModelConfig()
    buffer: BufferConfig = BufferConfig()
    sae: SAEConfig = SAEConfig()
    decorrelation: DecorrelationConfig = DecorrelationConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    training: TrainingConfig = TrainingConfig()
    variants: Variants = {"": {}}
    """SAEs trained side by side at every site: name -> overrides of seed, sae.*, decorrelation.* or optimiser.*, as in
    {"decorrelated": {}, "twin": {"decorrelation.lambda2": 0}}."""

    @model_validator(mode="after")
    def _variants_resolve(self) -> "RunConfig":
        if not self.variants:
            raise ConfigError('variants is empty; expected at least one, such as {"": {}}')
        for name in self.variants:
            self.variant(name)
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps the token budget pays for."""
        return self.training.tokens // self.training.batch_tokens

    @property
    def sites(self) -> list[Site]:
        """The sites, parsed."""
        return [Site.parse(site) for site in self.model.sites]

    def variant(self, name: str) -> "VariantConfig":
        """The settings one variant trains with.

        Raises:
            ConfigError: the variant's name or one of its overrides is not acceptable.
        """
        if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", name):
            raise ConfigError(
                f"variant name {name!r} cannot be part of a folder name; expected letters, digits and '-'"
            )
        data = {key: getattr(self, key).model_dump() for key in ("sae", "decorrelation", "optimiser")} | {
            "seed": self.seed
        }
        for path, value in self.variants[name].items():
            set_by_path(data, path, value, f"variants.{name}")
        return validated(VariantConfig, data, f"variants.{name}")

    @property
    def sae_names(self) -> list[str]:
        """Names of all SAEs: sites x variants, in the order of the settings."""
        return [self.sae_name(site, variant) for site in self.sites for variant in self.variants]

    def sae_name(self, site: Site, variant: str) -> str:
        """Folder and metric name of one SAE: `resid_post.6_twin`, or the bare site for an unnamed variant."""
        return f"{site.folder}_{variant}" if variant else site.folder

    @property
    def twins(self) -> dict[str, str]:
        """Name of each SAE with lambda2 > 0 -> name of the one that differs from it in nothing but lambda2 = 0."""
        settings = {variant: self.variant(variant) for variant in self.variants}
        twins: dict[str, str] = {}
        for variant, own in settings.items():
            for other, candidate in settings.items():
                alike = candidate.model_copy(update={"decorrelation": own.decorrelation}) == own
                if own.decorrelation.lambda2 > 0 == candidate.decorrelation.lambda2 and alike:
                    twins |= {self.sae_name(site, variant): self.sae_name(site, other) for site in self.sites}
        return twins


class VariantConfig(Section):
    """What may differ between SAEs that share a run's text, model pass and buffer."""

    seed: int = Field(ge=0)
    sae: SAEConfig
    decorrelation: DecorrelationConfig
    optimiser: OptimiserConfig


def load_config(path: Path) -> RunConfig:
    """Read a `config.json` as written into every run folder.

    Raises:
        ConfigError: the file is missing, not JSON, or holds unknown or unacceptable settings.
    """
    data = read_json_object(path, ConfigError, "settings as in a run's config.json")
    return validated(RunConfig, data, str(path))


def require_trust(config: RunConfig, given: bool, where: str) -> RunConfig:
    """`config`, which was read from the file `where`, if it may load its model.

    Settings come from anywhere, and those with model.trust_remote_code would run whatever code lies with the model. A
    file cannot allow that; only whoever starts the command can.

    Raises:
        ConfigError: the settings ask for it and it was not `given` by hand.
    """
    if config.model.trust_remote_code and not given:
        raise ConfigError(
            f"{where} asks for model.trust_remote_code, which runs code that comes with the model "
            f"{config.model.name!r}; expected that to be allowed by hand, not by a file; read that code, then add "
            "--model.trust_remote_code to this command (trust_remote_code=True in Python)"
        )
    return config
