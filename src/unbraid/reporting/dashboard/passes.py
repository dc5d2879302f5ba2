"""One pass of held-out text through the model and every SAE of a run: where in the text each feature fires.

Codes are kept sparse, one [rows, N] matrix per SAE, and every row remembers its context and position, so that all a
dashboard shows (contexts, histograms, partners, pairs) is read from these matrices without the model.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sparse
import torch
from torch import Tensor

from unbraid.activations.rows import ChunkSource, RowFilter, side_by_side
from unbraid.config import RunConfig
from unbraid.errors import EvaluationError
from unbraid.sae import SAE

Csc = Any  # scipy.sparse.csc_array, whose annotations say less than nothing to a type checker
ROWS_AT_ONCE = 1024
LARGE = 3.0
"""Times the median norm beyond which a row is large."""
LONGEST_CHARACTER = 8
"""Tokens that a character may be spread over."""


@dataclass(frozen=True)
class HeldOutPass:
    """What one pass saw.

    Attributes:
        tokens_CT: `[C, T]` token ids.
        context_R, position_R: `[R]` where in the text each kept row lies.
        codes: SAE name -> `[R, N]` float32 codes by column.
        norms: SAE name -> mean norm of the rows.
        row_norms: SAE name -> `[R]` norm of each row; empty where nobody kept them.
    """

    tokens_CT: np.ndarray
    context_R: np.ndarray
    position_R: np.ndarray
    codes: dict[str, Csc]
    norms: dict[str, float] = field(default_factory=dict)
    row_norms: dict[str, np.ndarray] = field(default_factory=dict)

    def large_rows(self, name: str) -> np.ndarray:
        """`[R]` which rows have more than `LARGE` times the median norm: few rows that can carry a correlation."""
        norm_R = self.row_norms.get(name)
        if norm_R is None:
            return np.zeros(len(self.context_R), dtype=bool)
        return norm_R > LARGE * np.median(norm_R)


@torch.no_grad()
def held_out_pass(
    config: RunConfig,
    source: ChunkSource,
    saes: dict[str, tuple[tuple[int, ...], SAE]],
    tokens: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> HeldOutPass:
    """Encode at least `tokens` held-out rows (or all there are) with every SAE.

    Args:
        config: whose buffer settings say which rows count.
        source: a live model or a cache of the run's text.
        saes: name -> (indices of the sites it reads, SAE on raw activations).
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
    norms: dict[str, list[np.ndarray]] = {name: [] for name in saes}
    contexts = 0
    for chunk in source.chunks(None, held_out=True):
        keep_BT = row_filter.mask(chunk)
        token_parts.append(chunk.tokens_BT)
        places.append(keep_BT.nonzero() + torch.tensor([contexts, 0]))
        contexts += len(chunk.tokens_BT)
        rows = [x_BTD[keep_BT.to(x_BTD.device)] for x_BTD in chunk.activations]
        for name, (sites, sae) in saes.items():
            rows_RD = side_by_side(rows, sites)
            for x_BD in rows_RD.split(ROWS_AT_ONCE):
                norms[name].append(x_BD.float().norm(dim=1).cpu().numpy())
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
    row_norms = {name: np.concatenate(stack) for name, stack in norms.items()}
    return HeldOutPass(
        torch.cat(token_parts).numpy(),
        place_R2[:, 0],
        place_R2[:, 1],
        {name: sparse.csc_array(sparse.vstack(stack)) for name, stack in parts.items()},
        {name: float(norm_R.mean(dtype=np.float64)) for name, norm_R in row_norms.items()},
        row_norms,
    )


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text; a character spread over several tokens appears at its last one.

    Decoding tokens one by one turns the bytes of such a character into replacement signs. Bytes that never become a
    character (the text is cut inside one, or was damaged) are shown as `⟨E2 80⟩`, each at its token.
    """
    texts: list[str] = []
    start, shown, waiting = 0, "", 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids) and end - start < LONGEST_CHARACTER:
            texts.append("")
            waiting += 1
            continue
        texts.append(text[len(shown) :])
        if "\ufffd" in texts[-1]:
            texts[end - 1 - waiting :] = _incomplete(tokenizer, ids[end - 1 - waiting : end], texts[-1])
        start, shown, waiting = end - 1, tokenizer.decode(ids[end - 1 : end], clean_up_tokenization_spaces=False), 0
    return texts


def single_token_text(tokenizer: Any, token: int) -> str:
    """A token by itself; bytes that are no character are shown as `⟨E2 80⟩`."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return _incomplete(tokenizer, [token], text)[0] if "\ufffd" in text else text


def _incomplete(tokenizer: Any, ids: list[int], text: str) -> list[str]:
    """Texts of tokens that together decode to `text`, which has replacement signs in it."""
    parts = [token_bytes(tokenizer, token) for token in ids]
    whole = b"".join(part or b"" for part in parts)
    if None in parts or _is_text(whole):  # unknown bytes, or a replacement sign that stands in the text itself
        return [*([""] * (len(ids) - 1)), text]
    return [_with_hex(part or b"") for part in parts]


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _with_hex(data: bytes) -> str:
    """The bytes as text, those that are none in hexadecimal."""
    text = data.decode("utf-8", errors="surrogateescape")
    return re.sub("[\udc80-\udcff]+", lambda found: f"⟨{' '.join(f'{ord(c) - 0xDC00:02X}' for c in found[0])}⟩", text)


def token_bytes(tokenizer: Any, token: int) -> bytes | None:
    """The bytes of a token of a byte-level (GPT-2) or byte-fallback (SentencePiece) vocabulary; None of another."""
    named = getattr(tokenizer, "convert_ids_to_tokens", None)
    piece = None if named is None else named(token)
    if not isinstance(piece, str):
        return None
    fallback = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    if fallback is not None:
        return bytes.fromhex(fallback[1])
    return bytes(BYTE_OF[c] for c in piece) if all(c in BYTE_OF for c in piece) else None


def _byte_of() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for U+0100 onwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


BYTE_OF = _byte_of()
