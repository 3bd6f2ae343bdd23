"""A setting is written once: its flag, its option, its default and its check follow."""

import dataclasses

import pytest
from absl import flags

from cassle_jax.checks import ConfigError
from cassle_jax.evaluate import define_flags
from cassle_jax.evaluation.few_shot import FewShotSettings
from cassle_jax.evaluation.protocols import (
    PROTOCOLS,
    all_settings,
    checked_settings,
    parsed_settings,
)
from cassle_jax.evaluation.settings import Analysis, Seeded, Settings, setting, settings_of

PUBLISHED = {
    "network": "online",
    "batch": 256,
    "limit": 0,
    "size": 0,
    "mean": (),
    "std": (),
    "seed": 0,
    "neighbours": 1,
    "shots": (1, 5),
    "ways": 5,
    "episodes": 2000,
    "analysed": 2000,
    "pairs": 1000,
    "probe_epochs": 100,
    "fractions": (0.01, 0.1, 1.0),
    "fine_tune_epochs": 0,
}


def test_flags_of_every_published_name_have_its_default():
    values = flags.FlagValues()
    define_flags(values)
    values(["evaluate"])
    assert parsed_settings({name: values[name].value for name in all_settings()}) == PUBLISHED
    assert values["ways"].help == "few_shot: Classes per episode."


def test_the_defaults_are_those_of_every_protocol():
    extraction, of_protocols = checked_settings({})
    assert of_protocols == {name: each.settings() for name, each in PROTOCOLS.items()}
    for settings in (extraction, *of_protocols.values()):
        assert vars(settings).items() <= PUBLISHED.items()


def test_a_setting_reaches_every_protocol_that_has_it():
    _, of_protocols = checked_settings(parsed_settings({"seed": "3", "shots": "2, 4"}))
    assert of_protocols["few_shot"] == FewShotSettings(seed=3, shots=(2, 4))
    assert of_protocols["matching"] == Analysis(seed=3)
    assert of_protocols["knn"] == PROTOCOLS["knn"].settings()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shot": "1"}, r"^settings='shot' is unknown; use one of .*; did you mean 'shots'\?$"),
        ({"ways": "few"}, r"^ways='few' is invalid; use a whole number$"),
        ({"ways": "2.5"}, r"^ways='2.5' is invalid; use a whole number$"),
        ({"shots": "1,x"}, r"^shots='1,x' is invalid; use a whole number, or several separated"),
        ({"std": "1,1,x"}, r"^std='1,1,x' is invalid; use a number, or several separated"),
        ({"seed": "-1"}, r"^seed=-1 is not a seed"),
        ({"analysed": "-1"}, r"^analysed=-1 must be at least 0$"),
        ({"neighbours": "0"}, r"^neighbours=0 must be at least 1$"),
        ({"shots": "1,0"}, r"^shots=0 must be at least 1$"),
        ({"shots": ""}, r"^shots= has no value; use one or more"),
        ({"shots": "5,1,5"}, r"^shots=5,1,5 has a value twice$"),
        ({"fractions": "0.1,1.5"}, r"^fractions=1.5 is not in \(0, 1\]$"),
        ({"fractions": "nan"}, r"^fractions=nan is not in \(0, 1\]$"),
        ({"probe_epochs": "0"}, r"^probe_epochs=0 must be at least 1$"),
        ({"fine_tune_epochs": "-1"}, r"^fine_tune_epochs=-1 must be at least 0$"),
        ({"probe_epochs": str(2**40)}, r"^probe_epochs=\d+ is out of range; use at most 1048576$"),
        ({"episodes": "0"}, r"^episodes=0 must be at least 1$"),
        ({"episodes": str(2**40)}, r"^episodes=\d+ is out of range; use at most 2147483647$"),
        ({"analysed": str(2**70)}, r"^analysed=\d+ is out of range; use at most 2147483647$"),
        ({"size": str(2**40)}, r"^size=\d+ is out of range; use at most 32768$"),
        ({"batch": "1"}, r"^batch=1 must be at least 2$"),
        ({"limit": "-1"}, r"^limit=-1 must be at least 0$"),
        ({"mean": "0.5"}, r"^mean=\(0\.5,\) does not have 3 values"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_flag(values, message):
    with pytest.raises(ConfigError, match=message):
        checked_settings(parsed_settings(values))


@dataclasses.dataclass(frozen=True)
class OfAnother(Settings):
    ways: int = setting(2, "Another thing of the same name.")


@dataclasses.dataclass(frozen=True)
class OfNoFlag(Settings):
    ranks: tuple[int, int] = setting((6, 50), "No flag has a value like this.")


def test_a_name_belongs_to_one_setting():
    assert list(settings_of([Seeded, Analysis, FewShotSettings]))[:2] == ["seed", "analysed"]
    with pytest.raises(TypeError, match=r"two settings are called ways; rename that of OfAnother"):
        settings_of([FewShotSettings, OfAnother])
    with pytest.raises(TypeError, match=r"OfNoFlag.ranks is not a setting"):
        settings_of([OfNoFlag])
