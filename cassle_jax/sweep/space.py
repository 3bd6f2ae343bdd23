"""Expands the values of a sweep into runs, and checks every setting of every run."""

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from cassle_jax.checks import LONGEST, ConfigError, check_at_least, check_seed
from cassle_jax.command import config_of
from cassle_jax.config import ARGUMENTS, FLAG_OPTIONS, UnknownSetting, check_setting, flat_settings
from cassle_jax.config_files import find_file
from cassle_jax.training.run import check_settings, check_warmup

Values = dict[str, str]

_RANGE = re.compile(r"(uniform|log)\((.+),(.+)\)")
_LONGEST_NAME = 120
_PAIRS = {"(": ")", "[": "]", "{": "}"}


@dataclasses.dataclass(frozen=True)
class SweepRequest:
    """The configuration and the values of a sweep.

    Attributes:
      config: a configuration file with its arguments, as `--config` of the pretraining command.
      overrides: settings of all runs, as `--config.name=value`.
      grid: `name=value,value;name=…`: all combinations of the values.
      zipped: the same format, with equally many values per name; run i has the i-th of each.
      random: the same format; values are drawn. A value may be `uniform(low,high)` or
        `log(low,high)`; both draw integers where `low` and `high` are integers.
      draws: number of draws.
      draw_seed: seed of the draws; a larger number of draws begins with the same ones.
    """

    config: str
    overrides: tuple[str, ...] = ()
    grid: str = ""
    zipped: str = ""
    random: str = ""
    draws: int = 0
    draw_seed: int = 0


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A run of a sweep or table, before it is started.

    Attributes:
      name: name of the run's folder, derived from its values.
      subject: name on the page, shared by runs that differ in the seed alone.
      values: the run's own values, by name.
      arguments: arguments of the pretraining command, without the workdir.
      config: all settings.
    """

    name: str
    subject: str
    values: Values = dataclasses.field(compare=False)
    arguments: tuple[str, ...]
    config: ConfigDict = dataclasses.field(compare=False)


def runs_of(request: SweepRequest) -> list[RunSpec]:
    """Expands a request into runs with checked settings; drops duplicates.

    Raises:
      ConfigError: an unknown setting, with the closest known one, or an invalid value.
    """
    find_file("config", request.config.partition(":")[0])
    combined = _combinations(request)
    shown = _short_names(combined[0])
    runs: dict[str, RunSpec] = {}
    for values in combined:
        name = as_folder(",".join(f"{shown[key]}={value}" for key, value in values.items()))
        settings = [f"{shown[key]} {value}" for key, value in values.items() if key != "seed"]
        subject = ", ".join(settings).replace("=", " ") or "all"
        try:
            run = run_of(request.config, values, request.overrides, name=name, subject=subject)
            check_settings(run.config)
            check_warmup(run.config)
        except ConfigError as error:
            if isinstance(error, UnknownSetting) and not values.keys() & ARGUMENTS:
                raise  # whatever the values
            shown_values = ", ".join(f"{key}={value}" for key, value in values.items())
            raise ConfigError(f"run {shown_values}: {error}") from error
        runs.setdefault(run.name, run)
    return list(runs.values())


def run_of(
    config: str, values: Values, overrides: Sequence[str] = (), *, name: str, subject: str
) -> RunSpec:
    """Builds one run and checks its settings.

    Args:
      config: a configuration file with its arguments.
      values: values of settings and of the file's arguments, by name.
      overrides: further settings as `--config.name=value`; `values` take precedence.
      name: name of the run's folder.
      subject: name on the page.

    Raises:
      ConfigError: an unknown setting, with the closest known one, or an invalid value.
    """
    arguments = _arguments(config, overrides, values)
    known = [*ARGUMENTS, *flat_settings(config_of(arguments[0].removeprefix("--config=")))]
    for setting in values:
        check_setting(setting, known)
    chosen = parsed(arguments)
    check_seed("seed", chosen.seed)
    return RunSpec(name, subject, values, arguments, chosen)


def _combinations(request: SweepRequest) -> list[Values]:
    """All combinations of the grid, the zipped values and the draws."""
    texts = {"grid": request.grid, "zip": request.zipped, "random": request.random}
    grid, zipped, drawn = (_listed(flag, text) for flag, text in texts.items())
    names = [*grid, *zipped, *drawn]
    if not names:
        raise ConfigError("a sweep needs --grid, --zip or --random, such as --grid='seed=0,1,2'")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"{name} is given values twice; use one of --grid, --zip and --random"
            )
    lengths = {name: len(values) for name, values in zipped.items()}
    if len(set(lengths.values())) > 1:
        described = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ConfigError(f"zip needs the same number of values for every name; {described}")
    if bool(drawn) != (request.draws > 0):
        raise ConfigError(
            f"draws={request.draws} does not go with random={request.random!r}; give both"
        )
    products = [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
    points = zip(*zipped.values(), strict=True)
    pairings = [dict(zip(zipped, point, strict=True)) for point in points]
    draws = _draws(drawn, request.draws, request.draw_seed)
    return [
        {**draw, **pairing, **product}
        for draw, pairing, product in itertools.product(draws or [{}], pairings or [{}], products)
    ]


def _listed(flag: str, text: str) -> dict[str, list[str]]:
    """Parses `name=value,value;name=…` into values by name."""
    listed: dict[str, list[str]] = {}
    for item in filter(None, _split(flag, text, ";")):
        name, separator, values = item.partition("=")
        name = name.strip()
        if not separator or not name:
            raise ConfigError(f"{flag}: {item!r} is not name=value,value")
        if name in listed:
            raise ConfigError(f"{flag}: {name} is given values twice")
        listed[name] = [_unquoted(value.strip()) for value in _split(flag, values, ",")]
        if "" in listed[name] or len(set(listed[name])) < len(listed[name]):
            raise ConfigError(f"{flag}: {item!r} has an empty value or the same one twice")
    return listed


def _unquoted(value: str) -> str:
    """A value without the quotes around all of it, which keep its commas together."""
    match = re.fullmatch(r"""(['"])((?:(?!\1).)*)\1""", value, re.DOTALL)
    return match[2] if match else value


def _split(flag: str, text: str, separator: str) -> list[str]:
    """Splits a text at the separators outside brackets and quotes."""
    parts, closing, quote = [""], [], ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _PAIRS:
            closing.append(_PAIRS[character])
        elif closing and character == closing[-1]:
            closing.pop()
        elif character == separator and not closing:
            parts.append("")
            continue
        parts[-1] += character
    if closing or quote:
        raise ConfigError(f"{flag}: {text!r} does not close its {quote or closing[-1]}")
    return parts


def _draws(listed: Mapping[str, Sequence[str]], count: int, seed: int) -> list[Values]:
    check_at_least("draws", count, 0, LONGEST)
    check_seed("draw_seed", seed)
    generator = np.random.default_rng(seed)
    return [
        {name: _drawn(generator, name, values) for name, values in listed.items()}
        for _ in range(count)
    ]


def _drawn(generator: np.random.Generator, name: str, values: Sequence[str]) -> str:
    match = _RANGE.fullmatch(values[0]) if len(values) == 1 else None
    if not match:
        return values[generator.integers(len(values))]
    kind, *ends = match.groups()
    try:
        low, high = map(float, ends)
    except ValueError:
        low = high = math.nan
    if not (low < high < math.inf) or (kind == "log" and low <= 0):
        raise ConfigError(
            f"random: {name}={values[0]} is not a range; use uniform(low,high), or log(low,high) "
            "above 0"
        )
    whole = all(re.fullmatch(r"\s*[+-]?\d{1,18}\s*", end) for end in ends)  # in 64 bits
    if whole and kind == "uniform":
        return str(generator.integers(int(low), int(high), endpoint=True))
    share = generator.random()
    value = low + share * (high - low) if kind == "uniform" else low * (high / low) ** share
    return str(round(value)) if whole else f"{value:.4g}"


def _arguments(config: str, overrides: Sequence[str], values: Values) -> tuple[str, ...]:
    """The arguments of the pretraining command; the first is the file with its arguments."""
    path, _, chosen = config.partition(":")
    own = [chosen] if chosen else []
    own += [f"{name}={value}" for name, value in values.items() if name in ARGUMENTS]
    settings = [
        f"--config.{name}={value}" for name, value in values.items() if name not in ARGUMENTS
    ]
    file = Path(find_file("config", path)).resolve()
    chosen = f":{','.join(own)}" if own else ""
    return (f"--config={file}{chosen}", *overrides, *settings)


def parsed(arguments: Sequence[str]) -> ConfigDict:
    """Parses arguments into the configuration that the pretraining command would use.

    Raises:
      ConfigError: an argument is invalid.
    """
    known, words = flags.FlagValues(), ["sweep", *arguments]
    flag = config_flags.DEFINE_config_file(
        "config", flag_values=known, sys_argv=words, **FLAG_OPTIONS
    )
    try:
        known(words)
        _ = flag.value.seed  # a missing file fails at its first use only
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        raise ConfigError(re.sub(r"^[\w.]+Error: ", "", lines[-1].strip())) from error
    return flag.value


def _short_names(values: Values) -> dict[str, str]:
    """The last part of every dotted name where it is unique, else the whole name."""
    last = {name: name.rpartition(".")[2] for name in values}
    return {name: name if [*last.values()].count(part) > 1 else part for name, part in last.items()}


def as_folder(name: str) -> str:
    """A valid folder name; a changed or shortened name ends in a hash that keeps it unique."""
    plain = re.sub(r"[^\w.,=+-]", "_", name)
    if plain == name and len(name) <= _LONGEST_NAME:
        return name
    return f"{plain[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
