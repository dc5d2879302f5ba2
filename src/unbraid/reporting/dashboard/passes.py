"""One pass of held-out text through the model and every SAE of a run: where in the text each feature fires.

Codes are kept sparse, one [rows, N] matrix per SAE, and every row remembers its context and position, so that all a
dashboard shows (contexts, histograms, partners, pairs) is read from these matrices without the model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sparse
import torch
from torch import Tensor

from unbraid.activations.rows import ChunkSource, RowFilter
from unbraid.config import RunConfig
from unbraid.errors import EvaluationError
from unbraid.sae import SAE

Csc = Any  # scipy.sparse.csc_array, whose annotations say less than nothing to a type checker
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class HeldOutPass:
    """What one pass saw.

    Attributes:
        tokens_CT: `[C, T]` token ids.
        context_R, position_R: `[R]` where in the text each kept row lies.
        codes: SAE name -> `[R, N]` float32 codes by column.
        norms: SAE name -> mean norm of the rows.
    """

    tokens_CT: np.ndarray
    context_R: np.ndarray
    position_R: np.ndarray
    codes: dict[str, Csc]
    norms: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def held_out_pass(
    config: RunConfig,
    source: ChunkSource,
    saes: dict[str, tuple[int, SAE]],
    tokens: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> HeldOutPass:
    """Encode at least `tokens` held-out rows (or all there are) with every SAE.

    Args:
        config: whose buffer settings say which rows count.
        source: a live model or a cache of the run's text.
        saes: name -> (index of its site, SAE on raw activations).
        tokens: kept rows to stop at, rounded up to whole model batches.
        device: where SAEs encode.
        progress: called with rows done and wanted.

    Raises:
        EvaluationError: there is no held-out text.
    """
    row_filter = RowFilter(config.buffer, source.sites, source.special_ids)
    token_parts: list[Tensor] = []
    places: list[Tensor] = []
    parts: dict[str, list[sparse.csr_array]] = {name: [] for name in saes}
    contexts, norms = 0, dict.fromkeys(saes, 0.0)
    for chunk in source.chunks(None, held_out=True):
        keep_BT = row_filter.mask(chunk)
        token_parts.append(chunk.tokens_BT)
        places.append(keep_BT.nonzero() + torch.tensor([contexts, 0]))
        contexts += len(chunk.tokens_BT)
        for name, (site, sae) in saes.items():
            rows_RD = chunk.activations[site][keep_BT.to(chunk.activations[site].device)]
            for x_BD in rows_RD.split(ROWS_AT_ONCE):
                norms[name] += float(x_BD.float().norm(dim=1).sum())
                f_BN = sae.encode(x_BD.to(device, torch.float32)).cpu()
                parts[name].append(sparse.csr_array(f_BN.numpy()))
        progress(row_filter.kept, tokens)
        if row_filter.kept >= tokens:
            break
    if row_filter.kept == 0:
        raise EvaluationError(
            f"no held-out text to show (text.held_out_fraction = {config.text.held_out_fraction}); expected at least "
            "one context; give more text"
        )
    place_R2 = torch.cat(places).numpy()
    return HeldOutPass(
        torch.cat(token_parts).numpy(),
        place_R2[:, 0],
        place_R2[:, 1],
        {name: sparse.csc_array(sparse.vstack(stack)) for name, stack in parts.items()},
        {name: total / row_filter.kept for name, total in norms.items()},
    )


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text; a character spread over several tokens appears at its last one.

    Decoding tokens one by one turns the bytes of such a character into replacement signs.
    """
    texts: list[str] = []
    start, shown = 0, ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        if text.endswith("�") and end < len(ids) and end - start < 8:
            texts.append("")
            continue
        texts.append(text[len(shown) :])
        start, shown = end - 1, tokenizer.decode(ids[end - 1 : end], clean_up_tokenization_spaces=False)
    return texts
