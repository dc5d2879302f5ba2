"""A language model as a source of activations: several sites in one pass that stops after the deepest.

Hooks keep each site's output, and the last to fire ends the pass by raising, so later blocks and the logits cost
nothing. What is captured equals `output_hidden_states` bit for bit; a hook that never fires, a wrong shape or a layer
that does not exist is an error, never an empty tensor.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unbraid.activations.load import load_model_and_tokenizer
from unbraid.activations.sites import find_blocks, first_tensor, site_module
from unbraid.config import ModelConfig, Site
from unbraid.errors import ModelError

ResultT = TypeVar("ResultT")


class _DeepestSiteReached(Exception):
    """Ends a model pass once every site has been captured."""


class LanguageModel:
    """A causal language model read at `sites`, in eval mode and without gradients.

    Attributes:
        model, tokenizer: the transformers objects.
        sites: what `activations` returns, in this order.
        pass_contexts: contexts per pass; halved, with a warning, when memory runs out.

    Raises:
        ModelError: a site does not exist in this model, or is not what is added to the residual stream.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        sites: Sequence[Site | str],
        *,
        name: str = "",
        pass_contexts: int = 24,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.sites = [Site.parse(site) if isinstance(site, str) else site for site in sites]
        self.name = name or type(model).__name__
        self.pass_contexts = pass_contexts
        self.blocks = find_blocks(model)
        self._text_config = model.config.get_text_config()  # pyright: ignore
        for site in self.sites:
            site_module(self.blocks, site)
        for layer in sorted({site.layer for site in self.sites if site.kind != "resid_post"}):
            self._prove_additive(layer)

    @property
    def d_model(self) -> int:
        """Width D of the residual stream."""
        return self._text_config.hidden_size

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
        """Ids of the BOS, EOS and padding tokens, ascending; rows of these tokens are not for training."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return tuple(sorted({token for token in ids if token is not None}))

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

    def activations(self, tokens: Int[Tensor, "C T"]) -> list[Float[Tensor, "C T D"]]:
        """Activations of every site for `C` contexts of token ids, on the model's device and in its dtype.

        Raises:
            ModelError: a site did not fire or gave another shape than [C, T, D]; memory ran out for one context.
        """
        parts = self._passes(tokens, self._capture)
        if len(parts) == 1:
            return parts[0]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    def logits(
        self,
        tokens: Int[Tensor, "C T"],
        site: Site | str | None = None,
        replace: Callable[[Float[Tensor, "C T D"]], Float[Tensor, "C T D"]] | None = None,
    ) -> Float[Tensor, "C T V"]:
        """Next-token logits; with `replace`, the activations of `site` are what it returns, at every position.

        Raises:
            ModelError: the site does not exist, did not fire, or `replace` returned another shape.
        """
        site = Site.parse(site) if isinstance(site, str) else site
        if (site is None) != (replace is None):
            raise ModelError(f"logits got site={site} and replace={replace}; expected both or neither")
        parts = self._passes(tokens, lambda part: self._spliced_logits(part, site, replace))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _capture(self, tokens: Tensor) -> list[Tensor]:
        captured: dict[Site, Tensor] = {}

        def keep(site: Site) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                captured[site] = self._checked(site, first_tensor(output), tokens, output)
                if len(captured) == len(self.sites):
                    raise _DeepestSiteReached

            return hook

        with ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(_Hook(site_module(self.blocks, site), keep(site)))
            with suppress(_DeepestSiteReached):
                self._forward(tokens)
        self._require_fired(self.sites, captured)
        return [captured[site].clone() for site in self.sites]

    def _spliced_logits(self, tokens: Tensor, site: Site | None, replace: Callable[[Tensor], Tensor] | None) -> Tensor:
        fired: dict[Site, Tensor] = {}

        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            assert site is not None and replace is not None
            before = self._checked(site, first_tensor(output), tokens, output)
            after = fired[site] = self._checked(site, replace(before), tokens, "replace")
            after = after.to(before.dtype)
            return after if isinstance(output, Tensor) else (after, *output[1:])

        with ExitStack() as stack:
            if site is not None:
                stack.enter_context(_Hook(site_module(self.blocks, site), hook))
            logits = self._forward(tokens).logits
        if site is not None:
            self._require_fired([site], fired)
        return logits.clone()

    def _forward(self, tokens: Tensor) -> Any:
        with torch.inference_mode():
            return self.model(input_ids=tokens.to(self.device), use_cache=False)

    def _passes(self, tokens: Tensor, run: Callable[[Tensor], ResultT]) -> list[ResultT]:
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
            part = tokens[done : done + self.pass_contexts]
            try:
                parts.append(run(part))
                done += len(part)
                continue
            except RuntimeError as problem:
                if not _is_out_of_memory(problem):
                    raise
            self._halve(len(part))  # outside the handler, whose traceback keeps the failed pass's tensors alive
        return parts

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise ModelError(
                f"out of memory on {self.device} in a pass of {self.name} over a single context; expected room for "
                "one; lower text.context_length, use a smaller model, or free memory"
            )
        self.pass_contexts = tried // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory in a model pass over {tried} contexts; going on with {self.pass_contexts} "
            "(set model.batch_contexts)",
            stacklevel=4,
        )

    def _checked(self, site: Site, found: Tensor | None, tokens: Tensor, output: Any) -> Tensor:
        expected = (*tokens.shape, self.d_model)
        if found is None or tuple(found.shape) != expected:
            got = type(output).__name__ if found is None else f"shape {tuple(found.shape)}"
            raise ModelError(
                f"site {site} of {self.name} gave {got}; expected activations [contexts, tokens, width] = "
                f"{list(expected)}; change model.sites"
            )
        return found

    def _require_fired(self, sites: list[Site], fired: dict[Site, Tensor]) -> None:
        silent = [str(site) for site in sites if site not in fired]
        if silent:
            raise ModelError(
                f"site {', '.join(silent)} of {self.name} never fired during a pass; expected every site's module to "
                "run; change model.sites to one this model uses, such as resid_post of the same layer"
            )

    def _prove_additive(self, layer: int) -> None:
        """What `attn_out` and `mlp_out` name must be what takes the block from its input to its output."""
        kept: dict[str, Tensor] = {}
        block = self.blocks[layer]
        sites = {kind: site_module(self.blocks, Site(kind, layer)) for kind in ("attn_out", "mlp_out", "resid_post")}

        def hook(kind: str) -> Callable[..., None]:
            def keep(module: nn.Module, inputs: Any, output: Any) -> None:
                kept[kind] = first_tensor(output).double()  # pyright: ignore[reportOptionalMemberAccess]
                if kind == "resid_post":
                    raise _DeepestSiteReached

            return keep

        def keep_input(module: nn.Module, args: Any, kwargs: Any) -> None:
            kept["input"] = (args[0] if args else kwargs["hidden_states"]).double()

        tokens = torch.arange(16).reshape(2, 8) % self._text_config.vocab_size
        with ExitStack() as stack:
            stack.callback(block.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
            for kind, module in sites.items():
                stack.enter_context(_Hook(module, hook(kind)))
            with suppress(_DeepestSiteReached):
                self._forward(tokens)
        total = sum(kept[kind] for kind in ("input", "attn_out", "mlp_out") if kind in kept)
        tolerance = 30 * torch.finfo(self.dtype).eps
        if len(kept) < 4 or not (total - kept["resid_post"]).norm() <= tolerance * kept["resid_post"].norm():
            raise ModelError(
                f"in layer {layer} of {self.name}, attention and MLP outputs do not add up to the block's change of "
                "the residual stream; expected input + attn_out + mlp_out = resid_post; use resid_post"
                f".{layer} for this model"
            )


class _Hook:
    """A forward hook for the length of a `with` block."""

    def __init__(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self.module, self.hook = module, hook

    def __enter__(self) -> None:
        self.handle = self.module.register_forward_hook(self.hook)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _is_out_of_memory(problem: RuntimeError) -> bool:
    said = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(problem, torch.OutOfMemoryError) or any(words in str(problem) for words in said)


def load_language_model(config: ModelConfig, device: torch.device | str = "cpu", seed: int = 0) -> LanguageModel:
    """The model and tokenizer that `config` names, on `device`; `seed` initialises random models.

    Raises:
        ModelError: the model is not installed, not found or not readable, or has no such site.
    """
    model, tokenizer = load_model_and_tokenizer(config, seed)
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as problem:
        raise ModelError(
            f"{config.name} cannot be put on device {str(device)!r} ({problem}); expected a device with room for it; "
            "change training.device"
        ) from problem
    return LanguageModel(model, tokenizer, config.sites, name=config.name, pass_contexts=config.batch_contexts)
