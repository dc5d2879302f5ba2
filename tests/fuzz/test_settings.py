"""Settings that somebody mistyped, misplaced or forged: each is taken at its word or refused in one message.

A case is a recipe, perhaps a preset, and a few settings of any kind with values of any sort, given on a command line,
in a settings file or as Python keywords. What is accepted stands in the settings with the value that was given, where
the chosen kind reads it; for small runs it is also planned, with two training steps on rows in hand. The same seed
gives the same case; `pytest -m slow` tries many more.
"""

import json
import random
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unbraid import cli, recipes, run
from unbraid.config import DecorrelationConfig, EvaluationConfig, RunConfig, SAEConfig, SynthConfig, overridden
from unbraid.config.checks import Section, setting_paths
from unbraid.errors import UnbraidError
from unbraid.flags import annotation_of, fields
from unbraid.inputs import Inputs
from unbraid.presets import PRESETS
from unbraid.sites import Site
from unbraid.training.changes import MAY_CHANGE, changed

NUMBERS = (0, 1, 2, 3, 7, 16, 64, 300, 5000, 0.5, 0.05, 0.9, 2.0, -1, -0.0)
EXTREME = (1e308, -1e308, 1e-320, 1e6, 10**18, 2**63, -(2**63) - 1, 10**400, float("nan"), float("inf"), 1 << 26)
TEXTS = (
    *("", "x", "8", "no", "none", "chance", "0.6 chance", "1e999 chance", "-1 chance", "../../x", "/etc/passwd", "a b"),
    *(
        "a\0b",
        "\udcff",
        "\ud800",
        "nan",
        "1_0",
        "\uff11\uff12",
        "0x10",
        "1e6",
        "[red]x[/]",
        "$\\frac{",
        "a\nb",
        "漢字",
        "x" * 3000,
    ),
    *("mps", "cuda:999", "resid_post.1", "resid_post.999999", "module:a:input", "blocks.1.hook_resid_pre", "core,core"),
)
OTHERS = (None, True, False, [], {}, [1], ["x"], [None], [16, 128], [0.5, 0.9], {"a": 1}, [[[]]], {"": {}}, [0] * 200)
UNKNOWN = ("sae", "sae.", "sae..k", ".", "sae.K", "saek", "a.b.c", "optimiser.lr.x", "sae.kk", "variants.a", "x\0", "é")
CALLS: dict[str, type[Section]] = {
    "train": RunConfig,
    "harvest": RunConfig,
    "eval": EvaluationConfig,
    "synth": SynthConfig,
}
MOST_FEATURES = 1024

Given = dict[str, Any]


def value_for(model: type[Section], path: str, chance: random.Random) -> Any:
    """A value for a setting: mostly of its type, sometimes anything."""
    found = fields(model, path)
    if not found or chance.random() < 0.25:
        return chance.choice([*NUMBERS, *EXTREME, *TEXTS, *OTHERS])
    return of_type(annotation_of(chance.choice(found)), chance)


def of_type(annotation: Any, chance: random.Random) -> Any:
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return of_type(members[0], chance)
    if origin is typing.Literal:
        return chance.choice(members)
    if annotation is bool:
        return chance.random() < 0.5
    if annotation is int:
        return chance.choice([number for number in pool(chance) if isinstance(number, int)])
    if annotation is float:
        return chance.choice(pool(chance))
    if annotation is str:
        return chance.choice([*TEXTS, *SAEConfig.kinds(), *DecorrelationConfig.kinds()])
    if origin is list:
        return [of_type(members[0], chance) for _ in range(chance.randrange(4))]
    if origin is tuple:
        return [of_type(member, chance) for member in members]
    if origin is dict:
        return variants(chance)
    return of_type(chance.choice(members), chance) if members else None


def pool(chance: random.Random) -> tuple[float, ...]:
    return EXTREME if chance.random() < 0.2 else NUMBERS


def variants(chance: random.Random) -> Any:
    """Variants with overrides of their own, dotted as they should be or nested as they should not."""
    paths = [path for path in setting_paths(RunConfig) if path.startswith(("sae.", "decorrelation.", "optimiser."))]
    found: dict[str, Any] = {}
    for name in chance.sample(["", "a", "twin", "b-2", "../x", "a\0", "x" * 70, "漢"], chance.randrange(1, 3)):
        inner = {path: value_for(RunConfig, path, chance) for path in chance.sample(paths, chance.randrange(3))}
        found[name] = chance.choice([inner, inner, inner, {"sae": inner}, {"seed": chance.choice(NUMBERS)}, None])
    return found


def random_settings(model: type[Section], chance: random.Random) -> Given:
    """A few settings by dotted path, often with the kind that would read them."""
    paths, given = setting_paths(model), {}
    for _ in range(chance.choice((1, 1, 2, 3))):
        path = chance.choice(UNKNOWN) if chance.random() < 0.05 else chance.choice(paths)
        given[path] = value_for(model, path, chance)
    if model is RunConfig and chance.random() < 0.6:
        given.setdefault("sae.architecture", chance.choice(list(SAEConfig.kinds())))
    if model is not EvaluationConfig and chance.random() < 0.5:
        given.setdefault("decorrelation.method", chance.choice(list(DecorrelationConfig.kinds())))
    return given


def words_of(given: Given, chance: random.Random) -> list[str]:
    """The settings as words of a command line."""
    words: list[str] = []
    for path, value in given.items():
        flag = "--" + (path.replace("_", "-") if chance.random() < 0.5 else path)
        if isinstance(value, list):
            words += [flag, *map(as_word, value)]
        elif chance.random() < 0.3:
            words.append(f"{flag}={as_word(value)}")
        else:
            words += [flag, as_word(value)]
    return words


def as_word(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str) if isinstance(value, dict | list) else "none" if value is None else str(value)


def nested(given: Given) -> Given:
    """`{"sae.k": 8}` -> `{"sae": {"k": 8}}`, as far as the paths agree with one another."""
    data: Given = {}
    for path, value in given.items():
        *groups, last = path.split(".")
        inner = data
        for group in groups:
            inner = inner[group] if isinstance(inner.get(group), dict) else inner.setdefault(group, {})
            if not isinstance(inner, dict):
                break
        else:
            inner[last] = value
    return data


class Refused(Exception):
    """A case ended in a message; all is well."""


def said(case: str, message: str) -> None:
    """One short message, of ours, that any terminal can print."""
    assert 10 < len(message) < 4000, f"{case}: {message[:200]!r}"
    assert "Traceback" not in message and "pydantic" not in message, f"{case}: {message[:500]}"
    assert "\n" not in message.strip(), f"{case}: {message[:500]!r}"
    message.encode("utf-8")


def survive(case: str, action: Callable[[], Any]) -> Any:
    """What `action` returns.

    Raises:
        Refused: it ended in one message.
        AssertionError: it ended in anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return action()
    except UnbraidError as problem:
        said(case, str(problem))
        raise Refused from None
    except Exception as problem:
        raise AssertionError(f"{case}: {type(problem).__name__}: {str(problem)[:500]}") from problem


def at(dump: Any, path: str) -> Any:
    for name in path.split("."):
        assert isinstance(dump, dict) and name in dump, "is not in the settings"
        dump = dump[name]
    return dump


def require_taken(case: str, config: Section, given: Given, from_words: bool) -> None:
    """Everything given stands in the settings with its value, and they can be written and read again."""
    dump = config.model_dump()
    for path, value in given.items():
        try:
            assert same(path, at(dump, path), value, from_words), f"is {at(dump, path)!r}"
        except AssertionError as problem:
            raise AssertionError(f"{case}: {path} = {value!r} was accepted and {problem}") from None
    text = json.dumps(config.model_dump(mode="json"), allow_nan=False)
    assert type(config).model_validate(json.loads(text)) == config, case


def same(path: str, found: Any, given: Any, from_words: bool) -> bool:
    if path.endswith("sites"):
        return found == [str(Site.parse(site)) for site in (given if isinstance(given, list) else [given])]
    if path == "suites":
        words = given if isinstance(given, list) else [given]
        return set(found) == {name.strip() for word in words for name in word.split(",")}
    if isinstance(found, tuple | list):
        given = given if isinstance(given, tuple | list) else [given]
        return len(found) == len(given) and all(same("", *pair, from_words) for pair in zip(found, given, strict=True))
    if not from_words:
        return found == given and isinstance(found, bool) == isinstance(given, bool)
    if isinstance(given, list) and found != as_word(given):
        given = given[0] if given else True  # further words belong to the command; a flag alone says yes
    if isinstance(found, bool):
        return as_word(given).lower() in (("true", "1", "yes", "on") if found else ("false", "0", "no", "off"))
    if isinstance(found, int | float):
        return float(as_word(given)) == found
    return found == given or (found is None and as_word(given) in ("none", "None", "null")) or found == as_word(given)


class Commands:
    """The command line, stopped where a command would begin its work: what it would have worked with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.capsys, self.reached = capsys, []
        monkeypatch.setattr(run, "plan", lambda config, *_, **__: self.reached.append(config) or "plan")
        monkeypatch.setattr(run, "fill_cache", lambda config, *_, **__: self.reached.append(config))
        monkeypatch.setattr("unbraid.evaluation.suites.run_suites", lambda _, config, **__: self.reached.append(config))
        monkeypatch.setattr("unbraid.evaluation.synth.run_synth", lambda config, **__: self.reached.append(config))

    def __call__(self, case: str, words: list[str]) -> Section:
        """The settings the command got.

        Raises:
            Refused: it ended in one message.
        """
        self.reached.clear()
        try:
            survive(case, lambda: cli.main(words))
        except SystemExit as stopped:
            captured = self.capsys.readouterr()
            if stopped.code:
                assert captured.err.startswith("unbraid: "), f"{case}: {captured.err[:300]!r}"
                said(case, captured.err)
                raise Refused from None
        self.capsys.readouterr()
        if not self.reached:
            raise Refused  # help was asked for
        return self.reached[0]


def by_words(case: str, chance: random.Random, commands: Commands, _: Path) -> None:
    command = chance.choice(["train", "train", "train", "harvest", "eval", "synth"])
    given = random_settings(CALLS[command], chance)
    words = words_of(given, chance)
    subject = {"eval": ["nowhere"], "synth": []}.get(command, [chance.choice([*recipes.RECIPES, "tiny", "tiny"])])
    if command == "train":
        words += ["--dry-run"]
    if command == "harvest":
        given |= {"cache": "somewhere"} if "cache" not in given else {}
        words += ["--cache", "somewhere"] if "--cache" not in " ".join(words) else []
    if command == "train" and chance.random() < 0.4:
        words += ["--preset", chance.choice([*PRESETS, "bset", "", "a\0b"])]
    config = commands(f"{case}: {command} {words}", [command, *subject, *words])
    require_taken(f"{case}: {command} {words}", config, given, from_words=True)
    if isinstance(config, RunConfig) and subject == ["tiny"]:
        plan_small(f"{case}: {words}", config)


def by_file(case: str, chance: random.Random, commands: Commands, folder: Path) -> None:
    given = random_settings(RunConfig, chance)
    data = nested(given)
    text = json.dumps(data)
    if chance.random() < 0.1:
        text = chance.choice(["", "[]", "null", "{", "[" * 100_000, '{"sae":' * 50_000, text[:-1], f"[{text}]"])
    (folder / "settings.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    config = commands(f"{case}: {text[:500]}", ["train", str(folder / "settings.json"), "--dry-run"])
    require_taken(f"{case}: {text[:500]}", config, given, from_words=False)


def by_keywords(case: str, chance: random.Random, _: Commands, __: Path) -> None:
    base = chance.choice(list(recipes.RECIPES.values()))()
    given = random_settings(RunConfig, chance)
    how = chance.choice(["overridden", "keywords", "validated", "section"])
    case = f"{case}: {how} {given!r:.1000}"
    if how == "overridden":
        config = survive(case, lambda: overridden(base, given)[0])
        require_taken(case, config, given, from_words=False)
        if base.name == "tiny":
            plan_small(case, config)
    elif how == "section":
        form = chance.choice([*SAEConfig.kinds().values(), *DecorrelationConfig.kinds().values(), SAEConfig])
        names = chance.sample(list(form.model_fields), min(2, len(form.model_fields)))
        keywords = {name: value_for(form, name, chance) for name in names}
        require_taken(case, survive(f"{case} {keywords}", lambda: form(**keywords)), keywords, from_words=False)
    else:
        make = (
            (lambda: RunConfig(**nested(given)))
            if how == "keywords"
            else lambda: RunConfig.model_validate(nested(given))
        )
        require_taken(case, survive(case, make), given, from_words=False)


def by_resume(case: str, chance: random.Random, _: Commands, __: Path) -> None:
    config = chance.choice(list(recipes.RECIPES.values()))()
    paths = chance.sample([*MAY_CHANGE, *MAY_CHANGE, "sae.k", "name", "x.y"], 2)
    given = {path: value_for(RunConfig, path, chance) for path in paths}
    require_taken(case, survive(f"{case}: {given!r:.500}", lambda: changed(config, given)), given, from_words=False)


ROUTES = (by_words, by_words, by_words, by_file, by_keywords, by_keywords, by_resume)
ROWS = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))


def plan_small(case: str, config: RunConfig) -> None:
    """Plan a run on rows in hand, two training steps of each SAE among them, where that takes no time."""
    widths = [config.variant(name).sae.n_features for name in config.variants]
    batch = config.training.batch_tokens
    if max(widths) > MOST_FEATURES or batch > 1024 or len(widths) > 3 or config.training.device not in ("auto", "cpu"):
        return
    survive(f"{case}: planning", lambda: PLAN(config, "nowhere", inputs=Inputs(activations=ROWS)))


PLAN = run.plan


def try_cases(seeds: range, monkeypatch: Any, capsys: Any, folder: Path) -> int:
    """Try them all; how many were accepted."""
    monkeypatch.chdir(folder)
    commands, accepted = Commands(monkeypatch, capsys), 0
    for seed in seeds:
        chance = random.Random(f"settings {seed}")
        try:
            chance.choice(ROUTES)(f"seed {seed}", chance, commands, folder)
            accepted += 1
        except Refused:
            continue
    return accepted


PLACES: dict[str, Given] = {
    "model.name": {},
    "model.revision": {"model.name": "no/such"},
    "model.sites": {},
    "text.paths": {"text.source": "files"},
    "cache": {},
}


@pytest.mark.parametrize("path", PLACES)
def test_names_of_what_is_not_there_are_refused_in_one_message(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tried = 0
    for text in (
        *TEXTS[:1],
        "../../x",
        "a b",
        "\ud800",
        "漢字",
        "x" * 300,
        "random:",
        "packaged:x",
        ".",
        "-x/y",
        "x.gguf",
    ):
        given = PLACES[path] | {path: [text] if path.endswith("s") else text}
        if path == "cache" and text == "":
            continue
        with pytest.raises(Refused):
            survive(f"{given!r:.300}", lambda given=given: PLAN(overridden(recipes.tiny(), given)[0]))
        tried += 1
    assert tried >= 10


@pytest.mark.parametrize("part", range(4))
def test_settings_are_taken_at_their_word_or_refused_in_one_message(part, monkeypatch, capsys, tmp_path):
    assert try_cases(range(part * 90, part * 90 + 90), monkeypatch, capsys, tmp_path) > 10


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
def test_many_settings(part, monkeypatch, capsys, tmp_path):
    assert try_cases(range(10_000 + part * 500, 10_500 + part * 500), monkeypatch, capsys, tmp_path) > 50
