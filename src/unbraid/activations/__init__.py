"""From contexts to batches of activation rows: the language model, the shuffle buffer, the cache on disk."""
