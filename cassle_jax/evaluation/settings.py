"""Settings of an evaluation: fields of dataclasses, from which the flags are made."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

from cassle_jax.checks import ConfigError, check_at_least, check_seed

Group = TypeVar("Group", bound="Settings")

_VALUES = {int: "a whole number", float: "a number", str: "a text"}


def setting(default: Any, help: str) -> Any:
    """A field of `Settings`, with the sentence that explains it in the help of its flag."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """A frozen dataclass that checks itself, and whose fields are made by `setting`.

    A field is an int, a float, a str, or a tuple of any length of one of these. Its name is also
    the name of the flag, of a table's option, and of the setting on the page. So each name may be
    used once: protocols that share a setting inherit it from a common class.
    """

    @classmethod
    def of(cls: type[Group], values: Mapping[str, Any]) -> Group:
        """The settings with these values; ignores names that are not among the fields.

        Raises:
          ConfigError: a value is out of its range.
        """
        own = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: values[name] for name in own if name in values})


@dataclasses.dataclass(frozen=True)
class Seeded(Settings):
    """Settings of a protocol that draws at random."""

    seed: int = setting(0, "Seed of all random draws.")

    def __post_init__(self):
        check_seed("seed", self.seed)


@dataclasses.dataclass(frozen=True)
class Analysis(Seeded):
    """Settings of a protocol that looks at some of the test images under augmentations."""

    analysed: int = setting(2000, "Number of test images to look at; 0: all.")

    def __post_init__(self):
        super().__post_init__()
        check_at_least("analysed", self.analysed, 0)


def check_distinct(name: str, values: Sequence[Any]) -> None:
    """Raises ConfigError where a list of values is empty, or has a value twice."""
    if not values:
        raise ConfigError(f"{name}= has no value; use one or more, separated by commas")
    if len(set(values)) < len(values):
        raise ConfigError(f"{name}={','.join(map(str, values))} has a value twice")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting, as flags and options have it.

    Attributes:
      name: its name.
      kind: type of its value, or of the values of a list.
      is_list: whether it takes several values, separated by commas.
      default: its default.
      help: its meaning, in one sentence.
    """

    name: str
    kind: type
    is_list: bool
    default: Any
    help: str

    @property
    def text(self) -> str:
        """The default as a flag takes it."""
        return ",".join(map(str, self.default)) if self.is_list else str(self.default)

    def parsed(self, value: Any) -> Any:
        """The value of a text; any other value as it is, with a list as a tuple.

        Raises:
          ConfigError: a text of another kind.
        """
        if not isinstance(value, str):
            return tuple(value) if self.is_list else value
        try:
            if self.is_list:
                return tuple(self.kind(each.strip()) for each in value.split(",") if value)
            return self.kind(value)
        except ValueError as error:
            wanted = _VALUES[self.kind] + (", or several separated by commas" * self.is_list)
            raise ConfigError(f"{self.name}={value!r} is invalid; use {wanted}") from error


def settings_of(groups: Iterable[type[Settings]]) -> dict[str, Setting]:
    """Every setting of some dataclasses, by name.

    Raises:
      TypeError: a field of a type that no flag can have, or two fields of one name.
    """
    fields: dict[str, dataclasses.Field] = {}
    found = {}
    for group in groups:
        kinds = get_type_hints(group)
        for field in dataclasses.fields(group):
            if fields.setdefault(field.name, field) is not field:
                raise TypeError(
                    f"two settings are called {field.name}; rename that of {group.__name__}, or "
                    "inherit both from one class"
                )
            found[field.name] = _setting(field, kinds[field.name], group.__name__)
    return found


def _setting(field: dataclasses.Field, kind: Any, group: str) -> Setting:
    members = get_args(kind)
    one = members[0] if len(members) == 2 and members[1] is ... else kind
    if one not in _VALUES or "help" not in field.metadata:
        raise TypeError(
            f"{group}.{field.name} is not a setting; make it with `setting`, of type int, float or "
            "str, or a tuple of any length of one of them"
        )
    return Setting(field.name, one, one is not kind, field.default, field.metadata["help"])
