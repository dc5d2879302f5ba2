"""Whether the model hub can be reached, asked once and briefly.

The hub's own client tries every file of a model again for half a minute; a machine without a network should be told so
at once.
"""

import re
from pathlib import Path

TIMEOUT = 10.0
"""Seconds in which the hub must answer."""


def why_unreachable() -> str | None:
    """Why the hub gives no answer, in a few words; None if it answers, whatever it says."""
    from huggingface_hub import constants, get_hf_file_metadata

    try:
        get_hf_file_metadata(f"{constants.ENDPOINT}/api/models?limit=1", timeout=TIMEOUT)
    except Exception as problem:  # the clients that the hub's library has used raise too many kinds to list
        if getattr(problem, "response", None) is not None:
            return None
        if "Offline" in type(problem).__name__:
            return "offline mode is on; unset HF_HUB_OFFLINE"
        return " ".join(str(problem).split())[:160] or type(problem).__name__
    return None


def is_hub_id(name: str) -> bool:
    """Whether a name means a repository on the hub and no path on this machine."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not Path(name).exists()
