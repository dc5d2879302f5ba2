"""Which device a command works on."""

import torch

from unbraid.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA when there is one.

    Raises:
        ConfigError: the device is not understood or not present.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"training.device = {name!r} cannot be used ({str(error).splitlines()[0]}); expected auto, cpu or cuda[:N]"
        ) from None
    return device


def is_out_of_memory(problem: RuntimeError) -> bool:
    """Whether torch says that memory ran out, on a GPU or in main memory."""
    said = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(problem, torch.OutOfMemoryError) or any(words in str(problem) for words in said)
