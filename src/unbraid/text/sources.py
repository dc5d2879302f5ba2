"""From settings to a source of text."""

from pathlib import Path

from unbraid.config import TextConfig
from unbraid.errors import TextError
from unbraid.sites import HANDED_IN
from unbraid.text.documents import TextSource
from unbraid.text.files import FileSource
from unbraid.text.generated import GeneratedSource
from unbraid.text.hub import HubSource
from unbraid.text.packaged import PackagedSource
from unbraid.text.readers import saved_dataset


def open_source(config: TextConfig) -> TextSource:
    """The source that `config` describes.

    Raises:
        TextError: its files or packages are missing; a hub data set is looked for on first use.
    """
    if config.source == HANDED_IN:
        raise TextError(
            "text.source is handed_in, which stands for text given in Python, and there is none; expected the same "
            "text again, as in unbraid.resume(run, text=...), or other text to measure on, as in `unbraid eval RUN "
            "--text.source files --text.paths DIR`"
        )
    if config.source == "packaged":
        return PackagedSource(config.shuffle_seed)
    if config.source == "files":
        return FileSource(config.paths, config.column, config.shuffle_seed, config.split)
    if config.source == "generated":
        return GeneratedSource(config.shuffle_seed)
    if config.dataset and saved_dataset(Path(config.dataset).expanduser(), config.split):
        return FileSource([config.dataset], config.column, config.shuffle_seed, config.split)
    return HubSource(config)
