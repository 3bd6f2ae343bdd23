"""Builds the networks of a run from encoder, heads, conditioning and auxiliary objectives."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cassle_jax.augment import (
    CASSLE_DESCRIPTORS,
    AugmentSpec,
    View,
    check_descriptors,
    descriptor_width,
    identity_descriptor,
    identity_difference,
)
from cassle_jax.checks import (
    LONGEST,
    WIDEST,
    ConfigError,
    check_at_least,
    check_one_of,
    check_share,
)
from cassle_jax.methods.auxiliary import Auxiliary, omega_of
from cassle_jax.methods.base import PLAIN, HeadShape, Method, Networks
from cassle_jax.models import (
    ConditionedProjector,
    ImageConditioner,
    check_conditioning,
    earlier_stage,
    width_at,
)
from cassle_jax.models.conditioning import is_conditioned

# Folded into a step's key for the draws of `Conditioning.given`; views use small numbers.
_GIVEN = 0x67697665


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """The ω that conditions the projector, and how the projector uses it (CASSLE, section 3).

    Attributes:
      descriptors: names of the descriptors that make up ω, or of components such as `color.hue`;
        empty for the plain method. A treatment or injection of `none` makes it empty.
      relative: whether ω is the view's difference from the other one (from the first, for a third
        view and further) instead of its own augmentation.
      into: the conditioned heads: `projector` (CASSLE), `predictor` or `both`.
      treatment: `mlp` (the paper's choice), `raw`, `hypernetwork` or `none`.
      injection: `concat` (the paper's choice), `add`, `multiply`, `image` or `none`.
      depth: number of layers of the MLP on ω.
      width: width of the MLP's hidden layers.
      hypernetwork_bn: whether the generated projector has BatchNorm between its layers.
      dropout: share of the images whose views are projected without ω, from 0 to below 1. A learnt
        vector then replaces γ(ω).
      start_epoch: epochs before any image is projected with ω.
      ramp_epochs: number of epochs after that over which the share of images with ω rises from 0.
      plain_branch: weight, from 0 to below 1, of the loss of a second projector (and predictor)
        without ω on the same encoder; the loss with ω has the remaining weight. 0 for no such
        branch, as in the paper.
      stage: the stage of the encoder whose features the conditioned heads see, from 1 (of a ViT, a
        block); 0 for the last one, as in the paper. An earlier one needs `plain_branch`, whose
        heads see the last one.
    """

    descriptors: Sequence[str] = CASSLE_DESCRIPTORS
    relative: bool = False
    into: str = "projector"
    treatment: str = "mlp"
    injection: str = "concat"
    depth: int = 6
    width: int = 64
    hypernetwork_bn: bool = False
    dropout: float = 0.0
    start_epoch: float = 0.0
    ramp_epochs: float = 0.0
    plain_branch: float = 0.0
    stage: int = 0

    def __post_init__(self):
        check_at_least("conditioning.depth", self.depth, 1, LONGEST)
        check_at_least("conditioning.width", self.width, 1, WIDEST)
        check_at_least("conditioning.start_epoch", self.start_epoch, 0)
        check_at_least("conditioning.ramp_epochs", self.ramp_epochs, 0)
        check_share("conditioning.dropout", self.dropout, 0.0)
        check_share("conditioning.plain_branch", self.plain_branch, 0.5)
        check_one_of("conditioning.into", self.into, ("projector", "predictor", "both"))
        used = is_conditioned(self.treatment, self.injection)
        names = self.descriptors if isinstance(self.descriptors, str) else (*self.descriptors,)
        # JSON turns tuples into lists.
        object.__setattr__(self, "descriptors", names if used else ())
        check_descriptors(self.descriptors, "conditioning.")
        self._check_options()

    def _check_options(self) -> None:
        """Refuses options that would have no effect, or that the treatment excludes."""
        options = ("dropout", "start_epoch", "ramp_epochs", "plain_branch", "stage")
        for name in (each for each in options if getattr(self, each) > 0):
            setting = f"conditioning.{name}={getattr(self, name):g}"
            if not self.descriptors:
                raise ConfigError(
                    f"{setting} does nothing without descriptors; name some in "
                    "conditioning.descriptors, or use 0"
                )
            if name not in ("plain_branch", "stage") and self.treatment == "hypernetwork":
                raise ConfigError(
                    f"{setting} needs a projector that works without ω, which a hypernetwork "
                    "does not make; use conditioning.treatment='mlp'"
                )
            if name == "plain_branch" and self.injection == "image":
                raise ConfigError(
                    f"{setting} needs an encoder without ω; use conditioning.injection='concat'"
                )

    @property
    def optional(self) -> bool:
        """Whether some images are projected without ω, see `given`."""
        return self.dropout > 0 or self.start_epoch > 0 or self.ramp_epochs > 0

    @property
    def size(self) -> int:
        """Width of ω, with the flag `given` where it is optional; 0 for the plain method."""
        return descriptor_width(self.descriptors) + self.optional

    @property
    def neutral(self) -> Float[Array, " D"]:
        """ω of an unaugmented image."""
        if not self.descriptors:
            return jnp.zeros(0, jnp.float32)
        identity = (identity_difference if self.relative else identity_descriptor)(self.descriptors)
        return jnp.append(identity, 1.0) if self.optional else identity

    def given(
        self, key: PRNGKeyArray, positions: Int[Array, " B"], epoch: float | Float[Array, ""]
    ) -> Bool[Array, " B"]:
        """Draws the images whose views are projected with ω in a step.

        Args:
          key: the step's random key.
          positions: positions of the images in the global batch; each draw depends only on its own.
          epoch: epochs passed before the step.
        """
        if not self.optional:
            return jnp.ones(len(positions), bool)
        since = epoch - self.start_epoch
        ramp = jnp.clip(since / self.ramp_epochs, 0, 1) if self.ramp_epochs else since >= 0
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, _GIVEN)))(positions)
        uniform = jax.vmap(lambda own: jax.random.uniform(own, dtype=jnp.float32))
        return uniform(keys) < (1 - self.dropout) * ramp

    def describe(
        self,
        views: Sequence[View],
        specs: Sequence[AugmentSpec],
        given: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B D"], ...]:
        """ω of every view, with a leading batch axis.

        Args:
          views: views of the same images, with a leading batch axis.
          specs: the augmentation per view.
          given: which images are projected with ω; `None` for all. Where ω is optional, this is
            its last column.
        """
        if not self.descriptors:
            return tuple(jnp.zeros((len(view.image), 0), jnp.float32) for view in views)
        others = [None] * len(views)
        if self.relative:
            others = [views[1], *[views[0]] * (len(views) - 1)]
        omegas = tuple(
            omega_of(view, spec, self.descriptors, other)
            for view, spec, other in zip(views, specs, others, strict=True)
        )
        if not self.optional:
            return omegas
        if given is None:
            given = jnp.ones(len(omegas[0]), bool)
        flag = given[:, None].astype(omegas[0].dtype)
        return tuple(jnp.concatenate([omega, flag], axis=1) for omega in omegas)


def build_networks(
    method: Method,
    encoder: Callable[[], nn.Module],
    feature_width: int,
    conditioning: Conditioning,
    auxiliaries: Sequence[Auxiliary] = (),
    *,
    dtype: DTypeLike = jnp.float32,
    axis_name: str | None = None,
) -> Networks:
    """Builds the networks of a run.

    Args:
      method: provides the heads.
      encoder: builds the encoder.
      feature_width: width of the encoder's features, its own `feature_width` where it has one.
      conditioning: conditioning of the projector.
      auxiliaries: the auxiliary objectives, for their heads.
      dtype: dtype of convolutions and matrix products.
      axis_name: the mapped axis BatchNorm is synchronised over; `None` for one device.

    Raises:
      ConfigError: a conditioning or the width cannot work; the message names the setting.
    """
    made = encoder()
    check_at_least("feature_width", feature_width, 1, WIDEST)
    if (own := getattr(made, "feature_width", feature_width)) != feature_width:
        raise ConfigError(f"feature_width={feature_width} is not the encoder's; use {own}")
    reserved = sum(each.reserved(feature_width) for each in auxiliaries)
    stage = _conditioned_stage(conditioning, made, reserved)
    stages = [earlier_stage(made, each.stage, f"{each.name}.stage") for each in auxiliaries]
    widths = {each: width_at(made, each) for each in {stage, *stages} - {0}} | {0: feature_width}
    placed = {"axis_name": axis_name, "dtype": dtype}
    factories = {"encoder": encoder}
    factories |= _branch("", method, conditioning, widths[stage] - reserved, placed)
    if conditioning.plain_branch:
        factories |= _branch(PLAIN, method, conditioning, feature_width - reserved, placed)
    if conditioning.injection == "image" and conditioning.descriptors:
        _check_passes(method, auxiliaries)
        gamma = _gamma(conditioning)
        factories["image_conditioner"] = partial(ImageConditioner, **gamma, **placed)
    for each, its_stage in zip(auxiliaries, stages, strict=True):
        factories |= each.heads(widths[its_stage], **placed)
    return Networks(factories, reserved, stage, tuple(sorted(widths.keys() - {0})))


def _branch(
    branch: str, method: Method, conditioning: Conditioning, width: int, placed: dict
) -> dict[str, Callable[[], nn.Module]]:
    """A branch's projector and, where the method has one, predictor on features of a width."""
    projector, predictor = method.projector(width), method.predictor(width)
    names = _conditioned_heads(method, conditioning, predictor) if branch != PLAIN else ()
    for name in names:
        check_conditioning(
            conditioning.treatment,
            conditioning.injection,
            descriptor_width=descriptor_width(conditioning.descriptors),
            feature_width=width if name == "projector" else projector.out,
        )
    heads = {}
    for name, shape in (("projector", projector), ("predictor", predictor)):
        if isinstance(shape, HeadShape):
            head = _head(shape, conditioning, conditioned=name in names)
            heads[branch + name] = partial(head, **placed)
        elif shape is not None:
            heads[branch + name] = shape
    return heads


def _conditioned_stage(conditioning: Conditioning, encoder: nn.Module, reserved: int) -> int:
    """The earlier stage that conditioned heads see; 0 for the last one."""
    setting = "conditioning.stage"
    stage = earlier_stage(encoder, conditioning.stage, setting)
    if stage and not conditioning.plain_branch:
        raise ConfigError(
            f"{setting}={stage} leaves the stages behind it without a loss; use "
            "conditioning.plain_branch=0.5 as well"
        )
    if stage and reserved:
        raise ConfigError(
            f"{setting}={stage} cannot go with sie, which keeps half of the last stage's features "
            "from all heads; use conditioning.stage=0"
        )
    return stage


def _conditioned_heads(
    method: Method, conditioning: Conditioning, predictor: object
) -> tuple[str, ...]:
    """The names of the heads that receive ω."""
    if not conditioning.descriptors:
        return ()
    if conditioning.into != "projector" and not isinstance(predictor, HeadShape):
        raise ConfigError(
            f"conditioning.into={conditioning.into!r} needs a predictor, which "
            f"{type(method).__name__} lacks; use conditioning.into='projector'"
        )
    if conditioning.into != "projector" and conditioning.injection == "image":
        raise ConfigError(
            f"conditioning.injection='image' reaches every head and cannot go with "
            f"conditioning.into={conditioning.into!r}; use conditioning.into='projector'"
        )
    return ("projector", "predictor") if conditioning.into == "both" else (conditioning.into,)


def _check_passes(method: Method, auxiliaries: Sequence[Auxiliary]) -> None:
    """Refuses passes whose views all have the same ω, which the image conditioner normalises."""
    for each in auxiliaries:
        own = tuple(range(-each.further, 0))
        if own and own in each.passes(method.online_passes, own):
            raise ConfigError(
                f"conditioning.injection='image' cannot go with {each.name}, whose views pass the "
                "encoder by themselves and have no ω; use conditioning.injection='concat'"
            )


def _gamma(conditioning: Conditioning) -> dict[str, object]:
    """The settings of γ, which every conditioned module takes."""
    return {
        "treatment": conditioning.treatment,
        "condition_depth": conditioning.depth,
        "condition_width": conditioning.width,
        "optional": conditioning.optional,
    }


def _head(shape: HeadShape, conditioning: Conditioning, *, conditioned: bool) -> partial:
    """A projector or predictor of a shape, with the conditioning or without any."""
    settings = _gamma(conditioning) | {"injection": conditioning.injection}
    settings |= {} if conditioned else {"treatment": "none", "injection": "none"}
    settings |= {"hypernetwork_bn": conditioning.hypernetwork_bn}
    return partial(ConditionedProjector, **dataclasses.asdict(shape), **settings)
