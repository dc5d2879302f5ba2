"""What happens inside a transformer block, seen by running it: which modules add to the residual stream, and how.

Names differ between families and can mislead (Gemma's `post_attention_layernorm` stands after attention, Llama's before
the MLP; BLOOM and MPT add the residual inside a sublayer; OPT and Llama 4 flatten tokens). So names only say which
module is the attention and which the MLP; everything else is decided by the tensors of a pass over a few tokens: what
is added must add up, and a projection is the module that gives what the sublayer gives.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.activations.hooks import NormGain, Place, first_tensor, input_tensor
from unbraid.errors import ModelError

ATTENTION_NAMES = ("self_attn", "self_attention", "attention", "attn", "att")
MIXER_NAMES = (*ATTENTION_NAMES, "linear_attn", "temporal_block", "conv", "mamba", "mixer")
"""Modules that mix tokens, attention and what some layers have in its place."""
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "mlp_block", "fc2")
ENTRANCES = {"fc2": "fc1"}
"""MLPs without a module of their own: their last linear layer and their first."""


class BlockTrace:
    """One block and what its modules took and gave on a few tokens, each as rows [C * T, W] in float64.

    Args:
        module: the block.
        layer: its number.
        dtype: the model's, which says how exact sums can be.
    """

    def __init__(self, module: nn.Module, layer: int, dtype: torch.dtype) -> None:
        self.module, self.layer, self.dtype = module, layer, dtype
        self.modules = dict(module.named_modules())
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.flat: set[str] = set()
        """Modules that see tokens flattened."""
        self.samples: dict[str, Tensor] = {}
        """Inputs as the modules got them."""

    def listen(self, stack: ExitStack) -> None:
        """Hook every module of the block until `stack` closes."""
        for name, module in self.modules.items():
            before, after = self._keep_input(name), self._keep_output(name)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)

    def _keep_input(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_tensor(args, kwargs)
            if x is not None and x.is_floating_point() and x.ndim > 1 and name not in self.inputs:
                self.inputs[name] = _rows(x)
                self.samples[name] = x.detach().clone()

        return keep

    def _keep_output(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            x = first_tensor(output)
            if x is not None and x.is_floating_point() and x.ndim > 1 and name not in self.outputs:
                self.outputs[name] = _rows(x)
                if x.ndim == 2:
                    self.flat.add(name)

        return keep

    def stream_in(self, site: str) -> Place:
        """The residual stream before the block."""
        return Place(site, self.module, "input")

    def stream_out(self, site: str) -> Place:
        """The residual stream after the block."""
        return Place(site, self.module, "output")

    def stream_between(self, site: str) -> Place:
        """The residual stream between attention and MLP: the block's input plus what attention adds."""
        attention, _ = self._added(site)
        middle = self.inputs[""] + self.outputs[attention]
        if not any(self._equal(x, middle) and not self._equal(x, self.inputs[""]) for x in self.inputs.values()):
            raise self._refused(site, "its attention and MLP read the same input, so nothing lies between them")
        return Place(site, self.modules[attention], "output", self.module, adds_to_frame=True)

    def attention_added(self, site: str) -> Place:
        """What attention adds to the residual stream."""
        self._attention(site)
        return self._output(site, self._added(site)[0])

    def attention_read(self, site: str) -> Place:
        """What attention reads, after the norm."""
        return self._input(site, self._attention(site))

    def attention_heads(self, site: str) -> Place:
        """What the heads give, concatenated, before the output projection."""
        return self._input(site, self._projection(site, self._attention(site)))

    def mlp_added(self, site: str) -> Place:
        """What the MLP adds to the residual stream."""
        return self._output(site, self._added(site)[1])

    def mlp_read(self, site: str) -> Place:
        """What the MLP reads, after the norm."""
        return self._input(site, self._entrance(site))

    def mlp_normed(self, site: str) -> Place:
        """What the MLP reads before the norm's gain and bias."""
        read = self.inputs[self._entrance(site)]
        norms = [name for name, module in self.modules.items() if "norm" in type(module).__name__.lower()]
        for name in norms:
            if name in self.inputs and name in self.outputs and self._equal(self.outputs[name], read):
                gain = NormGain(self.modules[name], self.samples[name])
                frame = self.module if name in self.flat else None
                return Place(site, self.modules[name], "output", frame, norm_gain=gain)
        raise self._refused(site, "its MLP does not read the output of a norm")

    def mlp_neurons(self, site: str) -> Place:
        """What the MLP's neurons give, before the last linear layer."""
        return self._input(site, self._projection(site, self._mlp(site)))

    def _input(self, site: str, name: str) -> Place:
        sample = self.samples.get(name)
        if sample is None:
            raise self._refused(site, f"its {name} takes no activations")
        return Place(site, self.modules[name], "input", self.module if sample.ndim == 2 else None)

    def _output(self, site: str, name: str) -> Place:
        return Place(site, self.modules[name], "output", self.module if name in self.flat else None)

    def _attention(self, site: str) -> str:
        return self._child(site, ATTENTION_NAMES)

    def _mlp(self, site: str) -> str:
        return self._child(site, MLP_NAMES)

    def _entrance(self, site: str) -> str:
        mlp = self._mlp(site)
        return ENTRANCES.get(mlp, mlp)

    def _child(self, site: str, names: tuple[str, ...]) -> str:
        found = self._named(names)
        if found is None:
            raise self._refused(
                site, f"a {type(self.module).__name__} has none of {', '.join(names)}; expected one of them"
            )
        return found

    def _named(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in self.modules), None)

    def _added(self, site: str) -> tuple[str, str]:
        """Names of the modules whose outputs take the block from its input to its output."""
        for names in (MIXER_NAMES, MLP_NAMES):
            self._child(site, names)
        if self._branches is None:
            raise self._refused(
                site,
                "its attention and MLP outputs do not add up to the block's change of the residual stream; expected "
                "input + attn_out + mlp_out = resid_post",
            )
        return self._branches

    @cached_property
    def _branches(self) -> tuple[str, str] | None:
        before, after = self.inputs.get(""), self.outputs.get("")
        mixer_module, mlp_module = self._named(MIXER_NAMES), self._named(MLP_NAMES)
        if before is None or after is None or before.shape != after.shape or not mixer_module or not mlp_module:
            return None
        best: tuple[float, str, str] | None = None
        change = after - before
        for mixer in self._candidates(mixer_module, before):
            for mlp in self._candidates(mlp_module, before):
                error = float((change - self.outputs[mixer] - self.outputs[mlp]).norm())
                if mixer != mlp and (best is None or error < 0.9 * best[0]):
                    best = error, mixer, mlp
        largest = max(float(x.norm()) for x in (before, after))
        return best[1:] if best is not None and best[0] <= self._tolerance * largest else None

    def _candidates(self, name: str, before: Tensor) -> Iterator[str]:
        """A sublayer, the block's other children (norms behind it), and what the sublayer is made of."""
        inside = [other for other in self.modules if other.startswith(f"{name}.")]
        children = [other for other, _ in self.module.named_children() if other != name]
        for other in (name, *children, *inside):
            found = self.outputs.get(other)
            if found is not None and found.shape == before.shape:
                yield other

    def _projection(self, site: str, name: str) -> str:
        """The linear layer whose output is the sublayer's, or what the sublayer adds."""
        wanted = [self.outputs[name]] if name in self.outputs else []
        if self._branches is not None:
            wanted += [self.outputs[branch] for branch in self._branches]
        for inner in (other for other in self.modules if other == name or other.startswith(f"{name}.")):
            weight, found = getattr(self.modules[inner], "weight", None), self.outputs.get(inner)
            linear = isinstance(weight, Tensor) and weight.ndim == 2 and inner in self.inputs
            if linear and found is not None and any(self._equal(found, output) for output in wanted):
                return inner
        raise self._refused(site, f"its {name} does not end in a linear layer, as a mixture of experts does not")

    @property
    def _tolerance(self) -> float:
        return 4 * torch.finfo(self.dtype).eps

    def _equal(self, x: Tensor, y: Tensor) -> bool:
        return x.shape == y.shape and bool((x - y).norm() <= self._tolerance * y.norm())

    def _refused(self, site: str, why: str) -> ModelError:
        return ModelError(f"site {site}: in layer {self.layer}, {why}; use resid_post.{self.layer} for this model")


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a language model; the text decoder's, where there are others.

    Raises:
        ModelError: no list of modules is as long as the model's configuration says.
    """
    n_layers = model.config.get_text_config().num_hidden_layers  # pyright: ignore
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # pyright: ignore
    for root in (decoder, model):
        for module in root.modules() if isinstance(root, nn.Module) else ():
            if isinstance(module, nn.ModuleList) and len(module) == n_layers and _looks_like_a_block(module[0]):
                return module
    raise ModelError(
        f"{type(model).__name__} has no list of {n_layers} transformer blocks; expected a causal language model with "
        f"blocks that hold attention ({', '.join(MIXER_NAMES)}) or an MLP ({', '.join(MLP_NAMES)}); choose another "
        "model.name"
    )


def _looks_like_a_block(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in (*MIXER_NAMES, *MLP_NAMES))


def _rows(x: Tensor) -> Tensor:
    return x.detach().to(torch.float64, copy=True).reshape(-1, x.shape[-1])
