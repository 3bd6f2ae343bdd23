"""Records a run's method, so that evaluation needs neither its code nor today's settings."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, get_type_hints

from ml_collections import ConfigDict

from cassle_jax.augment import AugmentSpec
from cassle_jax.config import OPEN, base_config
from cassle_jax.methods import METHODS, HeadShape, Method
from cassle_jax.models import width_at
from cassle_jax.training.run import Run, build_method

LOG = logging.getLogger(__name__)

UNKNOWN = HeadShape(hidden=1, out=1, depth=1)
HEADS = ("projector", "predictor")


@dataclasses.dataclass(frozen=True)
class RecordedMethod(Method):
    """The parts of a run's method that evaluation needs.

    Attributes:
      heads: head shapes by name; a missing head is not evaluated.
      specs: augmentation of the first two views; empty where it is not recorded.
    """

    heads: Mapping[str, HeadShape] = dataclasses.field(default_factory=dict)
    specs: tuple[AugmentSpec, ...] = ()

    def projector(self, feature_width: int) -> HeadShape:
        """The recorded shape."""
        del feature_width
        return self.heads.get("projector", UNKNOWN)

    def predictor(self, feature_width: int) -> HeadShape | None:
        """The recorded shape; `None` without such a head."""
        del feature_width
        return self.heads.get("predictor") if self.heads else UNKNOWN

    def views(self, first: AugmentSpec, second: AugmentSpec) -> tuple[AugmentSpec, ...]:
        """The recorded augmentations, or those of the settings."""
        return self.specs or (first, second)

    @property
    def missing(self) -> tuple[str, ...]:
        """The heads of unknown shape."""
        return tuple(name for name in HEADS if name not in self.heads)


def record_of(run: Run) -> dict[str, Any]:
    """`heads`, the shapes of the heads that are MLPs, and `views`, the first two augmentations."""
    encoder, networks = run.networks.factories["encoder"](), run.networks
    width = width_at(encoder, networks.stage) - networks.reserved
    heads = {"projector": run.method.projector(width), "predictor": run.method.predictor(width)}
    shapes = {name: head for name, head in heads.items() if isinstance(head, HeadShape)}
    return {
        "heads": {name: dataclasses.asdict(shape) for name, shape in shapes.items()},
        "views": [dataclasses.asdict(spec) for spec in run.views[:2]],
    }


def method_of(config: ConfigDict, record: Mapping[str, Any]) -> Method:
    """The method of an existing run: the recorded one, or the one that its settings name.

    Args:
      config: the run's configuration, as from `todays_settings`.
      record: includes what `record_of` returned; older runs have none.

    Raises:
      ValueError: the settings or the record cannot work.
    """
    if "heads" in record:
        try:
            heads = {name: _head_of(fields) for name, fields in record["heads"].items()}
            return RecordedMethod(heads, tuple(_of(AugmentSpec, each) for each in record["views"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its record of heads and views is damaged: {error}") from error
    if config.method.name in METHODS:
        return build_method(config)
    LOG.warning(
        "method.name=%r is not among the methods here, and its run recorded no heads: they are "
        "left out, and the encoder is evaluated alone",
        config.method.name,
    )
    return RecordedMethod()


def with_defaults(config: ConfigDict) -> ConfigDict:
    """A run's settings, completed by the defaults of those that did not exist at its start.

    Raises:
      ValueError: there is no method, or a setting is of another kind than its default.
    """
    return ConfigDict(_merged(_defaults(config), config.to_dict()))


def todays_settings(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """A run's settings, completed and without unknown ones; and the names of these.

    Raises:
      ValueError: there is no method, or a setting is of another kind than its default.
    """
    defaults = _defaults(config)
    gone: list[str] = []
    kept = _known(_merged(defaults, config.to_dict()), defaults, "", gone)
    return ConfigDict(kept), gone


def _defaults(config: ConfigDict) -> dict[str, Any]:
    """Today's defaults; a method that is unknown here keeps its settings."""
    method = config.get("method")
    name = method.get("name") if isinstance(method, ConfigDict) else None
    if not isinstance(name, str):
        raise ValueError("its settings are damaged: method has no name")
    defaults = base_config(f"method={name}" if name in METHODS else "").to_dict()
    return defaults if name in METHODS else {**defaults, "method": config.method.to_dict()}


def _merged(
    defaults: Mapping[str, Any], values: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """The values, completed by the defaults; raises ValueError where one is of another kind."""
    merged = {**defaults, **values}
    for name in defaults.keys() & values.keys():
        value, default = values[name], defaults[name]
        if not _alike(value, default):
            raise ValueError(
                f"its setting {prefix}{name}={value!r} is damaged; one such as {default!r} works"
            )
        if isinstance(default, dict):
            merged[name] = _merged(default, value, f"{prefix}{name}.")
    return merged


def _alike(value: Any, default: Any) -> bool:
    """Whether a value from JSON is of the kind of a default; whole numbers may stand for others."""
    kinds = {float: (float, int), list: (list, tuple), tuple: (list, tuple)}
    kind = kinds.get(type(default), type(default))
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _known(
    values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str, gone: list[str]
) -> dict[str, Any]:
    if prefix == OPEN:
        return dict(values)
    gone += [f"{prefix}{name}" for name in values if name not in defaults]
    return {
        name: _known(values[name], default, f"{prefix}{name}.", gone)
        if isinstance(default, dict)
        else values[name]
        for name, default in defaults.items()
    }


def _head_of(fields: Mapping[str, Any]) -> HeadShape:
    """The recorded shape of a head; raises ValueError where a field cannot be."""
    for name, kind in get_type_hints(HeadShape).items():
        value = fields.get(name, kind(1))
        least = 0 if name == "hidden" else 1  # a head of one layer has no hidden one
        if type(value) is not kind or (kind is int and value < least):
            raise ValueError(f"{name}={value!r} is in no head")
    return _of(HeadShape, fields)


def _of(kind: type, fields: Mapping[str, Any]) -> Any:
    """A dataclass from the recorded fields that it still has."""
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in fields.items() if name in known})
