"""The settings of what a run reads: text, the language model, and the buffer between model and dictionaries."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    field_validator,
)

from unbraid.config.checks import (
    Common,
    Section,
    active_when,
    but,
    not_of,
)
from unbraid.errors import ConfigError
from unbraid.sites import HANDED_IN, Route, Site


class TextConfig(Section):
    """Where documents come from and how they are cut into contexts."""

    group = "text"

    source: Annotated[Literal["packaged", "files", "hub", "generated", "handed_in"], Common] = "packaged"
    """packaged: the corpus installed from the package index; files: local txt, jsonl, csv or parquet, also gzipped, or
    a saved data set; hub: a streamed Hugging Face dataset; generated: seeded pseudo-text, for trying things out;
    handed_in: `text=` of `unbraid.train`, which sets this."""
    paths: Annotated[list[str], Common, active_when(source="files")] = []
    """Files or folders."""
    dataset: Annotated[str, Common, active_when(source="hub")] = ""
    """Dataset name or local dataset folder."""
    dataset_config: Annotated[str | None, active_when(source="hub")] = None
    """Configuration name of the hub dataset."""
    revision: Annotated[str | None, active_when(source="hub")] = None
    """Revision of the hub dataset."""
    split: Annotated[str, active_when(source=("files", "hub"))] = "train"
    """Split of the hub dataset, or of a saved data set that has several."""
    column: Annotated[str, active_when(source=("files", "hub"))] = "text"
    """Column (csv, parquet, hub) or key (jsonl) that holds documents: strings, chats or lists of token ids."""
    context_length: Annotated[int, Common] = Field(default=128, ge=2, le=1_000_000)
    """Tokens per context T, the beginning-of-sequence token included."""
    bos: Literal["context", "document", "none"] = "context"
    """Where the beginning-of-sequence token stands: at the start of every context, of every document, or nowhere."""
    pack: bool = True
    """Contexts run on from document to document; false: each holds tokens of one document, and the rest of a
    document's last context is filled up with tokens that are not learnt from."""
    separate_documents: Annotated[bool, active_when(pack=True, bos=("document", "none"))] = False
    """Attention stops at the border between two documents of a context, and positions start anew there, as if each
    were read alone; a model in which that has no effect is refused."""
    special_tokens: bool = False
    """Read the name of a special token inside a text as that token; false: as plain text. Chats always keep theirs."""
    train_on: Annotated[Literal["all", "assistant"], active_when(source=("files", "hub", "handed_in"))] = "all"
    """assistant: of chats only what the assistant said is learnt from; the rest is still read by the model."""
    held_out_fraction: float = Field(default=0.02, ge=0.0, le=0.5)
    """Share of documents kept for held-out metrics, chosen by a hash of their text, never trained on."""
    shuffle_seed: Annotated[int, active_when(source=but(HANDED_IN))] = Field(default=0, ge=-(1 << 63), lt=1 << 63)
    """Order of the documents; hub streams are put in random order within blocks of 1024 documents."""
    max_skipped_fraction: float = Field(default=0.5, ge=0.0, le=1.0)
    """Stop when more than this share of documents is unusable (empty, not text, not UTF-8, too long)."""
    max_document_characters: int = Field(default=2_000_000, ge=1)
    """Documents longer than this are skipped."""

    @property
    def masked(self) -> bool:
        """Whether contexts may hold tokens that are not learnt from, or filling."""
        return not self.pack or self.train_on != "all"


A_MODEL_OF_FILES = active_when(name=not_of("packaged", "random", whole=(HANDED_IN,)))


class ModelConfig(Section):
    """The language model and the sites read from it."""

    group = "model"

    name: Annotated[str, Common] = "packaged:smollm2"
    """packaged:smollm2, packaged:gemma3 (after `make gemma`), random:FAMILY (a tiny random model; llama, gemma2, gpt2,
    gpt_neox, qwen2), a hub id, a local folder, or a .gguf file; handed_in: `model=` of `unbraid.train`, which sets this
    where that is another model."""
    revision: Annotated[str | None, A_MODEL_OF_FILES] = None
    """Hub revision."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16", "stored"], active_when(name=but(HANDED_IN))] = "float32"
    """Precision of the model's weights and pass; stored: that of its files. bfloat16 is slower than float32 on most
    CPUs."""
    quantisation: Annotated[Literal["none", "8bit", "4bit"], A_MODEL_OF_FILES] = "none"
    """Quantise the model while it is loaded, with bitsandbytes (4bit: nf4). A model stored quantised is loaded as it
    is."""
    device_map: Annotated[
        Literal["auto", "balanced", "sequential"] | None,
        A_MODEL_OF_FILES,
    ] = None
    """Spread the model over this machine's devices, with accelerate; by default it is put on training.device whole."""
    sites: Annotated[list[str], Common] = ["resid_post.6"]
    """KIND.LAYER, KIND one of resid_pre, resid_mid, resid_post, attn_in, attn_z, attn_out, mlp_in, mlp_normed, mlp_act,
    mlp_out; or embed, module:PATH, module:PATH:input; A -> B is a transcoder, which reads A and predicts B; A + B is a
    crosscoder, which reads and predicts both. All are read in one pass."""
    batch_contexts: int = Field(default=24, ge=1, le=1 << 20)
    """Contexts per model pass."""
    trust_remote_code: Annotated[bool, A_MODEL_OF_FILES] = False
    """Run code shipped with a hub model. Leave off unless you have read that code."""
    bidirectional: bool = False
    """Accept a model in which tokens see later tokens, such as an encoder; otherwise it is refused."""

    @property
    def routes(self) -> list[Route]:
        """`sites`, parsed: where the dictionaries stand."""
        return [Route.parse(site) for site in self.sites]

    @property
    def ends(self) -> list[Site]:
        """The sites whose activations are read in a pass: every end of every route, once."""
        return list(dict.fromkeys(end for route in self.routes for end in route.ends))

    @field_validator("sites")
    @classmethod
    def _sites_parse_and_differ(cls, sites: list[str]) -> list[str]:
        parsed = [Route.parse(site) for site in sites]
        if not parsed:
            raise ConfigError("model.sites is empty; expected at least one site such as resid_post.6")
        if len(set(parsed)) < len(parsed):
            raise ConfigError(f"model.sites names a site twice: {sites}; expected distinct sites")
        return [str(route) for route in parsed]


class BufferConfig(Section):
    """The shuffle buffer between model and SAE, and which rows may enter it."""

    group = "buffer"

    contexts: int = Field(default=2048, ge=2, le=1 << 26)
    """Capacity in contexts; refilled when half has been used."""
    drop_first_position: bool = True
    """Leave out position 0 of every context (an attention sink with about 100x the median norm)."""
    norm_limit: float | None = Field(default=3.0, gt=1.0)
    """Leave out rows whose norm exceeds this many times the site's median norm; none keeps every row."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of stored activations."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Compute the next model batches in a thread while SAEs train; auto does so on CUDA. Never changes a result."""
