"""A language model as a source of activations: several sites in one pass that stops after the deepest.

Hooks keep each site's tensor, and the last to fire ends the pass by raising, so later blocks and the logits cost
nothing. What is captured equals `output_hidden_states` bit for bit; a hook that never fires, a wrong shape or a layer
that does not exist is an error, never an empty tensor. A model that is not what it is taken for is refused when it is
loaded: one whose tokens see later tokens, or whose tokenizer knows tokens that it does not.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unbraid.activations.block import BlockTrace, find_blocks
from unbraid.activations.hooks import Place, Visit, place_outside_blocks, visited
from unbraid.activations.load import is_placed, load_model_and_tokenizer
from unbraid.activations.suitability import check_causal, check_vocabulary, trial_tokens
from unbraid.config import ModelConfig
from unbraid.device import is_out_of_memory
from unbraid.errors import ModelError
from unbraid.sites import KINDS, Site

ResultT = TypeVar("ResultT")
Given = dict[str, Tensor]
"""What a model is given beside token ids."""


class _DeepestSiteReached(Exception):
    """Ends a model pass once every site has been captured."""


class LanguageModel:
    """A causal language model read at `sites`, in eval mode and without gradients.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.
        sites: where activations are read.
        name: what messages call it.
        pass_contexts: contexts per pass.
        bidirectional: accept a model in which tokens see later tokens.

    Attributes:
        model, tokenizer: the transformers objects.
        sites: what `activations` returns, in this order.
        widths: the width of each site.
        vocabulary: token ids that the model knows.
        pass_contexts: contexts per pass; halved, with a warning, when memory runs out.

    Raises:
        ModelError: a site does not exist in this model, is not what is added to the residual stream, or the model is an
            encoder-decoder, looks ahead, or does not know all tokens of its tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        sites: Sequence[Site | str],
        *,
        name: str = "",
        pass_contexts: int = 24,
        bidirectional: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.sites = [Site.parse(site) if isinstance(site, str) else site for site in sites]
        self.name = name or type(model).__name__
        self.pass_contexts = pass_contexts
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(
                f"{self.name} is an encoder-decoder model ({type(model).__name__}); expected a decoder such as Llama; "
                "choose another model.name"
            )
        self.blocks = find_blocks(model)
        self._text_config = model.config.get_text_config()  # pyright: ignore
        self._places: dict[Site, Place] = {}
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])  # pyright: ignore
        check_vocabulary(self.name, tokenizer, self.special_ids, self.vocabulary)
        self.widths = [0] * len(self.sites)
        self._find_places(self.sites)
        self.widths = [x.shape[-1] for x in self._capture(trial_tokens(self.vocabulary), {})]
        if not bidirectional:
            check_causal(self.name, self.last_output, self.vocabulary)

    @property
    def d_model(self) -> int:
        """Width D of the residual stream."""
        return self._text_config.hidden_size

    @property
    def predicts(self) -> bool:
        """Whether the model ends in next-token logits."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)
        return head() is not None

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the model's weights and of the activations."""
        return next(self.model.parameters()).dtype

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that mark beginning, end and padding, ascending; their rows are not for training."""
        names = ("bos", "eos", "pad", "cls", "sep")
        ids = {getattr(self.tokenizer, f"{name}_token_id", None) for name in names}
        return tuple(sorted(token for token in ids if token is not None))

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able: which model this is, with a checksum over samples of every weight."""
        digest = hashlib.blake2b(digest_size=16)
        for name, weight in self.model.named_parameters():
            sample = weight.detach().reshape(-1)[:: max(1, weight.numel() // 64)][:64]
            digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.float().cpu().numpy().tobytes())
        revision = getattr(self.model.config, "_commit_hash", None)
        return {
            "name": self.name,
            "revision": revision,
            "class": type(self.model).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "d_model": self.d_model,
            "n_layers": self.n_layers,
            "weights": digest.hexdigest(),
        }

    def place(self, site: Site | str) -> Place:
        """Where the activations of a site pass: for `activations.hooks.visited`.

        Raises:
            ModelError: the model has no such site.
        """
        site = Site.parse(site) if isinstance(site, str) else site
        self._find_places([site])
        return self._places[site]

    @contextmanager
    def visiting(self, visits: Mapping[Site, Visit] | Mapping[str, Visit]) -> Iterator[None]:
        """In the `with` block, every pass of `model` calls `visits[site]` with the activations [C, T, W] of each site.

        What a visit returns takes the place of the activations, unless it is None. Sites are visited in the order in
        which the model reaches them, and visits of one site in the order given. Gradients flow if they are on. Some
        models go on to change a tensor in place: clone what is kept.

        Example:
            >>> from unbraid.config import ModelConfig
            >>> from unbraid.activations.language_model import load_language_model
            >>> lm = load_language_model(ModelConfig(name="random:llama", sites=["resid_post.0"]))
            >>> with lm.visiting({"mlp_out.1": lambda x: 2 * x}):
            ...     doubled = lm.logits(torch.tensor([[0, 5, 6]]))

        Raises:
            ModelError: a site does not exist, or a visit returned another shape (while a pass runs).
        """
        with ExitStack() as stack:
            for site, visit in visits.items():
                stack.enter_context(visited(self.place(site), visit))
            yield

    def activations(
        self,
        tokens: Int[Tensor, "C T"],
        mask: Int[Tensor, "C T"] | None = None,
        positions: Int[Tensor, "C T"] | None = None,
    ) -> list[Float[Tensor, "C T _"]]:
        """Activations of every site for `C` contexts of token ids, on the model's device and in its dtype.

        Args:
            tokens: token ids.
            mask: 1 where there is a token, 0 where a shorter context was filled up; None for contexts without filling.
            positions: for contexts without filling, positions that start anew with each document, which is then read
                as if it were alone.

        Raises:
            ModelError: a site did not fire or gave another shape than [C, T, W]; memory ran out for one context.
        """
        parts = self._passes(tokens, _given(mask, positions), self._capture)
        return parts[0] if len(parts) == 1 else [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    def logits(
        self,
        tokens: Int[Tensor, "C T"],
        site: Site | str | None = None,
        replace: Callable[[Float[Tensor, "C T W"]], Float[Tensor, "C T W"]] | None = None,
        mask: Int[Tensor, "C T"] | None = None,
        positions: Int[Tensor, "C T"] | None = None,
    ) -> Float[Tensor, "C T V"]:
        """Next-token logits; with `replace`, the activations of `site` are what it returns, at every position.

        Raises:
            ModelError: the site does not exist, did not fire, or `replace` returned another shape.
        """
        site = Site.parse(site) if isinstance(site, str) else site
        if (site is None) != (replace is None):
            raise ModelError(f"logits got site={site} and replace={replace}; expected both or neither")
        given = _given(mask, positions)
        parts = self._passes(tokens, given, lambda part, seen: self._spliced_logits(part, seen, site, replace))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def differentiable_logits(
        self, tokens: Int[Tensor, "C T"], positions: Int[Tensor, "C T"] | None = None
    ) -> Float[Tensor, "C T V"]:
        """Next-token logits of one pass, with a graph to whatever a visit puts in place of activations."""
        return self._forward(tokens, _given(None, positions), differentiable=True).logits

    def _capture(self, tokens: Tensor, given: Given) -> list[Tensor]:
        captured: dict[int, Tensor] = {}

        def keep(i: int) -> Visit:
            def visit(x: Tensor) -> None:
                with torch.inference_mode(False):  # Falcon adds to its MLP's output in place; a copy can be learnt from
                    captured[i] = self._checked(i, x, tokens).clone().to(self.device)  # a spread model has several
                if len(captured) == len(self.sites):
                    raise _DeepestSiteReached

            return visit

        with ExitStack() as stack:
            for i, site in enumerate(self.sites):
                stack.enter_context(visited(self._places[site], keep(i)))
            with suppress(_DeepestSiteReached):
                self._forward(tokens, given)
        self._require_fired([site for i, site in enumerate(self.sites) if i not in captured])
        return [captured[i] for i in range(len(self.sites))]

    def _spliced_logits(
        self, tokens: Tensor, given: Given, site: Site | None, replace: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        if site is None or replace is None:
            return self._logits(tokens, given)
        fired: list[Site] = []

        def visit(x: Tensor) -> Tensor:
            fired.append(site)
            return replace(x)

        with visited(self.place(site), visit):
            logits = self._logits(tokens, given)
        self._require_fired([] if fired else [site])
        return logits

    def _logits(self, tokens: Tensor, given: Given) -> Tensor:
        found = getattr(self._forward(tokens, given), "logits", None)
        if found is None:
            raise ModelError(
                f"{self.name} ({type(self.model).__name__}) gives no logits; expected a model with a language-model "
                "head; leave out what needs its predictions"
            )
        return found.clone()

    def _forward(self, tokens: Tensor, given: Given | None = None, differentiable: bool = False) -> Any:
        if int(tokens.max()) >= self.vocabulary:
            raise ModelError(
                f"token id {int(tokens.max())} is beyond the {self.vocabulary} that {self.name} knows; expected ids "
                "of the tokenizer the model was trained with; change the data or model.name"
            )
        inputs = {"input_ids": tokens} | (given or {"attention_mask": torch.ones_like(tokens)})
        with torch.inference_mode(not differentiable):
            return self.model(**{name: table.to(self.device) for name, table in inputs.items()}, use_cache=False)

    def _passes(self, tokens: Tensor, given: Given, run: Callable[[Tensor, Given], ResultT]) -> list[ResultT]:
        """`run` on at most `pass_contexts` contexts at a time, in order."""
        longest = getattr(self._text_config, "max_position_embeddings", None)
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ModelError(f"tokens of shape {tuple(tokens.shape)}; expected [contexts, tokens], neither zero")
        if longest and tokens.shape[1] > longest:
            raise ModelError(
                f"contexts of {tokens.shape[1]} tokens are too long for {self.name}; expected at most {longest}; "
                "lower text.context_length"
            )
        parts: list[ResultT] = []
        done = 0
        while done < len(tokens):
            here = slice(done, done + self.pass_contexts)
            part = tokens[here]
            try:
                parts.append(run(part, {name: table[here] for name, table in given.items()}))
                done += len(part)
                continue
            except RuntimeError as problem:
                if not is_out_of_memory(problem):
                    raise
            self._halve(len(part))  # outside the handler, whose traceback keeps the failed pass's tensors alive
        return parts

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise ModelError(
                f"out of memory on {self.device} in a pass of {self.name} over a single context; expected memory "
                "for one; lower text.context_length, use a smaller model, or free memory"
            )
        self.pass_contexts = tried // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory in a model pass over {tried} contexts; going on with {self.pass_contexts} "
            "(set model.batch_contexts)",
            stacklevel=4,
        )

    def _checked(self, i: int, x: Tensor, tokens: Tensor) -> Tensor:
        """The activations of site `i`, if they have the shape that the model's first pass showed."""
        if x.ndim != 3 or x.shape[:2] != tokens.shape or self.widths[i] not in (0, x.shape[2]):
            expected = f"[{tokens.shape[0]}, {tokens.shape[1]}, {self.widths[i] or 'width'}]"
            raise ModelError(
                f"site {self.sites[i]} of {self.name} gave shape {tuple(x.shape)}; expected activations [contexts, "
                f"tokens, width] = {expected}; change model.sites"
            )
        return x

    def _require_fired(self, silent: list[Site]) -> None:
        if silent:
            raise ModelError(
                f"site {', '.join(map(str, silent))} of {self.name} never fired during a pass; expected every site's "
                "module to run; change model.sites to one this model uses, such as resid_post of the same layer"
            )

    def _find_places(self, sites: Sequence[Site]) -> None:
        """Look up where `sites` are; blocks are run once, on a few tokens, to see what their modules do."""
        new = [site for site in sites if site not in self._places]
        for site in new:
            if site.layer is not None and site.layer >= self.n_layers:
                raise ModelError(
                    f"site {site} does not exist; expected a layer from 0 to {self.n_layers - 1}, the model has "
                    f"{self.n_layers}; change model.sites"
                )
        layers = sorted({site.layer for site in new if site.layer is not None})
        traces = {layer: BlockTrace(self.blocks[layer], layer, self.dtype) for layer in layers}
        if traces:
            with ExitStack() as stack:
                for trace in traces.values():
                    trace.listen(stack)
                stack.enter_context(self._stopping_after(layers[-1]))
                self._forward(trial_tokens(self.vocabulary))
        for site in new:
            if site.layer is None:
                self._places[site] = place_outside_blocks(site, self.model)
            else:
                self._places[site] = getattr(traces[site.layer], KINDS[site.kind].place)(str(site))

    @contextmanager
    def _stopping_after(self, layer: int) -> Iterator[None]:
        def stop(x: Tensor) -> None:
            raise _DeepestSiteReached

        with suppress(_DeepestSiteReached), visited(Place("", self.blocks[layer], "output"), stop):
            yield

    def last_output(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """What the last block gives."""
        kept: list[Tensor] = []
        with visited(Place("", self.blocks[-1], "output"), kept.append), self._stopping_after(self.n_layers - 1):
            self._forward(tokens, _given(None, positions))
        self._require_fired([] if kept else [Site("resid_post", self.n_layers - 1)])
        return kept[0]


def _given(mask: Tensor | None, positions: Tensor | None) -> Given:
    """Positions that start anew are seen only without a mask: transformers then stops attention where they do."""
    return {"attention_mask": mask} if mask is not None else {} if positions is None else {"position_ids": positions}


def load_language_model(config: ModelConfig, device: torch.device | str = "cpu", seed: int = 0) -> LanguageModel:
    """The model and tokenizer that `config` names, on `device`; `seed` initialises random models.

    Raises:
        ModelError: the model is not installed, not found or not readable, or has no such site.
    """
    model, tokenizer = load_model_and_tokenizer(config, seed)
    try:
        model = model if is_placed(model) else model.to(device)
    except (RuntimeError, AssertionError) as problem:
        raise ModelError(
            f"{config.name} cannot be put on device {str(device)!r} ({problem}); expected a device with enough memory; "
            "change training.device"
        ) from problem
    return LanguageModel(
        model,
        tokenizer,
        config.ends,
        name=config.name,
        pass_contexts=config.batch_contexts,
        bidirectional=config.bidirectional,
    )
