"""Every setting of every kind changes what a run is or is refused, and the refusal names what would activate it."""

import typing

import pytest

from unbraid.config import DecorrelationConfig, EvaluationConfig, RunConfig, SAEConfig, load_config, overridden
from unbraid.config.checks import ActiveWhen, Section, group_of
from unbraid.config.kinds import Kinds
from unbraid.errors import ConfigError
from unbraid.flags import annotation_of, read_flags, value_of

BASE = RunConfig(training={"tokens": 10_000_000})
OTHER = {"sae.n_features": 8192, "training.device": "cuda:0", "model.sites": ["resid_post.3"], "cache": "elsewhere"}


def kinds() -> list[dict]:
    """A base for every architecture and every method."""
    by_sae = [{"sae.architecture": name} for name in SAEConfig.kinds()]
    return by_sae + [{"decorrelation.method": name} for name in DecorrelationConfig.kinds()]


def settings_of(config: Section, prefix: str = "") -> list[str]:
    """Every setting of a configuration's own kinds, also those not read as it stands."""
    paths: list[str] = []
    for name, field in type(config).model_fields.items():
        if group_of(field.annotation):
            paths += settings_of(getattr(config, name), f"{prefix}{name}.")
        else:
            paths.append(f"{prefix}{name}")
    return paths


def candidates(annotation: object, current: object) -> list[object]:
    """Values of a setting's type that differ from the one it has."""
    found: list[object] = []
    for one in (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, type(int | str))
        else [annotation]
    ):
        origin = typing.get_origin(one)
        if origin is typing.Literal:
            found += typing.get_args(one)
        elif one is bool:
            found += [True, False]
        elif one is int:
            found += [2, 3, 7, 64, 300, 5000]
        elif one is float:
            found += [0.5, 0.05, 2.0, 0.9]
        elif one is str:
            found += ["chance", "other", "a b"]
        elif origin is list:
            found += [["tensorboard"], [16, 16384], ["x"], [0.5, 0.25]]
        elif origin is tuple:
            found += [(0.5, 0.9)]
        elif origin is dict:
            found += [{"a": {}, "b": {"seed": 1}}]
    return [value for value in found if value != current]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: "-".join(kind.values()))
def test_every_setting_of_every_kind_changes_the_run_or_says_what_would_make_it_be_read(kind):
    base, _ = overridden(BASE, kind)
    read = 0
    for path in settings_of(base):
        group, _, name = path.rpartition(".")
        section = getattr(base, group) if group else base
        if isinstance(section, Kinds) and section.names_kind == name:
            continue
        field = type(section).model_fields[name]
        values = [OTHER[path]] if path in OTHER else candidates(annotation_of(field), getattr(section, name))
        answers: list[str] = []
        for value in values:
            try:
                changed, dropped = overridden(base, {path: value})
            except ConfigError as error:
                answers.append(str(error))
                continue
            assert not dropped, path
            assert changed.model_dump() != base.model_dump(), path
            assert RunConfig.model_validate(changed.model_dump()) == changed, path
            read += 1
            break
        else:
            conditions = [rule for rule in field.metadata if isinstance(rule, ActiveWhen)]
            assert conditions and any("is read only while" in answer and "; set " in answer for answer in answers), (
                path,
                answers,
            )
    assert read > 30


def test_a_setting_of_another_kind_is_refused_with_the_kinds_that_read_it():
    for base in (SAEConfig, DecorrelationConfig):
        for name, form in base.kinds().items():
            config, _ = overridden(BASE, {base.registry.path: name})
            for other in base.kinds().values():
                for setting in set(other.model_fields) - set(form.model_fields):
                    readers = [kind for kind, one in base.kinds().items() if setting in one.model_fields]
                    with pytest.raises(
                        ConfigError, match=rf"is read by {', '.join(readers)}; set {base.registry.path} to"
                    ):
                        overridden(config, {f"{base.group}.{setting}": 2})


def test_a_recipes_setting_that_no_longer_applies_is_dropped_and_listed():
    config, dropped = overridden(RunConfig(sae={"lambda1": 0.3}), {"sae.architecture": "topk", "sae.k": 8})
    assert [(one.path, one.value) for one in dropped] == [("sae.lambda1", 0.3)]
    assert config.sae == SAEConfig(architecture="topk", k=8)


def test_settings_of_version_0_1_load_without_what_they_do_not_read(tmp_path):
    import json

    data = RunConfig().model_dump(mode="json")
    del data["version"]
    data["sae"] |= {"k": 64, "bandwidth": 0.001, "corruption": 0.1, "matryoshka_widths": None, "aux_k": None}
    data["decorrelation"] |= {"tau": 0.2, "groups": 64, "scan_rows": 256}
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert load_config(tmp_path / "config.json") == RunConfig()
    del data["sae"]["bandwidth"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"sae\.k is read by"):
        load_config(tmp_path / "config.json")


def test_a_class_of_ones_own_registers_with_its_settings_and_trains_from_the_command_line(tmp_path, monkeypatch):
    from unbraid import cli
    from unbraid.sae import ARCHITECTURES

    (tmp_path / "mine.py").write_text(
        "from typing import Literal\n"
        "from unbraid.config import WeightedSAEConfig\n"
        "from unbraid.sae import register\n"
        "from unbraid.sae.relu import ReLUSAE\n\n\n"
        "class MineConfig(WeightedSAEConfig):\n"
        "    architecture: Literal['mine'] = 'mine'\n"
        "    my_setting: int = 1\n\n\n"
        "@register\n"
        "class MineSAE(ReLUSAE):\n"
        "    settings = MineConfig\n"
    )
    try:
        words = ["--sae.architecture", "mine", "--sae.my_setting", "3", "--training.tokens", "768"]
        words += ["--training.held-out-tokens", "256", "--run", str(tmp_path / "run")]
        cli.main(["train", "tiny", "--plugin", str(tmp_path / "mine.py"), *words])
        import unbraid

        sae = unbraid.load(tmp_path / "run" / "saes" / "resid_post.0_twin")
        assert sae.architecture == "mine" and sae.config.model_dump()["my_setting"] == 3
    finally:
        typing.cast(dict, ARCHITECTURES).pop("mine", None)


@pytest.mark.parametrize("words", [["--sae.k"], ["--sae.k", "1", "--sae.k", "2"], ["--training.tokens", "1.5"]])
def test_flags_without_a_value_given_twice_or_of_another_type_are_refused(words):
    with pytest.raises(ConfigError, match=r"has no value|given twice|expected a whole number"):
        read_flags(words, RunConfig, Section)


def test_words_mean_what_the_type_of_a_setting_says():
    assert value_of(int | None, ["none"], "--x") is None
    assert value_of(int, ["1e6"], "--x") == 1_000_000
    assert value_of(bool, ["off"], "--x") is False
    assert value_of(float | str | None, ["0.6 chance"], "--x") == "0.6 chance"
    assert value_of(float | str | None, ["0.2"], "--x") == 0.2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "blocks", "window": 4}, r"window is read only while .*path is auto or coactive"),
        ({"path": "blocks", "refresh": 64}, r"refresh is read only while .*path is auto or coactive"),
        ({"window": 4, "refresh": 2}, r"refresh = 2 with window 4: .*expected none or at least 4"),
    ],
)
def test_a_window_that_nothing_remembers_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        overridden(BASE, {f"decorrelation.{name}": value for name, value in given.items()})
    with pytest.raises(ConfigError, match=message):
        DecorrelationConfig(**given)


def test_a_recipes_window_is_dropped_where_blocks_are_asked_for():
    config, dropped = overridden(
        RunConfig(decorrelation={"window": 4, "refresh": 64}, training={"tokens": 10_000_000}),
        {"decorrelation.path": "blocks"},
    )
    assert [one.path for one in dropped] == ["decorrelation.window", "decorrelation.refresh"]
    assert "window" not in config.decorrelation.model_dump()


def test_a_member_of_a_group_that_is_not_read_is_refused_and_not_dropped():
    with pytest.raises(ConfigError, match=r"spelling is read only while suites is a list with absorption"):
        overridden(EvaluationConfig(), {"suites": ["core"], "spelling.test": 30})


def test_an_object_in_the_place_of_a_value_is_refused_and_not_skipped(tmp_path):
    (tmp_path / "settings.json").write_text('{"sae": {"n_features": {}}, "decorrelation": {}}')
    with pytest.raises(ConfigError, match=r"sae\.n_features = {}: "):
        load_config(tmp_path / "settings.json")
    (tmp_path / "settings.json").write_text('{"decorrelation": {}}')
    assert load_config(tmp_path / "settings.json") == RunConfig()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.checkpoint_every", 10**400, "at most 64 bits"),
        ("optimiser.warmup_steps", 1 << 63, "at most 64 bits"),
        ("cache", "a\0b", "without NUL"),
        ("text.paths", ["a\0b"], "without NUL|not be read"),
        ("model.name", "a/" + "x" * 256, "more than 255 bytes"),
    ],
)
def test_what_no_tensor_path_or_terminal_holds_is_refused(path, value, message):
    with pytest.raises(ConfigError, match=rf"{path} = .*{message}"):
        overridden(BASE, {"text.source": "files"} | {path: value})


def test_many_complaints_are_cut_short():
    with pytest.raises(ConfigError, match="and 195 more") as refused:
        overridden(BASE, {"training.loggers": [0] * 200})
    assert len(str(refused.value)) < 1000


def test_tf32_needs_a_device_that_has_it():
    with pytest.raises(ConfigError, match=r"training\.tf32 is read only while training\.device is cuda"):
        overridden(BASE, {"training.device": "cpu", "training.tf32": True})
