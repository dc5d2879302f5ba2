"""Every failure a user can cause or meet, as one family of exceptions.

A message says what was wrong, what was expected and what to change, in that order, and quotes the offending value.
The command line prints such a message without a traceback; anything that is not an `UnbraidError` is a bug.
"""


class UnbraidError(Exception):
    """Base of every error unbraid raises on purpose.

    Attributes:
        silent: another process of the run says why it ended.

    Example:
        >>> try:
        ...     unbraid.load("no such folder")
        ... except UnbraidError as error:
        ...     print(type(error).__name__)
        FormatError
    """

    silent: bool = False


class ConfigError(UnbraidError):
    """A setting is unknown, out of range, or contradicts another."""


class TextError(UnbraidError):
    """A text source is missing, unreadable, empty or too small for the run."""


class RowsUsedUp(TextError):
    """Text or activations ended before the planned steps were made."""


class ModelError(UnbraidError):
    """A language model cannot be loaded, or a site asked for does not exist or never fires."""


class ActivationError(UnbraidError):
    """Activations have the wrong shape or are not finite, or a cached shard is damaged or foreign."""


class CodesError(UnbraidError):
    """Codes or decoders handed to an SAE or a penalty have the wrong shape, dtype or sign."""


class TrainingError(UnbraidError):
    """Training cannot start or go on: a loss that is not finite, a run folder in use."""


class RankLostError(UnbraidError):
    """Another process of the run has ended or cannot be reached; its own message says why."""


class CheckpointError(UnbraidError):
    """A checkpoint is absent, damaged, written by a newer version, or cannot be written."""


class FormatError(UnbraidError):
    """An SAE folder is not in a layout unbraid reads, or a layout cannot hold this SAE."""


class EvaluationError(UnbraidError):
    """An evaluation cannot run on this SAE, model or data."""


class FeatureError(UnbraidError):
    """A feature, position, prompt or edit does not exist, or cannot be used on this model."""
