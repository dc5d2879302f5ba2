"""What is attributed: a number made from the logits, such as one token's logit less another's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbraid.errors import FeatureError
from unbraid.feature_model.positions import check_positions
from unbraid.feature_model.prompts import Prompt


@dataclass(frozen=True)
class LogitMetric:
    """A token's logit, less another's, as a mean over positions; made by `unbraid.logit`."""

    token: Any
    minus: Any = None
    at: Any = -1

    def bound(self, fm: Any, batch: Prompt) -> Callable[[Tensor], Tensor]:
        """The metric as a function of logits `[1, T, V]` of a prompt."""
        mask_T = check_positions(self.at, batch.span)[0]
        token = _id(fm, self.token)
        other = None if self.minus is None else _id(fm, self.minus)

        def metric(logits_1TV: Tensor) -> Tensor:
            logits_tV = logits_1TV[0, mask_T].float()
            found = logits_tV[:, token] - (logits_tV[:, other] if other is not None else 0.0)
            return found.mean()

        return metric


Metric = LogitMetric | Callable[[Tensor], Tensor]


def logit(token: Any, minus: Any = None, at: Any = -1) -> LogitMetric:
    """The logit of a token (text or id), less that of `minus`, at a position of the prompt: a metric to attribute.

    Example:
        >>> logit(" Paris", minus=" London")
        LogitMetric(token=' Paris', minus=' London', at=-1)
    """
    return LogitMetric(token, minus, at)


def _id(fm: Any, token: Any) -> int:
    size = fm.hf_model.config.get_text_config().vocab_size
    if isinstance(token, int):
        if not 0 <= token < size:
            raise FeatureError(f"token {token} does not exist; expected an id from 0 to {size - 1}")
        return token
    if fm.tokenizer is None:
        raise FeatureError(f"{token!r} is text but there is no tokenizer; expected a token's id")
    ids = fm.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = [fm.tokenizer.decode([one]) for one in ids]
        raise FeatureError(f"{token!r} is {len(ids)} tokens, {pieces}; expected one; mind the leading space")
    return ids[0]


def bound_metric(fm: Any, batch: Prompt, metric: Any) -> Callable[[Tensor], Tensor]:
    """A metric as a function of `[1, T, V]` that is checked to give a finite scalar."""
    if not callable(metric) and not isinstance(metric, LogitMetric):
        raise FeatureError(f"metric is {metric!r}; expected unbraid.logit(...) or a function of logits [B, T, V]")
    function = metric.bound(fm, batch) if isinstance(metric, LogitMetric) else metric

    def checked(logits_1TV: Tensor) -> Tensor:
        value = function(logits_1TV)
        if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value).all()):
            raise FeatureError(f"the metric gave {value!r}; expected a finite scalar tensor made from the logits")
        return value.reshape(())

    return checked
