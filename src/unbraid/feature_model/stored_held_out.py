"""Where the features of a dictionary that comes with unbraid fire, without the text, which is not ours to pass on.

`held_out.npz` holds, for some documents of the packaged corpus, a digest of each, and codes on their first tokens. The
documents are looked up by digest where their packages are installed, so maxima, contexts and partners are there without
a pass through the model. Codes are kept to 1/255 of a feature's largest; the largest is exact.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sparse
from rich.console import Console

from unbraid.errors import FeatureError, TextError
from unbraid.feature_model.held_out import HeldOut
from unbraid.reporting.dashboard.passes import HeldOutPass
from unbraid.text.packaged import corpus_file

FILE = "held_out.npz"
VERSION = 1
LEVELS = 255
OPENING = 4_000
"""Characters of a document that are tokenised; its first tokens do not depend on more."""


def digest(text: str) -> np.uint64:
    """What a document is found by."""
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big"))


def opening_ids(tokenizer: Any, text: str, length: int) -> list[int]:
    """The tokens of a document's opening, BOS first, at most `length`."""
    ids = tokenizer(text[:OPENING], add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids][:length]


def corpus_texts() -> tuple[list[str], list[str]]:
    """Documents of the packaged corpus, and the domain of each.

    Raises:
        TextError: its packages are not installed.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(corpus_file(), columns=["text", "domain"])
    return table.column("text").to_pylist(), table.column("domain").to_pylist()


def save_held_out(
    path: Path, held_out: HeldOut, name: str, documents: Sequence[str], largest_N: np.ndarray | None = None
) -> None:
    """Write what a pass over the openings of `documents` saw of the dictionary `name`.

    Args:
        path: the file.
        held_out: what the pass saw.
        name: the dictionary's NAME there.
        documents: their texts, one per context.
        largest_N: `[N]` largest codes, where more was seen than is kept.
    """
    codes = sparse.csc_array(held_out.seen.codes[name])
    codes.sort_indices()
    largest_N = (held_out.maxima[name] if largest_N is None else largest_N).astype(np.float32)
    counts_N = np.diff(codes.indptr)
    levels = np.ceil(codes.data / np.repeat(largest_N, counts_N) * LEVELS).clip(1, LEVELS).astype(np.uint8)
    rows = codes.indices.astype(np.uint16)
    # Differences between neighbours are small, so they compress; the first of a column wraps around, which is undone.
    steps = np.diff(rows, prepend=np.uint16(0))
    np.savez_compressed(
        path,
        version=np.int64(VERSION),
        documents_C=np.array([digest(text) for text in documents], dtype=np.uint64),
        length_C=held_out.length_C.astype(np.int32),
        context_R=held_out.seen.context_R.astype(np.uint16),
        position_R=held_out.seen.position_R.astype(np.uint16),
        counts_N=counts_N.astype(np.uint16),
        rows=steps,
        levels=levels,
        largest_N=largest_N,
        norm=np.float64(held_out.norms[name]),
    )


def load_held_out(path: Path, name: str, tokenizer: Any, console: Console) -> HeldOut:
    """What `save_held_out` wrote, with the text of the documents that are found here.

    Args:
        path: the file.
        name: the dictionary's NAME in the model.
        tokenizer: the model's.
        console: told of documents that are missing.

    Raises:
        FeatureError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {key: file[key] for key in file.files}
        if int(stored["version"]) != VERSION:
            raise ValueError(f"version {int(stored['version'])}")
        counts_N, largest_N, length_C = stored["counts_N"].astype(np.int64), stored["largest_N"], stored["length_C"]
        context_R, position_R = (stored[key].astype(np.int64) for key in ("context_R", "position_R"))
        codes = sparse.csc_array(
            (
                (stored["levels"] / LEVELS * np.repeat(largest_N, counts_N)).astype(np.float32),
                np.cumsum(stored["rows"], dtype=np.uint16).astype(np.int32),
                np.concatenate([[0], np.cumsum(counts_N)]).astype(np.int32),
            ),
            shape=(len(context_R), len(counts_N)),
        )
        codes.check_format(full_check=True)
        tokens_CT, found_C = _tokens(stored["documents_C"], length_C, tokenizer, console)
        if (context_R >= len(found_C)).any() or (position_R >= length_C[context_R]).any():
            raise ValueError("rows outside their documents")
    except (OSError, KeyError, ValueError, TypeError, IndexError) as problem:
        raise FeatureError(f"{str(path)!r} is damaged ({problem}); expected the file that came with unbraid") from None
    there_R = found_C[context_R]
    kept = codes if there_R.all() else sparse.csc_array(sparse.csr_array(codes)[there_R.nonzero()[0]])
    norms = {name: float(stored["norm"])}
    seen = HeldOutPass(tokens_CT, context_R[there_R], position_R[there_R], {name: kept}, norms)
    return HeldOut(seen, norms, length_C.astype(np.int64), known_maxima={name: largest_N})


def _tokens(
    documents_C: np.ndarray, length_C: np.ndarray, tokenizer: Any, console: Console
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[C, T]` of the documents, and which of them are here `[C]`."""
    tokens_CT = np.zeros((len(documents_C), int(length_C.max())), dtype=np.int64)
    found_C = np.zeros(len(documents_C), dtype=bool)
    place = {document: number for number, document in enumerate(documents_C.tolist())}
    try:
        texts, _ = corpus_texts()
    except TextError as problem:
        why = f"maxima are there, but no contexts: they are of text that is not here; {problem}"
        console.print(why, highlight=False, markup=False)
        return tokens_CT, found_C
    for text in texts:
        number = place.get(int(digest(text)))
        if number is not None:
            ids = opening_ids(tokenizer, text, int(length_C[number]))
            if len(ids) == length_C[number]:
                tokens_CT[number, : len(ids)], found_C[number] = ids, True
    if not found_C.all():
        missing = f"{int((~found_C).sum())} of the {len(found_C)} documents with known contexts are not installed here"
        console.print(missing, highlight=False, markup=False)
    return tokens_CT, found_C
