"""Adam for one SAE, with the decoder kept on the unit sphere.

A step clips the global gradient norm, removes from each decoder row's gradient the part along the row (moving along
it would be undone by the renormalisation, but would still enter Adam's moments), takes a fused Adam step, and puts
the rows back to unit norm (Eq. 5), or to norms by site that sum to 1 where `sae.row_norm` says so. A gradient that is
not finite stops the step before any weight is touched: by an error on a CPU; on an accelerator, where looking would
make the host wait, by a flag that the update itself heeds and `SAETrainer.require_finite` reads when it is time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from unbraid.config import OptimiserConfig
from unbraid.errors import TrainingError
from unbraid.kernels import host
from unbraid.sae.base import SAE
from unbraid.sae.site_norms import summed_norms

SLAB = 256
NEAR = 0.8
"""Cosine that a decoder row of `sae.frozen = "near"` keeps with the row it began as."""


HELD = {"decoder": ("W_dec",), "encoder": ("encoder_ND",), "both": ("W_dec", "encoder_ND")}
"""Value of `sae.frozen` -> parameters that no step changes."""


class SAEOptimiser:
    """Fused Adam over an SAE's parameters with unit decoder rows.

    Args:
        sae: the autoencoder whose parameters are updated in place.
        config: betas, eps and the clipping norm; the learning rate is given to each step.
        site_widths: of each site that is predicted, where these are several.

    Attributes:
        failed_at: [] int64, the first step that was not finite, counted from 1; 0 without one. From then on no step
            changes a weight. Always 0 on a CPU, where such a step raises.
    """

    def __init__(self, sae: SAE, config: OptimiserConfig, site_widths: Sequence[int] = ()):
        self.sae = sae
        self.config = config
        self.summed_sites = site_widths if sae.config.row_norm == "sum" else ()
        self.parameters = dict(sae.named_parameters())
        self.adam = torch.optim.Adam(self.parameters.values(), betas=config.betas, eps=config.eps, fused=True)
        for parameter in self.parameters.values():
            self.adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.failed_at = torch.zeros((), dtype=torch.int64, device=sae.W_dec.device)
        if sae.config.frozen == "near":  # Adam leaves it alone, and checkpoints hold it.
            self.adam.state[sae.W_dec]["start"] = sae.W_dec.detach().clone()

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self.adam.zero_grad()

    @torch.no_grad()
    def step(self, lr: float, number: int = 1, loss: Tensor | None = None) -> float | Tensor:
        """Update the weights from their gradients; returns the gradient's global L2 norm before clipping.

        Args:
            lr: learning rate.
            number: of the step, counted from 1, for `failed_at`.
            loss: what must be finite beside the gradient, on an accelerator.

        Raises:
            TrainingError: the gradient is not finite, on a CPU; no weight has been changed.
        """
        for name in HELD.get(self.sae.config.frozen, ()):
            self.parameters[name].grad = None
        if self.sae.cross_layer is not None:
            self.sae.cross_layer.zero_gradients(self.sae)
        own, shared = self._gradient_norms()
        if host.reading_waits(own):
            return self._update_unseen(own, shared, lr, number, loss)
        (square,) = self.sae.shard.ranks.total(float(own) ** 2)
        norm = (square + float(shared) ** 2) ** 0.5
        if not norm < float("inf"):
            raise TrainingError(
                f"the gradient norm is {norm}; expected a finite number; no weight was changed: lower optimiser.lr or "
                "sae.lambda1, or look at the activations of this batch"
            )
        if self.config.clip_norm is not None and norm > self.config.clip_norm:
            clip_grads_with_norm_(self.parameters.values(), self.config.clip_norm, torch.tensor(norm))
        self._update(lr)
        return norm

    def _update_unseen(self, own: Tensor, shared: Tensor, lr: float, number: int, loss: Tensor | None) -> Tensor:
        """The same without looking: Adam skips its update where its `found_inf` is 1, and rows are divided by 1."""
        norm = (self.sae.shard.ranks.sum(own.double().square()) + shared.double().square()).sqrt()
        failed = ~(norm < torch.inf) if loss is None else ~((norm < torch.inf) & loss.detach().isfinite())
        self.failed_at = torch.where((self.failed_at == 0) & failed, number, self.failed_at)
        stopped = self.failed_at > 0
        if self.config.clip_norm is not None:
            clip_grads_with_norm_(self.parameters.values(), self.config.clip_norm, norm.float())
        self.adam.found_inf = stopped.float()  # pyright: ignore[reportAttributeAccessIssue]
        self._update(lr, stopped)
        return norm

    def _update(self, lr: float, stopped: Tensor | None = None) -> None:
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        W_dec = self.sae.W_dec
        if "W_dec" not in HELD.get(self.sae.config.frozen, ()):
            norms_N1 = (
                summed_norms(W_dec, self.summed_sites)
                if self.summed_sites
                else torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
            )
            W_dec.div_(norms_N1 if stopped is None else norms_N1.masked_fill_(stopped, 1.0))
        if self.sae.config.frozen == "near":
            self._stay_near()
        self.sae.constrain()

    def _gradient_norms(self) -> tuple[Tensor, Tensor]:
        """Of the gradients that are complete on this rank, and of those that all ranks share, summed over them."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        tangent = self._make_decoder_gradient_tangent()
        shared = [self.sae.shard.ranks.sum(gradients[name]) for name in self.sae.shared if name in gradients]
        own = [g for name, g in gradients.items() if name != "W_dec" and name not in self.sae.shared]
        return torch.stack([tangent, get_total_norm(own)]).norm(), get_total_norm(shared)

    def _stay_near(self) -> None:
        """Turn rows that have left the cone around where they began back onto it, by the shortest way."""
        W_dec, start_ND = self.sae.W_dec, self.adam.state[self.sae.W_dec]["start"]
        cosine_N1 = (W_dec * start_ND).sum(1, keepdim=True)
        aside_ND = W_dec - cosine_N1 * start_ND
        aside_ND *= (1 - NEAR**2) ** 0.5 / torch.linalg.vector_norm(aside_ND, dim=1, keepdim=True).clamp(min=1e-12)
        W_dec.copy_(torch.where(cosine_N1 < NEAR, NEAR * start_ND + aside_ND, W_dec))

    def _make_decoder_gradient_tangent(self) -> Tensor:
        """Remove the part of each row's gradient along the row, in place, slab by slab while it is in cache."""
        W_dec = self.sae.W_dec
        if W_dec.grad is None:
            return W_dec.new_zeros(())
        norms = []
        for g, w in zip(W_dec.grad.split(SLAB), W_dec.split(SLAB), strict=True):
            along_N1 = (g * w).sum(1, keepdim=True)
            if self.summed_sites:
                along_N1 /= w.square().sum(1, keepdim=True)
            g.addcmul_(along_N1, w, value=-1)
            norms.append(torch.linalg.vector_norm(g))
        return torch.stack(norms).norm()

    def state_tensors(self) -> dict[str, Tensor]:
        """Adam's moments and step counts, named after the parameters, for a checkpoint."""
        return {
            f"{name}.{part}": tensor
            for name, parameter in self.parameters.items()
            for part, tensor in self.adam.state[parameter].items()
        }

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned, in place.

        Raises:
            TrainingError: a tensor is missing, unknown, or of another shape.
        """
        own = self.state_tensors()
        if set(own) != set(tensors):
            odd = sorted(set(own) ^ set(tensors))
            raise TrainingError(f"optimiser state differs in {odd}; expected the tensors of this architecture")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise TrainingError(
                    f"optimiser state {name!r} has shape {tuple(tensors[name].shape)}; expected {tuple(tensor.shape)}"
                )
            tensor.copy_(tensors[name])
