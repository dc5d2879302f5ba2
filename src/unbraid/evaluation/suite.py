"""What a suite of `unbraid eval` is: its name, what it reads, what it measures, and its table.

Each stands in one file, here or in a package of yours; `register` and `per_dictionary` make one known, and `--plugin`
imports it. Its numbers then stand in `evaluation.json`, in the tables, and beside those of every control.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from unbraid.config.measuring import BUILT_IN, READS_TEXT, SUITES
from unbraid.errors import ConfigError
from unbraid.files import is_folder_name

if TYPE_CHECKING:
    from unbraid.evaluation.subjects import EvaluatedSAE
    from unbraid.evaluation.suites import Evaluation

Column = tuple[str, ...]
"""Where a number stands in what a suite says of a dictionary; beside NAME may stand NAME_interval."""
Reads = Literal["weights", "prompts", "text", "codes"]


class Suite(ABC):
    """One suite.

    Attributes:
        name: on the command line and in `evaluation.json`.
        caption: what its numbers are, above the table.
        columns: title -> where the number stands.
        optional: titles of columns that are left out where no row has a number -> what they add to the caption.
        reads: weights: the dictionaries alone; prompts: the language model too; text: a pass over held-out text first;
            codes: of which the codes are kept, in `subject.codes`.
    """

    name: ClassVar[str]
    caption: ClassVar[str]
    columns: ClassVar[Mapping[str, Column]]
    optional: ClassVar[Mapping[str, str]] = {}
    reads: ClassVar[Reads] = "weights"

    @abstractmethod
    def measure(self, evaluation: "Evaluation") -> dict[str, str] | None:
        """Leave what was found in `subject.report[self.name]` of the subjects; return what was left out, and why.

        Raises:
            EvaluationError: the suite does not apply; it is skipped with that reason.
        """


SuiteT = TypeVar("SuiteT", bound=type[Suite])


def register(suite: SuiteT) -> SuiteT:
    """Make a suite known by its name.

    Raises:
        ConfigError: its name is no plain word, or is taken.
    """
    name = getattr(suite, "name", None)
    if not isinstance(name, str) or not is_folder_name(name) or "," in name or name == "site":
        raise ConfigError(f"{suite.__qualname__}.name is {name!r}; expected a word of its own, such as 'sparsity'")
    if name in BUILT_IN and not suite.__module__.startswith("unbraid."):
        raise ConfigError(f"{suite.__qualname__}.name is {name!r}, a suite of unbraid's; expected a name of its own")
    if suite.reads not in ("weights", "prompts", *READS_TEXT):
        raise ConfigError(f"{suite.__qualname__}.reads is {suite.reads!r}; expected weights, prompts, text or codes")
    SUITES.add(name, suite)
    return suite


def per_dictionary(
    name: str, caption: str, columns: Mapping[str, str], reads: Reads = "weights"
) -> Callable[[Callable[["EvaluatedSAE", "Evaluation"], dict[str, Any] | None]], type[Suite]]:
    """A suite from a function that measures one dictionary, and gives numbers by name or None where it cannot.

    Args:
        name: on the command line and in `evaluation.json`.
        caption: what its numbers are, above the table.
        columns: title -> name of the number.
        reads: see `Suite`.

    Raises:
        ConfigError: see `register`.

    Example:
        >>> @per_dictionary("tied", "cosine of encoder and decoder rows", {"cosine": "cosine"})
        ... def tied(one, evaluation):
        ...     return {"cosine": torch.cosine_similarity(one.sae.encoder_ND, one.sae.W_dec).mean().item()}
        >>> tied.name, tied.columns
        ('tied', {'cosine': ('cosine',)})
    """

    def made(function: Callable[["EvaluatedSAE", "Evaluation"], dict[str, Any] | None]) -> type[Suite]:
        def measure(self: Suite, evaluation: "Evaluation") -> None:
            subjects = [one for one in evaluation.subjects if one.has_own_features]
            task = evaluation.bar.add_task(name, total=len(subjects), unit="SAEs")
            for one in subjects:
                found = function(one, evaluation)
                if found is not None:
                    one.report[name] = found
                evaluation.bar.advance(task)

        places = {title: (number,) for title, number in columns.items()}
        body = {"name": name, "caption": caption, "columns": places, "reads": reads, "measure": measure}
        body |= {"__doc__": function.__doc__, "__module__": function.__module__}
        return register(type(function.__qualname__, (Suite,), body))

    return made
