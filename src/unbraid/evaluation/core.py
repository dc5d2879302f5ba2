"""SAEBench's core metrics of activations and codes, streamed: reconstruction, shrinkage, sparsity, densities.

Keys and categories are SAEBench 0.6.0's. Three of its numbers depend on how tokens are cut into batches (it centres,
averages or divides within a batch); here a *group* of `group_contexts` contexts stands for its batch, whatever the
batches of the data or of the encoder, so a result depends on the text alone. Where its formula is wrong the number is
kept under a `saebench_` name and the right one stands beside it:

* `r2`: 1 - sum ||r||^2 / sum ||x - mean||^2 over all tokens. `explained_variance_legacy` averages a ratio per token
  around the group's mean (what papers report); `saebench_explained_variance` subtracts the square of a mean of squares,
  so that a constant predictor can score anything.
* `mse`: mean ||r||^2 per token. `saebench_mse` is divided once more by the tokens of the group.

Of a transcoder all of this is about what it predicts; only its codes are of what it reads.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from unbraid.errors import EvaluationError
from unbraid.evaluation.explained import ExplainedVariance
from unbraid.evaluation.geometry import max_cosines
from unbraid.evaluation.protocols import Autoencoder, decoder_rows, encoder_bias, encoder_columns, predicted
from unbraid.evaluation.splice import Together, preservation
from unbraid.evaluation.subjects import EvaluatedSAE
from unbraid.evaluation.suite import Suite, register

if TYPE_CHECKING:
    from unbraid.evaluation.suites import Evaluation

SMALLEST_NORM = 1e-4  # SAEBench divides by 1 instead of by norms below this
GROUP_CONTEXTS = 16
TOKENS_AT_ONCE = 2048
Categories = dict[str, dict[str, float | int]]


@dataclass(frozen=True)
class CoreMetrics:
    """Scalars by SAEBench category and numbers by feature.

    Attributes:
        categories: reconstruction_quality, shrinkage, sparsity, token_stats and misc_metrics.
        features: `[N]` each: feature_density, consistent_activation_heuristic (NaN where the feature never fired),
            encoder_bias, encoder_norm, max_encoder_cosine_sim, max_decoder_cosine_sim and, not of a transcoder,
            encoder_decoder_cosine_sim.
    """

    categories: Categories
    features: dict[str, Tensor] = field(repr=False)

    def details(self) -> list[dict[str, Any]]:
        """SAEBench's `eval_result_details`: one entry a feature, None where a number is undefined."""
        columns = {name: [None if v != v else v for v in values.tolist()] for name, values in self.features.items()}
        return [{"index": i, **{name: values[i] for name, values in columns.items()}} for i in range(self.n_features)]

    @property
    def n_features(self) -> int:
        """N."""
        return len(self.features["feature_density"])


def core_metrics(
    sae: Autoencoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    group_contexts: int = GROUP_CONTEXTS,
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> CoreMetrics:
    """Measure `sae` on activations, one pass, in memory that does not grow with their number.

    Args:
        sae: anything with `encode` and `decode`, and `W_enc`, `W_dec` for the weight metrics (left out without them).
        batches: raw activations of contexts `[C, T, D]` and which of their tokens count `[C, T]` (not BOS, EOS or
            padding). Any number of contexts at a time.
        group_contexts: contexts that stand for one batch of SAEBench's.
        tokens_at_once: tokens encoded together; nothing but speed and memory depends on it.

    Raises:
        EvaluationError: no token counts.
    """
    meter = CoreMeter(sae, group_contexts, tokens_at_once)
    for x_CTD, keep_CT in batches:
        meter.add(x_CTD, keep_CT)
    return meter.result()


class CoreMeter:
    """`core_metrics` batch by batch, for several SAEs that share one stream of activations.

    Args:
        sae, group_contexts, tokens_at_once: as for `core_metrics`.
        on_codes: called with the codes `[tokens, N]` of the tokens that count, in order, so that nothing encodes twice.
    """

    def __init__(
        self,
        sae: Autoencoder,
        group_contexts: int = GROUP_CONTEXTS,
        tokens_at_once: int = TOKENS_AT_ONCE,
        on_codes: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.sae, self.group_contexts, self.tokens_at_once = sae, group_contexts, tokens_at_once
        self._sums = _Sums(on_codes)
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []
        self._n_held = 0

    @torch.no_grad()
    def add(
        self,
        x_CTD: Float[Tensor, "C T D"],
        keep_CT: Bool[Tensor, "C T"],
        y_CTM: Float[Tensor, "C T M"] | None = None,
    ) -> None:
        """Take in contexts; they are measured once a group of them is complete. A transcoder is to predict `y_CTM`."""
        y_CTM = x_CTD if y_CTM is None else y_CTM
        while len(x_CTD):
            taken = self.group_contexts - self._n_held
            self._held.append((x_CTD[:taken], y_CTM[:taken], keep_CT[:taken]))
            self._n_held += len(x_CTD[:taken])
            x_CTD, y_CTM, keep_CT = x_CTD[taken:], y_CTM[taken:], keep_CT[taken:]
            if self._n_held == self.group_contexts:
                self._measure()

    @torch.no_grad()
    def result(self) -> CoreMetrics:
        """The metrics of everything added.

        Raises:
            EvaluationError: no token counts.
        """
        if self._held:
            self._measure()
        if self._sums.kept == 0:
            raise EvaluationError(
                "no token is left to measure on; expected at least one that is not BOS, EOS or padding"
            )
        categories, features = self._sums.result()
        if getattr(self.sae, "W_enc", None) is not None and getattr(self.sae, "W_dec", None) is not None:
            features |= weight_metrics(self.sae)
            for name in ("encoder", "decoder"):
                categories["misc_metrics"][f"average_max_{name}_cosine_sim"] = (
                    features[f"max_{name}_cosine_sim"].double().mean().item()
                )
        return CoreMetrics(categories, features)

    def _measure(self) -> None:
        x_CTD, y_CTM, keep_CT = (torch.cat(parts) for parts in zip(*self._held, strict=True))
        self._held, self._n_held = [], 0
        self._sums.add_group(self.sae, x_CTD, y_CTM, keep_CT, self.tokens_at_once)


class _Sums:
    """Float64 totals over all groups so far."""

    def __init__(self, on_codes: Callable[[Tensor], None] | None) -> None:
        self.on_codes = on_codes
        self.kept = self.tokens = self.groups = 0
        self.explained = ExplainedVariance()
        self.totals: dict[str, float] = {}
        self.group_means: dict[str, float] = {}
        self.saebench_mse = 0.0
        self.legacy_tokens = 0
        self.firings: Tensor | None = None
        self.contexts_fired_in: Tensor | None = None

    def add_group(self, sae: Autoencoder, x_CTD: Tensor, y_CTM: Tensor, keep_CT: Tensor, tokens_at_once: int) -> None:
        n_contexts, n_tokens, _ = x_CTD.shape
        self.tokens += n_contexts * n_tokens
        kept_BD = y_CTM[keep_CT].double()
        if len(kept_BD) == 0:
            return
        mean_D = kept_BD.mean(0)
        group = {"residual": 0.0, "square": kept_BD.square().sum().item(), "square_out": 0.0, "product": 0.0}
        step = max(1, tokens_at_once // n_tokens)
        for first in range(0, n_contexts, step):
            part, wanted, keep = (tensor[first : first + step] for tensor in (x_CTD, y_CTM, keep_CT))
            f_CTN = sae.encode(part)
            x_hat_CTD = predicted(sae, part, f_CTN)
            self._count_firings(f_CTN, keep)
            f_BN = f_CTN[keep]
            if self.on_codes is not None:
                self.on_codes(f_BN)
            for name, value in self._add_rows(wanted[keep], f_BN, x_hat_CTD[keep], mean_D).items():
                group[name] += value
        n = len(kept_BD)
        self.kept += n
        self.groups += 1
        self._mean("residual", group["residual"] / n)
        self._mean("square", group["square"] / n)
        self._mean("bias", group["square_out"] / group["product"] if group["product"] else float("nan"))
        self.saebench_mse += group["residual"] / n

    def _add_rows(self, x_BD: Tensor, f_BN: Tensor, x_hat_BD: Tensor, mean_D: Tensor) -> dict[str, float]:
        self.explained.add(x_BD, x_hat_BD)
        x_BD, x_hat_BD = x_BD.double(), x_hat_BD.double()
        residual_B = (x_BD - x_hat_BD).square().sum(1)
        spread_B = (x_BD - mean_D).square().sum(1)
        norm_in, norm_out = x_BD.norm(dim=1), x_hat_BD.norm(dim=1)
        product_B = (x_BD * x_hat_BD).sum(1)
        varied = spread_B > 0
        self.legacy_tokens += int(varied.sum())
        self._total("legacy", (1 - residual_B / spread_B)[varied])
        self._total("l2_norm_in", norm_in)
        self._total("l2_norm_out", norm_out)
        self._total("l2_ratio", norm_out / torch.where(norm_in < SMALLEST_NORM, 1.0, norm_in))
        self._total("cossim", product_B / (norm_in * norm_out).clamp(min=1e-30))
        self._total("l0", (f_BN != 0).float().sum(1))
        self._total("l1", f_BN.float().sum(1))
        return {
            "residual": residual_B.sum().item(),
            "square_out": norm_out.square().sum().item(),
            "product": product_B.sum().item(),
        }

    def _count_firings(self, f_CTN: Tensor, keep_CT: Tensor) -> None:
        firings_CN = torch.einsum("ctn,ct->cn", (f_CTN > 0).float(), keep_CT.float()).long()
        firings, contexts = firings_CN.sum(0), (firings_CN > 0).sum(0)
        self.firings = firings + (0 if self.firings is None else self.firings)
        self.contexts_fired_in = contexts + (0 if self.contexts_fired_in is None else self.contexts_fired_in)

    def _total(self, name: str, values: Tensor) -> None:
        self.totals[name] = self.totals.get(name, 0.0) + float(values.sum(dtype=torch.float64))

    def _mean(self, name: str, value: float) -> None:
        self.group_means[name] = self.group_means.get(name, 0.0) + value

    def result(self) -> tuple[Categories, dict[str, Tensor]]:
        """The categories and the densities.

        `saebench_explained_variance` is 1 - R / (S - (S / D)^2), R and S the mean over groups of the group's means of
        ||r||^2 and ||x||^2.
        """
        assert self.firings is not None and self.contexts_fired_in is not None and self.explained.width is not None
        mean = {name: value / self.kept for name, value in self.totals.items()}
        group = {name: value / self.groups for name, value in self.group_means.items()}
        upstream_variance = group["square"] - (group["square"] / self.explained.width) ** 2
        density_N = self.firings.double().cpu() / self.kept
        features = {
            "feature_density": density_N,
            "consistent_activation_heuristic": self.firings.double().cpu() / self.contexts_fired_in.double().cpu(),
        }
        categories = {
            "reconstruction_quality": {
                "r2": self.explained.r2,
                "mse": self.explained.residual / self.kept,
                "cossim": mean["cossim"],
                "explained_variance_legacy": mean["legacy"] * self.kept / max(1, self.legacy_tokens),
                "saebench_explained_variance": 1 - group["residual"] / upstream_variance,
                "saebench_mse": self.saebench_mse / self.kept,
            },
            "shrinkage": {name: mean[name] for name in ("l2_norm_in", "l2_norm_out", "l2_ratio")}
            | {"relative_reconstruction_bias": group["bias"]},
            "sparsity": {"l0": mean["l0"], "l1": mean["l1"]},
            "token_stats": {"total_tokens_eval_sparsity_variance": self.tokens, "kept_tokens": self.kept},
            "misc_metrics": density_metrics(density_N),
        }
        return categories, features


def density_metrics(density_N: Float[Tensor, " N"]) -> dict[str, float]:
    """How firings are spread: share of alive features, share of features above 1 % and 10 %, and their share of all
    firings."""
    total = density_N.sum().item()
    metrics = {"frac_alive": (density_N > 0).double().mean().item()}
    for percent in (1, 10):
        above = density_N > percent / 100
        metrics[f"freq_over_{percent}_percent"] = above.double().mean().item()
        metrics[f"normalized_freq_over_{percent}_percent"] = density_N[above].sum().item() / total if total else 0.0
    return metrics


def weight_metrics(sae: object) -> dict[str, Float[Tensor, " N"]]:
    """What the weights alone say of each feature, under SAEBench's names."""
    W_enc, W_dec = encoder_columns(sae), decoder_rows(sae)
    metrics = {
        "encoder_bias": encoder_bias(sae, len(W_dec)),
        "encoder_norm": W_enc.norm(dim=0),
        "max_encoder_cosine_sim": max_cosines(W_enc.T),
        "max_decoder_cosine_sim": max_cosines(W_dec),
    }
    if W_dec.shape == W_enc.T.shape and not getattr(sae, "is_transcoder", False):
        metrics["encoder_decoder_cosine_sim"] = F.cosine_similarity(W_dec, W_enc.T, dim=1)
    return {name: values.cpu() for name, values in metrics.items()}


@register
class CoreSuite(Suite):
    """Reconstruction and sparsity on held-out text, and what the model loses behind reconstructions."""

    name = "core"
    caption = "the reconstruction; cross-entropy and KL score: 1 if spliced in unnoticed, 0 as bad as zeros"
    columns: ClassVar = {
        "L0": ("sparsity", "l0"),
        "R2": ("reconstruction_quality", "r2"),
        "CE score": ("model_performance_preservation", "ce_loss_score"),
        "KL score": ("model_behavior_preservation", "kl_div_score"),
        "alive": ("misc_metrics", "frac_alive"),
        "CE all": ("replaced_together", "ce_loss_score"),
    }
    optional: ClassVar = {"CE all": "CE all: with those of all single sites spliced in at once"}
    reads = "text"

    def measure(self, evaluation: "Evaluation") -> dict[str, str]:
        """See `Suite.measure`."""
        model, subjects = evaluation.model, evaluation.subjects
        contexts = model.held_out[: evaluation.config.splice_contexts]
        task = evaluation.bar.add_task("spliced passes", total=len(contexts), unit="contexts")

        def counted() -> Iterator[tuple[Tensor, ...]]:
            for number, context in enumerate(contexts):
                yield tuple(table_T.unsqueeze(0) for table_T in (*context, *model.positions[number : number + 1]))
                evaluation.bar.advance(task)

        saes: dict[Any, dict[str, Any]] = {}
        for subject in subjects:
            saes.setdefault(model.route(subject), {})[subject.name] = subject.sae
        sets, left_out = _sets(evaluation)
        for name, members in sets.items():
            place = Together(tuple(model.route(member) for member in members))
            saes.setdefault(place, {})[name] = tuple(member.sae for member in members)
        found = preservation(model.source.model, saes, counted(), evaluation.config.seed)
        for subject in subjects:
            core = model.core[subject.name]
            subject.report["core"], subject.features = dict(core.categories), core.features
            for category, metrics in found[subject.name].items():
                subject.report["core"][category] = subject.report["core"].get(category, {}) | metrics
        for name, members in sets.items():
            metrics = found[name]["model_performance_preservation"] | found[name]["model_behavior_preservation"]
            for member in members:
                member.report["core"]["replaced_together"] = {"dictionaries": len(members)} | metrics
        return left_out


def _sets(evaluation: "Evaluation") -> tuple[dict[str, list[EvaluatedSAE]], dict[str, str]]:
    """The dictionaries that one variant has at different sites, under a name that no dictionary has; and why a
    variant's are not replaced together."""
    route, found = evaluation.model.route, {}
    for subject in evaluation.subjects:
        if subject.variant is not None and not route(subject).has_several_sites:
            found.setdefault(subject.variant, []).append(subject)
    sets, left_out = {}, {}
    for variant, members in found.items():
        sites = [str(route(member).writes) for member in members]
        twice = sorted({site for site in sites if sites.count(site) > 1})
        if twice:
            left_out[f"core at all sites of {variant} at once"] = (
                f"several of its dictionaries predict {', '.join(twice)}"
            )
        elif len(members) > 1:
            sets[f"all of {variant}"] = members
    return sets, left_out
