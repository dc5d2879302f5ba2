"""Adam for one SAE, with the decoder kept on the unit sphere.

A step clips the global gradient norm, removes from each decoder row's gradient the part along the row (moving along
it would be undone by the renormalisation, but would still enter Adam's moments), takes a fused Adam step, and puts
the rows back to unit norm (Eq. 5). A gradient that is not finite stops the step before any weight is touched.
"""

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from unbraid.config import OptimiserConfig
from unbraid.errors import TrainingError
from unbraid.sae.base import SAE

SLAB = 256


class SAEOptimiser:
    """Fused Adam over an SAE's parameters with unit decoder rows.

    Args:
        sae: the autoencoder whose parameters are updated in place.
        config: betas, eps and the clipping norm; the learning rate is given to each step.
    """

    def __init__(self, sae: SAE, config: OptimiserConfig):
        self.sae = sae
        self.config = config
        self.parameters = dict(sae.named_parameters())
        self.adam = torch.optim.Adam(self.parameters.values(), betas=config.betas, eps=config.eps, fused=True)
        for parameter in self.parameters.values():
            self.adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self.adam.zero_grad()

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Update the weights from their gradients; returns the gradient's global L2 norm before clipping.

        Raises:
            TrainingError: the gradient is not finite; no weight has been changed.
        """
        ranks, gradients = self.sae.shard.ranks, {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        tangent = self._make_decoder_gradient_tangent()
        shared = [ranks.sum(gradients[name]) for name in self.sae.shared if name in gradients]
        own = [g for name, g in gradients.items() if name != "W_dec" and name not in self.sae.shared]
        norm_of_own = torch.stack([tangent, get_total_norm(own)]).norm()
        (square,) = ranks.total(float(norm_of_own) ** 2)
        norm = (square + float(get_total_norm(shared)) ** 2) ** 0.5
        if not norm < float("inf"):
            raise TrainingError(
                f"the gradient norm is {norm}; expected a finite number; no weight was changed: lower optimiser.lr or "
                "sae.lambda1, or look at the activations of this batch"
            )
        if self.config.clip_norm is not None and norm > self.config.clip_norm:
            clip_grads_with_norm_(self.parameters.values(), self.config.clip_norm, torch.tensor(norm))
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        W_dec = self.sae.W_dec
        W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))
        self.sae.constrain()
        return norm

    def _make_decoder_gradient_tangent(self) -> Tensor:
        """Remove the part of each row's gradient along the row, in place, slab by slab while it is in cache."""
        W_dec = self.sae.W_dec
        if W_dec.grad is None:
            return W_dec.new_zeros(())
        norms = []
        for g, w in zip(W_dec.grad.split(SLAB), W_dec.split(SLAB), strict=True):
            g.addcmul_((g * w).sum(1, keepdim=True), w, value=-1)
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
