"""The language model of an evaluation, and the passes over it that suites share.

The model is what costs, so its passes are shared: one stream of held-out activations feeds the meters of every SAE of
every site, one intact pass serves all of them, and the short prompts of probing and absorption are read at all sites
at once and cached.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from unbraid.activations.live import LiveActivations
from unbraid.activations.rows import Chunk, RowFilter, side_by_side
from unbraid.config import EvaluationConfig, RunConfig
from unbraid.errors import EvaluationError
from unbraid.evaluation.core import CoreMeter, CoreMetrics
from unbraid.evaluation.subjects import EvaluatedSAE
from unbraid.evaluation.trained_controls import ControlSite, steps_on, trained_controls
from unbraid.progress import Stages
from unbraid.sae import Codes
from unbraid.sites import Route

REFERENCE_ROWS = 4096


class OnModel:
    """What suites read of the model and text of `run`.

    Args:
        run: model, sites and text.
        subjects: SAEs and controls; controls may be added before the first suite.
        config: sizes.
        device: where everything runs.
        bar: shows how far it is.
    """

    def __init__(
        self, run: RunConfig, subjects: list[EvaluatedSAE], config: EvaluationConfig, device: torch.device, bar: Stages
    ):
        self.subjects, self.config, self.device, self.bar = subjects, config, device, bar
        task = bar.add_task(f"loading {run.model.name}", total=1, unit="models")
        self.source = LiveActivations(run, device)
        self.filter = RowFilter(run.buffer, self.source.sites, self.source.special_ids)
        self.core: dict[str, CoreMetrics] = {}
        self.held_out: list[tuple[Tensor, Tensor]] = []
        self.positions: list[Tensor] = []
        bar.advance(task)

    def control_rows(self) -> list[Tensor]:
        """Rows that controls are trained on, `[control_tokens, D]` a site."""
        task = self.bar.add_task("activations for controls", total=self.config.control_tokens, unit="rows")
        return self.training_rows(self.config.control_tokens, lambda found: self.bar.update(task, completed=found))

    def training_rows(self, wanted: int, told: Callable[[int], None] = lambda _: None) -> list[Tensor]:
        """Rows of training text, `[wanted, D]` a site or all there are: what controls are fitted to.

        Raises:
            EvaluationError: there is no text.
        """
        parts: list[list[Tensor]] = []
        found = 0
        for chunk in self.source.chunks(None):
            parts.append([x_BD.float() for x_BD in self.filter(chunk)])
            found += len(parts[-1][0])
            told(min(found, wanted))
            if found >= wanted:
                break
        if not parts:
            raise EvaluationError(f"the text gave no context of {self.source.context_length} tokens; give more text")
        return [torch.cat(pieces)[:wanted] for pieces in zip(*parts, strict=True)]

    def trained_controls(self, site: int, width: int, l0: float, rows: Callable[[], list[Tensor]]) -> dict[str, Any]:
        """Controls of which half has learned, of a width and sparsity; see `trained_controls`.

        Raises:
            EvaluationError: there is too little text, or the cache cannot be written.
        """
        run, name = self.source, str(self.source.sites[site])
        kept = {"site": name, "context_length": run.context_length, "bos": run.prepends_bos} | {
            "rows": self.filter.config.model_dump(mode="json", include={"drop_first_position", "norm_limit"})
        }
        source = kept | run.identity
        place = ControlSite(width, max(1, round(l0)), self.config.seed, source, self.config.control_tokens)

        def train_on() -> Tensor:
            x_RD = rows()[site]
            self.bar.add_task(f"controls at {name}", total=steps_on(len(x_RD)), unit="steps")
            return x_RD

        return trained_controls(place, train_on, self.device, self.bar.advance_now)

    def read_held_out(self, keep_codes: bool) -> None:
        """One pass over held-out text: core metrics of every SAE, its codes if wanted, and the text itself.

        Raises:
            EvaluationError: there is no held-out text.
        """
        meters = []
        for subject in self.subjects:
            with_codes = keep_codes and subject.has_own_features
            meters.append((subject, CoreMeter(subject.sae, on_codes=_keep_codes(subject) if with_codes else None)))
        for chunk, keep_CT in self._held_out_chunks():
            self.held_out += zip(chunk.tokens_BT, keep_CT, strict=True)
            if chunk.positions_BT is not None:
                self.positions += chunk.positions_BT
            activations = [x_CTD.float() for x_CTD in chunk.activations]
            for subject, meter in meters:
                outputs = [self.source.sites.index(site) for site in subject.outputs]
                y_CTM = side_by_side(activations, outputs) if outputs else None
                meter.add(side_by_side(activations, subject.sites), keep_CT.to(self.device), y_CTM)
        self.core = {subject.name: meter.result() for subject, meter in meters}

    def _held_out_chunks(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Held-out chunks, `config.tokens` in whole contexts, and which of their tokens count."""
        text = self.source.text
        wanted = left = -(-self.config.tokens // text.context_length)
        task = self.bar.add_task("held-out activations", total=wanted, unit="contexts")
        if text.held_out_fraction > 0:
            for chunk in self.source.chunks(None, held_out=True):
                chunk = chunk.of_first(left)
                yield chunk, self.filter.mask(chunk)
                self.bar.advance(task, len(chunk.tokens_BT))
                left -= len(chunk.tokens_BT)
                if left == 0:
                    return
        if left == wanted:
            raise EvaluationError(
                f"no held-out text: text.held_out_fraction = {text.held_out_fraction} gave no full context; give more "
                "text or raise it"
            )
        self.bar.update(task, total=wanted - left)

    def route(self, subject: EvaluatedSAE) -> Route:
        """What it reads and what it predicts."""
        inputs = tuple(self.source.sites[site] for site in subject.sites)
        return Route(inputs, subject.outputs or inputs)

    def words(self, context: int, position: int, before: int, after: int) -> str:
        """The held-out text around a token."""
        tokens_T = self.held_out[context][0][max(0, position - before) : position + after + 1]
        return self.source.model.tokenizer.decode(tokens_T.tolist(), skip_special_tokens=True)


def _keep_codes(subject: EvaluatedSAE) -> Callable[[Tensor], None]:
    def keep(f_BN: Tensor) -> None:
        codes = Codes.from_dense(f_BN.cpu())
        # A bare copy: the original remembers its sorted pattern, several times its size.
        subject.codes.append(Codes.unchecked(codes.offsets, codes.indices, codes.values, codes.n_features))

    return keep
