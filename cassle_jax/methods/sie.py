"""SIE: half of the features is invariant, the other half moves with ω as a head predicts."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax.numpy as jnp
from typing_extensions import override

from cassle_jax import augment
from cassle_jax.checks import WIDEST, check_at_least
from cassle_jax.methods import losses
from cassle_jax.methods.auxiliary import Auxiliary, Head, check_omega, omega_of
from cassle_jax.models import MLP, Bilinear


@dataclasses.dataclass(frozen=True)
class SIE(Auxiliary):
    """SIE (Garrido, Najman and LeCun, 2023, section 4): the loss of the equivariant half.

    The method, VICReg in the paper, sees the first half of the features. A second projector makes z
    of the last half; a linear hypernetwork predicts a view's z from the other's and relative ω.

    Attributes:
      weight: factor of the three weights, 1 in the paper; 0 for no SIE.
      descriptors: names of the descriptors that make up ω.
      equivariance_weight: weight of the squared error of the prediction.
      variance_weight: weight of VICReg's variance term, of z and of the prediction.
      covariance_weight: weight of VICReg's covariance term, of z and with the method's projection.
      hidden, out: widths of the projector's hidden layers, and of z.
    """

    name: ClassVar = "sie"
    title: ClassVar = "SIE"
    recipes: ClassVar = {
        "vicreg": {  # the paper's 10, 10 and 1 weigh means over the units of both halves
            "method.invariance_weight": 10.0,
            "method.variance_weight": 5.0,
            "method.covariance_weight": 0.5,
            "method.projector_hidden": 1024,
            "method.projector_out": 1024,
        }
    }

    weight: float = 0.0
    descriptors: Sequence[str] = ("blur", "color", "crop", "flip", "grayscale")
    equivariance_weight: float = 4.5
    variance_weight: float = 5.0
    covariance_weight: float = 0.5
    hidden: int = 1024
    out: int = 1024

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "descriptors":
                least = 1 if name in ("hidden", "out") else 0
                check_at_least(f"sie.{name}", value, least, WIDEST)
        check_omega(self.name, self.descriptors)

    @property
    @override
    def weights(self):
        terms = ("equivariance", "variance", "covariance") if self.weight else ()
        return {name: self.weight * getattr(self, f"{name}_weight") for name in terms}

    @override
    def targets(self, views, specs):
        return omega_of(views[1], specs[1], self.descriptors, views[0])

    @override
    def reserved(self, feature_width):
        return feature_width // 2

    @override
    def heads(self, feature_width, **settings):
        projector = partial(MLP, self.hidden, self.out, depth=3, last_bias=False, **settings)
        widths = self.out, 1 + augment.descriptor_width(self.descriptors)
        return {
            "sie_projector": Head(projector, (self.reserved(feature_width),)),
            "sie_predictor": Head(partial(Bilinear, self.out, settings["dtype"]), widths),
        }

    @override
    def losses(self, networks, features, own, axis_name):
        """`gain` is the views' mean squared difference minus the prediction's error."""
        half = self.reserved(features.pair[0].shape[1])
        pair = first, second = [networks.sie_projector(y[:, -half:], True) for y in features.pair]
        omega = jnp.pad(features.targets[self.name], ((0, 0), (1, 0)), constant_values=1)
        predicted = networks.sie_predictor(first, omega, True)
        error = jnp.square(predicted - second).mean()
        variance, difference, covariance = losses.variance_invariance_covariance(*pair, axis_name)
        variance += losses.variance_shortfall(predicted, axis_name)
        for each in zip(pair, features.projections, strict=True):
            covariance += 2 * losses.cross_covariance(*each, axis_name) / self.out
        terms = {"equivariance": error, "variance": variance, "covariance": covariance}
        return terms, {"gain": difference - error}
