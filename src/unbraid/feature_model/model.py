"""A language model with dictionaries standing in it: read features, change them, ask what they do.

Everything is done with hooks that last for one call, on the model as transformers loaded it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from unbraid.activations.language_model import LanguageModel
from unbraid.errors import FeatureError
from unbraid.feature_model import asking
from unbraid.feature_model.attribution import Attribution, attribute
from unbraid.feature_model.dictionaries import Dictionaries, Feature
from unbraid.feature_model.edges import Edges, Graph, edges, trace
from unbraid.feature_model.editing import Editing, SpanTracker
from unbraid.feature_model.effect import Effect, edited_mask
from unbraid.feature_model.generation import Generation, generate
from unbraid.feature_model.held_out import Contexts, HeldOut
from unbraid.feature_model.hooks import StopPass, hooked
from unbraid.feature_model.pairs import PairTable, entangled_with
from unbraid.feature_model.positions import check_positions
from unbraid.feature_model.prompts import Prompt, PromptReader
from unbraid.feature_model.reading import Reading, reading_hooks
from unbraid.feature_model.tables import Table, require_rows


class FeatureModel:
    """A causal language model and the dictionaries attached to it.

    Args:
        hf_model: any transformers causal language model; it is put in eval mode, its weights are frozen. Take
            the module that TransformerLens or nnsight wraps.
        tokenizer: its tokenizer; None where prompts are token ids.
        saes: NAME -> an object with `encode`, `decode` and `W_dec` [N, D], on raw activations. NAME is the site, or
            `sites` says which site it stands at; `A -> B` reads A and writes B.
        sites: NAME -> site, for names that are not sites.
        text: held-out text for maxima, contexts and partners: texts, or rows of token ids.
        held_out: the same already computed, or a function that computes it when first needed.
        twins: NAME -> NAME of the dictionary trained alike without decorrelation.
        bos: whether texts begin with BOS; None does as the tokenizer does.

    Raises:
        FeatureError: a site does not exist, a dictionary lacks something, or the model cannot be hooked.

    Example:
        >>> from unbraid.activations.load import load_model_and_tokenizer
        >>> hf_model, tokenizer = load_model_and_tokenizer(unbraid.Run("runs/tiny").config.model)
        >>> sae = unbraid.load("runs/tiny/saes/resid_post.1_twin")
        >>> fm = FeatureModel(hf_model, tokenizer, {"resid_post.1": sae}, bos=True)
        >>> fm.read("the river").codes["resid_post.1"].shape
        torch.Size([1, 6, 128])
    """

    def __init__(
        self,
        hf_model: nn.Module,
        tokenizer: Any,
        saes: Mapping[str, Any],
        *,
        sites: Mapping[str, str] | None = None,
        text: Any = None,
        held_out: "HeldOut | Callable[[FeatureModel], HeldOut] | None" = None,
        twins: Mapping[str, str] | None = None,
        bos: bool | None = None,
    ):
        refuse_compiled(hf_model)
        self.hf_model, self.tokenizer, self.twins = hf_model, tokenizer, dict(twins or {})
        language_model = LanguageModel(hf_model, tokenizer, [])
        self.blocks = language_model.blocks
        self.dictionaries = Dictionaries(language_model, saes, sites or {})
        self.special_ids = special_ids(hf_model, tokenizer)
        self.device = next(hf_model.parameters()).device
        self.prompt = PromptReader(tokenizer, bos, self.special_ids, self.device)
        self._text, self._held_out = text, held_out
        self._words: dict[tuple[str, int, bool], str] = {}

    # What the dictionaries see.

    def read(self, prompt: Any, edits: Any = (), *, at: Any = "content") -> Reading:
        """Codes and reconstruction errors of a prompt, in one pass that ends at the deepest site.

        Args:
            prompt: a text, several, chat messages, or token ids.
            edits: carried out in the pass; codes are those of the edited stream.
            at: positions to read; the others have no codes.
        """
        batch = self.prompt(prompt)
        mask_BT = check_positions(at, batch.span)
        reading, _ = self.passed(batch, edits, mask_BT, at, logits=False)
        return reading

    def run(self, prompt: Any, edits: Any) -> Effect:
        """One pass with the edits beside one without."""
        batch = self.prompt(prompt)
        self.editing(edits)
        for edit in edits:
            check_positions(getattr(edit, "at", "all"), batch.span)
        mask_BT = edited_mask(batch, edits)
        before, plain_logits = self.passed(batch, (), mask_BT, "content", logits=True)
        after, logits = self.passed(batch, edits, mask_BT, "content", logits=True)
        return Effect(self, batch, tuple(edits), before, after, plain_logits, logits)

    def search(
        self,
        prompt: Any,
        contrast: Any = None,
        *,
        by: str = "max",
        at: Any = "content",
        k: int = 20,
    ) -> Table:
        """The features that a prompt (or several) makes fire most; with `contrast`, those that one does not."""
        require_rows(k)
        return asking.search(self, prompt, contrast, by, at, k)

    def contexts(self, feature: Any, k: int = 8, *, alone_from: Any = None) -> Contexts:
        """Where a feature fires most on held-out text; with `alone_from`, only where that feature is silent."""
        require_rows(k)
        other = None if alone_from is None else self.feature(alone_from)
        return self.held_out.contexts(self, self.feature(feature), k, other)

    def lens(self, feature: Any, k: int = 10) -> Table:
        """The tokens that a feature's decoder row raises and lowers most, read through the final norm."""
        require_rows(k)
        return asking.lens(self, self.feature(feature), k)

    def pairs(self, feature: Any, k: int = 8) -> PairTable:
        """The features most entangled with one: its partners, and what became of each pair in the twin."""
        require_rows(k)
        return entangled_with(self, self.feature(feature), k)

    # What changing them does.

    def generate(
        self,
        prompt: Any,
        edits: Any = (),
        *,
        max_new_tokens: int = 64,
        seed: int = 0,
        stream: bool = False,
        **hf: Any,
    ) -> Generation:
        """Continue a prompt with the edits, through the model's own `generate` and its cache.

        Args:
            prompt: a text, several, chat messages, or token ids.
            edits: positions without an end go on into the new text.
            max_new_tokens: length.
            seed: of the sampling, if there is any; the unedited text uses the same.
            stream: return at once; iterating over the result gives pieces of text as they come.
            **hf: options of `transformers` generation, such as do_sample and temperature.
        """
        return generate(self, prompt, edits, max_new_tokens, seed, stream, hf)

    @contextmanager
    def edited(self, edits: Any) -> Iterator[Any]:
        """The model with the edits carried out in every pass, for a loop of one's own. The first pass is the prompt."""
        tracker, editing = SpanTracker(self.hf_model, self.special_ids), self.editing(edits)
        with tracker.following(), editing.attached(tracker):
            yield self.hf_model

    def attribute(
        self,
        prompt: Any,
        metric: Any,
        *,
        method: str = "gradient",
        to: Any = None,
        sites: Sequence[str] | None = None,
    ) -> Attribution:
        """How much each feature contributes to a metric, and what that leaves unexplained."""
        return attribute(self, prompt, metric, method, to, sites)

    def edges(self, prompt: Any, source: str, target: str, *, at: Any = -1, top: int = 32, metric: Any = None) -> Edges:
        """How much each source feature contributes to the strongest target features, to first order."""
        return edges(self, prompt, source, target, at, top, metric)

    def trace(self, prompt: Any, metric: Any, *, sites: Sequence[str], top: int = 8) -> Graph:
        """The strongest features of each site for a metric, and the edges from site to site."""
        return trace(self, prompt, metric, sites, top)

    # What these are made of.

    @property
    def held_out(self) -> HeldOut:
        """Codes on held-out text.

        Raises:
            FeatureError: the model was given none.
        """
        if callable(self._held_out):
            self._held_out = self._held_out(self)
        if self._held_out is None and self._text is not None:
            self._held_out = HeldOut.of_text(self, self._text)
        if self._held_out is None:
            raise FeatureError(
                "there is no held-out text to take maxima, contexts and partners from; expected FeatureModel(..., "
                "text=[...]) or a run opened with unbraid.features; or give Steer unit='code'"
            )
        return self._held_out

    @property
    def has_held_out(self) -> bool:
        """Whether there is held-out text."""
        return self._held_out is not None or self._text is not None

    @property
    def known_held_out(self) -> HeldOut | None:
        """Codes on held-out text if they have been computed."""
        return self._held_out if isinstance(self._held_out, HeldOut) else None

    def feature(self, address: Any) -> Feature:
        """The feature an address `NAME/index` means."""
        return self.dictionaries.feature(address)

    def editing(self, edits: Any) -> Editing:
        """Edits made ready for this model."""
        if not isinstance(edits, list | tuple):
            raise FeatureError(f"edits is {edits!r}; expected a list of edits such as [Steer('NAME/0', 1)]")
        return Editing(self.dictionaries, edits, self.unit)

    def unit(self, feature: Feature, unit: str) -> float:
        """What 1 is worth in codes of a feature.

        Raises:
            FeatureError: the unit is unknown, or the feature never fired on held-out text.
        """
        if unit == "max":
            largest = self.held_out.maximum(feature)
            if largest is None:
                raise FeatureError(f"{feature} never fired on held-out text, so it has no maximum; use unit='code'")
            return largest
        if unit == "norm":
            row_norm = float(feature.dictionary.W_dec[feature.index].norm())
            return self.held_out.norms[feature.dictionary.name] / max(row_norm, 1e-30)
        raise FeatureError(f"unit {unit!r} is unknown; expected 'max', 'code' or 'norm'")

    def share(self, name: str, index: int, code: float) -> float | None:
        """A code as a share of the feature's largest on held-out text, if that has been computed."""
        known = self.known_held_out
        largest = None if known is None else known.maximum(Feature(self.dictionaries[name], index))
        return None if largest is None else code / largest

    def words(self, name: str, index: int) -> str:
        """A feature in a few characters: tokens it fires on, or, behind ↑, tokens it raises.

        Those it fires on are known once held-out codes have been computed.
        """
        known = self.known_held_out is not None
        if (name, index, known) not in self._words:
            self._words[name, index, known] = asking.few_words(self, Feature(self.dictionaries[name], index))
        return self._words[name, index, known]

    @overload
    def passed(
        self, batch: Prompt, edits: Any, mask_BT: Tensor, at: Any, *, logits: Literal[True]
    ) -> tuple[Reading, Tensor]: ...

    @overload
    def passed(
        self, batch: Prompt, edits: Any, mask_BT: Tensor, at: Any, *, logits: Literal[False]
    ) -> tuple[Reading, None]: ...

    @torch.no_grad()
    def passed(
        self, batch: Prompt, edits: Any, mask_BT: Tensor, at: Any, *, logits: bool
    ) -> tuple[Reading, Tensor | None]:
        """One pass over whole prompts: what the dictionaries see at `mask_BT` after the edits, and logits if wanted."""
        editing, tracker = self.editing(edits), SpanTracker(self.hf_model, self.special_ids)
        readers, reads = reading_hooks(self.dictionaries, mask_BT, then_stop=not logits)
        hooks = editing.hooks(tracker) + reads
        found = None
        with tracker.following(), hooked(hooks), suppress(StopPass):
            found = self.forward(batch)
        codes = {name: reader.codes for name, reader in readers.items() if reader.codes is not None}
        silent = [name for name in readers if name not in codes]
        if silent:
            raise FeatureError(f"{', '.join(silent)} never fired in a pass; expected sites whose modules run")
        error = {name: reader.error_BT for name, reader in readers.items()}
        norms = {name: reader.norm_BT for name, reader in readers.items()}
        texts = [self.texts(batch, row) for row in range(len(batch.tokens_BT))]
        reading = Reading(
            texts, batch.tokens_BT.cpu(), codes, error, norms, at, mask_BT.cpu(), batch.span, self.share, self.words
        )
        return reading, found

    def forward(self, batch: Prompt) -> Tensor:
        """Logits `[B, T, V]` of a batch.

        Raises:
            FeatureError: a token or the length is beyond what the model knows.
        """
        known = self.hf_model.get_input_embeddings().weight.shape[0]  # pyright: ignore
        longest = getattr(self.hf_model.config.get_text_config(), "max_position_embeddings", None)  # pyright: ignore
        low, high, length = int(batch.tokens_BT.min()), int(batch.tokens_BT.max()), batch.tokens_BT.shape[1]
        if low < 0 or high >= known:
            raise FeatureError(f"token {low if low < 0 else high} does not exist; expected ids from 0 to {known - 1}")
        if longest and length > longest:
            raise FeatureError(f"the prompt has {length} tokens; expected at most {longest}; shorten it")
        return self.hf_model(**batch.inputs(), use_cache=False).logits

    def texts(self, batch: Prompt, row: int) -> list[str | None]:
        """Texts of a prompt's tokens; None at padding."""
        from unbraid.reporting.dashboard.passes import token_texts

        ids = batch.tokens_BT[row][batch.real_BT[row]].tolist()
        texts = [f"<{one}>" for one in ids] if self.tokenizer is None else token_texts(self.tokenizer, ids)
        return [None] * (batch.tokens_BT.shape[1] - len(ids)) + texts

    def __repr__(self) -> str:
        standing = ", ".join(f"{one.name} ({one.n_features:,} features)" for one in self.dictionaries.values())
        return f"FeatureModel of {type(self.hf_model).__name__} with {standing}"


def refuse_compiled(model: nn.Module) -> None:
    """Hooks on a compiled model may be ignored, so it is refused.

    Raises:
        FeatureError: the model is compiled.
    """
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    if compiled or hasattr(model, "_orig_mod"):
        raise FeatureError(
            "the model is compiled, and a compiled model may ignore hooks; expected the plain module; give the model "
            "before torch.compile"
        )


def special_ids(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Ids that are not content; padding first, where there is any."""
    config = model.config.get_text_config()  # pyright: ignore
    found: list[Any] = []
    for owner in (tokenizer, config):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(owner, name, None)
            found += value if isinstance(value, list | tuple) else [value]
    if tokenizer is not None:
        found += tokenizer.all_special_ids
    return tuple(dict.fromkeys(one for one in found if isinstance(one, int)))
