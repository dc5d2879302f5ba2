"""A reader's own labels, notes and lists of features, in one JSON file beside the run.

The file may come from anywhere, as the run may: what is in it is checked for form and size, and only shown as text.
"""

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbraid.errors import UnbraidError
from unbraid.json_files import read_json_object
from unbraid.owned_files import write_owned_json

KIND = "labels"
LONGEST = {"label": 200, "note": 10_000, "list": 100}
MOST_FEATURES, MOST_LISTS = 20_000, 200
ADDRESS = re.compile(r"[^\x00-\x1f]{1,255}/\d{1,9}")

_one_at_a_time = threading.Lock()


@dataclass
class Labels:
    """What readers wrote about features.

    Attributes:
        features: address (`NAME/index`) -> label and note, either may be empty.
        lists: name -> addresses, in the order they were added.
    """

    features: dict[str, dict[str, str]] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Labels":
        """The labels in a file; none where there is no file.

        Raises:
            UnbraidError: the file is damaged, or not one of labels.
        """
        if path.is_symlink():
            raise UnbraidError(f"{str(path)!r} is a symbolic link; expected a file of labels; put that there")
        if not path.exists():
            return cls()
        data = read_json_object(path, UnbraidError, "labels of features")
        features, lists = data.get("features", {}), data.get("lists", {})
        problem = _problem(features, lists)
        if problem is not None:
            raise UnbraidError(f"{str(path)!r} is damaged: {problem}; correct the file, or move it away")
        return cls(features, lists)

    def to_dict(self) -> dict[str, Any]:
        """As in the file."""
        return {"features": self.features, "lists": self.lists}


def _problem(features: Any, lists: Any) -> str | None:
    """What is wrong with the form of labels, with what was expected; None if nothing is."""
    if not isinstance(features, dict) or len(features) > MOST_FEATURES:
        return f"features is no object of at most {MOST_FEATURES:,} entries"
    for address, entry in features.items():
        if not ADDRESS.fullmatch(address):
            return f"{address[:80]!r} is no feature; expected NAME/index"
        if not isinstance(entry, dict) or not set(entry) <= {"label", "note"}:
            return f"the entry of {address[:80]} holds something other than label and note"
        for what, text in entry.items():
            if not isinstance(text, str) or len(text) > LONGEST[what]:
                return f"the {what} of {address[:80]} is no text of at most {LONGEST[what]:,} characters"
    if not isinstance(lists, dict) or len(lists) > MOST_LISTS:
        return f"lists is no object of at most {MOST_LISTS} entries"
    for name, members in lists.items():
        if not name.strip() or len(name) > LONGEST["list"]:
            return f"the list {name[:80]!r} has no name of 1 to {LONGEST['list']} characters"
        if not isinstance(members, list) or len(members) > MOST_FEATURES:
            return f"the list {name[:80]!r} is no list of at most {MOST_FEATURES:,} features"
        if not all(isinstance(one, str) and ADDRESS.fullmatch(one) for one in members):
            return f"the list {name[:80]!r} holds something other than features, NAME/index"
    return None


def change(path: Path, request: dict[str, Any]) -> Labels:
    """Apply one change to the labels in a file, which is made if need be; returns all labels after it.

    Args:
        path: the file.
        request: `{"feature": "NAME/3", "label": ..., "note": ...}`, where two empty texts remove the entry; or
            `{"list": name, "members": ["NAME/3", ...]}`, where null in the place of the members removes the list.

    Raises:
        UnbraidError: the request is none of these, or the file cannot be read or written.
    """
    with _one_at_a_time:
        found = Labels.read(path)
        features: dict[str, Any] = dict(found.features)
        lists: dict[str, Any] = dict(found.lists)
        if set(request) == {"feature", "label", "note"}:
            entry = {what: request[what] for what in ("label", "note")}
            features[str(request["feature"])] = entry
            if entry == {"label": "", "note": ""}:
                del features[str(request["feature"])]
        elif set(request) == {"list", "members"}:
            lists[str(request["list"])] = request["members"]
            if request["members"] is None:
                del lists[str(request["list"])]
        else:
            raise UnbraidError("the change is not understood; expected feature, label and note, or list and members")
        problem = _problem(features, lists)
        if problem is not None:
            raise UnbraidError(f"the change is refused: {problem}")
        labels = Labels(features, lists)
        write_owned_json(path, labels.to_dict(), KIND, error=UnbraidError)
    return labels
