"""What a run needs of wherever its activations come from: a model on text, a cache, or rows that were handed in."""

from typing import Protocol, runtime_checkable

from unbraid.activations.rows import ChunkSource


@runtime_checkable
class ActivationSource(ChunkSource, Protocol):
    """A `ChunkSource` that can be counted and described.

    Attributes:
        prepends_bos: whether contexts begin with a BOS token.
        model_name: what the SAEs' files say they were trained on.
    """

    prepends_bos: bool
    model_name: str

    @property
    def description(self) -> str:
        """One line for a person."""
        ...

    def count_rows(self, limit: int) -> int | None:
        """Training rows that are no special tokens, counted no further than `limit`; none where nobody can tell."""
        ...

    def has_held_out_rows(self) -> bool:
        """Whether held-out rows are found within a bounded search."""
        ...
