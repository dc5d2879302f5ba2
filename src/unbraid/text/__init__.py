"""Text: documents from anywhere, packed into contexts, from a position that is a value you can save."""

from unbraid.text.contexts import Contexts, Counts, Position, count_contexts, explain_shortage
from unbraid.text.documents import Document, TextSource
from unbraid.text.sources import open_source

__all__ = [
    "Contexts",
    "Counts",
    "Document",
    "Position",
    "TextSource",
    "count_contexts",
    "explain_shortage",
    "open_source",
]
