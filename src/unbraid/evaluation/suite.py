"""What a suite of `unbraid eval` is: its name, what it reads, what it measures, and its table.

Each stands in one file, here or in a package of yours; `register` and `per_dictionary` make one known, and `--plugin`
imports it. Its numbers then stand in `evaluation.json`, in the tables, and beside those of every control.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from unbraid.config.measuring import BUILT_IN, READS_TEXT, SUITES
from unbraid.errors import ConfigError, EvaluationError
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

    A number may be a tensor or an array of one, and an interval a pair under NAME_interval.

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
                    one.report[name] = _numbers(name, found)
                evaluation.bar.advance(task)

        places = {title: (number,) for title, number in columns.items()}
        body = {"name": name, "caption": caption, "columns": places, "reads": reads, "measure": measure}
        body |= {"__doc__": function.__doc__, "__module__": function.__module__}
        return register(type(function.__qualname__, (Suite,), body))

    return made


def _numbers(name: str, found: Any) -> dict[str, Any]:
    """What a function found, as plain numbers.

    Raises:
        EvaluationError: it is something else.
    """
    if isinstance(found, Mapping):
        plain = {str(key): _plain(value) for key, value in found.items()}
        wrong = [key for key, value in plain.items() if value is NotImplemented]
        if not wrong:
            return plain
        found = {key: found[key] for key in found if str(key) in wrong}
    raise EvaluationError(
        f"the suite {name!r} gave {str(found)[:120]!r}; expected numbers by name, as in {{'share': 0.5}}, or None"
    )


def _plain(value: Any) -> Any:
    """A number, or a pair of them, as JSON has it; NotImplemented of anything else."""
    if isinstance(value, list | tuple):
        pair = [_plain(one) for one in value]
        return pair if len(pair) == 2 and NotImplemented not in pair else NotImplemented
    if not isinstance(value, int | float) and getattr(value, "size", None) is not None and hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError):  # of several
            return NotImplemented
    return value if value is None or isinstance(value, int | float) else NotImplemented
