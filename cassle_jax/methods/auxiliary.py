"""Defines an auxiliary objective: its views, its heads, and the losses that it adds."""

import dataclasses
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from cassle_jax.augment import (
    AugmentSpec,
    View,
    check_descriptors,
    concatenate,
    describe,
    difference,
)
from cassle_jax.checks import ConfigError, check_one_of
from cassle_jax.methods.base import Networks, Passes, PyTree, Scalars


class Canvases(NamedTuple):
    """Images of a step before they are augmented.

    Attributes:
      images: canvases, the picture at the top left.
      sizes: true height and width per picture, in pixels.
      positions: positions of the images in the global batch.
    """

    images: UInt8[Array, "B H W 3"]
    sizes: Int[Array, "B 2"]
    positions: Int[Array, " B"]


class Features(NamedTuple):
    """The encoded views of a step, without their images.

    Attributes:
      online: the trained encoder's features, by index of the view.
      target: the momentum encoder's features, by index of the view.
      descriptors: ω of every view.
      targets: as in `TrainingViews`.
      projections: the method's embeddings of the first two views; the second one's of the momentum
        networks if only those exist.
      earlier: `online` and `target` of the earlier stages that are needed, by stage.
    """

    online: dict[int, Float[Array, "B F"]]
    target: dict[int, Float[Array, "B F"]]
    descriptors: tuple[Float[Array, "B D"], ...]
    targets: dict[str, PyTree]
    projections: tuple[Float[Array, "B D"], ...] = ()
    earlier: dict[int, tuple[dict[int, Float[Array, "B _"]], ...]] = {}  # noqa: RUF012

    def at(self, stage: int) -> "Features":
        """The same views with the features of an earlier stage; 0 for the last one."""
        if stage not in self.earlier:
            return self
        online, target = self.earlier[stage]
        return self._replace(online=online, target=target)

    @property
    def pair(self) -> tuple[Float[Array, "B F"], Float[Array, "B F"]]:
        """The first two views; the second one's momentum features if only those exist."""
        return self.online[0], self.online[1] if 1 in self.online else self.target[1]


@dataclasses.dataclass(frozen=True)
class Head:
    """A factory of one head.

    Attributes:
      build: builds the module, which is called with its inputs and `train`.
      widths: width per input.
    """

    build: Callable[[], nn.Module]
    widths: tuple[int, ...]

    def __call__(self) -> nn.Module:
        """The module."""
        return self.build()


class Auxiliary:
    """An objective on the method's encoder, added to its loss; its fields are its settings.

    A new one is a subclass in its own file and a line in `AUXILIARIES`.

    Attributes:
      name: name of its config argument and of its group of settings; prefix of its heads' names
        and of its log entries.
      title: its name on pages and in model cards.
      named: settings by value of the config argument, which may also be a weight.
      recipes: settings of other groups that a configuration with the objective starts from, by the
        method; those of the paper's experiment.
      further: number of views that it adds to the method's.
      paired: whether images 2i and 2i + 1 of the batch need views of the same crop and colours.
      weights: weights of its losses, by name; empty where it is switched off.
      descriptors: the descriptors that it needs drawn.
      stage: the stage of the encoder whose features it sees; 0 for the last one, the encoder's own.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    named: ClassVar[Mapping[str, Mapping[str, Any]]] = {"none": {}, "main": {"weight": 1.0}}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    further: ClassVar[int] = 0
    paired: ClassVar[bool] = False
    weights: Mapping[str, float]
    descriptors: Sequence[str] = ()
    stage: int = 0

    @classmethod
    def settings(cls, argument: str = "none") -> dict[str, Any]:
        """The settings that a value of the config argument stands for.

        Raises:
          ConfigError: the value is unknown.
        """
        try:
            chosen = cls.named[argument] if argument in cls.named else {"weight": float(argument)}
        except ValueError:
            raise ConfigError(
                f"{cls.name}={argument!r} is unknown; use a weight, or {', '.join(cls.named)}"
            ) from None
        return {**dataclasses.asdict(cls()), **chosen}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Auxiliary":
        """The objective with a configuration's settings.

        Raises:
          ConfigError: a setting cannot work; the message names it.
        """
        return cls(**settings)

    def check(self, global_batch: int, local_batch: int) -> None:
        """Raises ConfigError, naming the setting, where it cannot work with these batch sizes."""
        del global_batch, local_batch

    def sizes(self, spec: AugmentSpec) -> tuple[int, ...]:
        """Sides of the further views, in pixels, for a run that augments by `spec`."""
        return (spec.size,) * self.further

    def images(
        self, key: PRNGKeyArray, canvases: Canvases, spec: AugmentSpec
    ) -> tuple[Float[Array, "B _ _ 3"], ...]:
        """The further views; an image's draws depend only on the key and on its position.

        Args:
          key: a random key for these views alone.
          canvases: the images.
          spec: the run's augmentation.
        """
        del key, canvases, spec
        return ()

    def targets(self, views: Sequence[View], specs: Sequence[AugmentSpec]) -> PyTree:
        """Arrays with a leading batch axis that the losses need, from the method's views."""
        del views, specs
        return ()

    def passes(self, online: Passes, own: tuple[int, ...]) -> Passes:
        """The trained encoder's passes with the further views, which by default share one.

        Args:
          online: the passes without them.
          own: their indices.
        """
        return (*online, own) if own else online

    def reserved(self, feature_width: int) -> int:
        """Number of the encoder's last features that the method's heads do not see."""
        del feature_width
        return 0

    def heads(
        self, feature_width: int, *, axis_name: str | None, dtype: DTypeLike
    ) -> dict[str, Head]:
        """The heads, by their names among the networks.

        Args:
          feature_width: width of the features that it sees.
          axis_name: the mapped axis BatchNorm is synchronised over; `None` for one device.
          dtype: dtype of matrix products.
        """
        raise NotImplementedError

    def losses(
        self, networks: Networks, features: Features, own: tuple[int, ...], axis_name: str | None
    ) -> tuple[Scalars, Scalars]:
        """The unweighted losses and the metrics, by name: means over this device's samples.

        They are logged as `loss_<name>_<loss>` and `<name>_<metric>`.

        Args:
          networks: bound networks that have the heads.
          features: the encoded views, at its stage.
          own: indices of the further views.
          axis_name: the devices that share the global batch; `None` for a single one.
        """
        raise NotImplementedError

    def total(self, losses: Scalars) -> Float[Array, ""]:
        """The weighted sum to add to the method's loss."""
        return sum((self.weights[name] * losses[name] for name in losses), jnp.float32(0))


def omega_of(
    view: View, spec: AugmentSpec, descriptors: Sequence[str], other: View | None = None
) -> Float[Array, "B D"]:
    """ω of a batch of views; with `other`, its difference from ω of other views of the images."""
    if other is None:
        values = jax.vmap(partial(describe, spec=spec))(view)
    else:
        values = jax.vmap(partial(difference, spec=spec))(view, other)
    return concatenate(values, descriptors)


def check_omega(name: str, descriptors: Sequence[str]) -> None:
    """Raises ConfigError where an objective has no descriptors, or unknown ones."""
    if not check_descriptors(descriptors, f"{name}."):
        raise ConfigError(f"{name}.descriptors=() leaves no ω; use ('crop',) or more names")


def parsed_weights(setting: str, argument: str, choices: Collection[str]) -> dict[str, float]:
    """Weights by name from `name:weight`, joined by `+`; 0.5 where a name is alone.

    Raises:
      ConfigError: an unknown name, one that comes twice, or a weight that is not a number.
    """
    weights = {}
    for item in argument.split("+"):
        name, _, weight = item.partition(":")
        check_one_of(setting, name, choices)
        if name in weights:
            raise ConfigError(f"{setting}={argument} names {name!r} twice; name each once")
        try:
            weights[name] = float(weight or 0.5)
        except ValueError:
            raise ConfigError(
                f"{setting} weight {item!r} is not a number; use a form such as {name}:0.5"
            ) from None
    return weights


def with_own_views(
    auxiliaries: Sequence[Auxiliary], count: int
) -> list[tuple[Auxiliary, tuple[int, ...]]]:
    """The objectives with the indices of their further views, the last of all `count` views."""
    start, result = count - sum(each.further for each in auxiliaries), []
    for each in auxiliaries:
        result.append((each, tuple(range(start, start + each.further))))
        start += each.further
    return result


def further_images(
    auxiliaries: Sequence[Auxiliary], key: PRNGKeyArray, canvases: Canvases, spec: AugmentSpec
) -> list[Float[Array, "B _ _ 3"]]:
    """The further views of all objectives, drawn from the step's key without changing its draws."""
    return [
        image
        for each in auxiliaries
        for image in each.images(
            jax.random.fold_in(key, zlib.crc32(each.name.encode())), canvases, spec
        )
    ]
