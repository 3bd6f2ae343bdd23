"""EquiMod: a head predicts where an augmentation moves the embedding of an unaugmented image."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from cassle_jax import augment
from cassle_jax.checks import WIDEST, check_at_least, check_positive
from cassle_jax.methods import losses
from cassle_jax.methods.auxiliary import Auxiliary, Head, check_omega, omega_of
from cassle_jax.models import MLP, ConditionedProjector


@dataclasses.dataclass(frozen=True)
class EquiMod(Auxiliary):
    """EquiMod (Devillers and Lefort, 2022, section 3): loss = base + weight · NT-Xent(z', ẑ').

    z' is a second projector's embedding of a view; a predictor makes ẑ' of z'₀ and of the view's ω.
    z'₀ embeds the image as evaluation sees it, `center_view`: the short side is resized to
    `augment.size` (bicubic), the centre cropped. It shares the encoder's batch with views 0 and 1.

    Attributes:
      weight: weight of the loss, 1 in the paper; 0 for no EquiMod.
      descriptors: names of the descriptors that make up ω.
      temperature: temperature of the softmax over similarities.
      hidden, out: widths of the projector's hidden layers, and of z' and the embedded ω.
      stage: the stage of the encoder whose features the projector sees; 0 for the last one.
    """

    name: ClassVar = "equimod"
    title: ClassVar = "EquiMod"
    further: ClassVar = 1

    weight: float = 0.0
    descriptors: Sequence[str] = ("blur", "color", "crop", "flip", "grayscale")
    temperature: float = 0.2
    hidden: int = 2048
    out: int = 128
    stage: int = 0

    def __post_init__(self):
        check_at_least("equimod.weight", self.weight, 0)
        check_positive("equimod.temperature", self.temperature)
        check_at_least("equimod.hidden", self.hidden, 1, WIDEST)
        check_at_least("equimod.out", self.out, 1, WIDEST)
        check_omega(self.name, self.descriptors)

    @property
    @override
    def weights(self):
        return {"prediction": self.weight} if self.weight else {}

    @override
    def images(self, key, canvases, spec):
        centre = jax.vmap(partial(augment.center_view, spec=spec))
        return (centre(canvases.images, canvases.sizes),)

    @override
    def targets(self, views, specs):
        pair = zip(views[:2], specs[:2], strict=True)
        return tuple(omega_of(*each, self.descriptors) for each in pair)

    @override
    def passes(self, online, own):
        of_pair = [each for each in online if 0 in each or 1 in each]
        return (sum(of_pair, ()) + own, *(each for each in online if each not in of_pair))

    @override
    def heads(self, feature_width, **settings):
        settings.update(hidden=self.hidden, out=self.out, last_bn=True, last_bn_affine=False)
        conditioned = partial(ConditionedProjector, condition_depth=1, condition_width=self.out)
        widths = self.out, augment.descriptor_width(self.descriptors)
        return {
            "equimod_projector": Head(partial(MLP, depth=3, **settings), (feature_width,)),
            "equimod_predictor": Head(partial(conditioned, depth=1, **settings), widths),
        }

    @override
    def losses(self, networks, features, own, axis_name):
        """NT-Xent on the views that the trained encoder sees, negatives from all devices.

        `cosine` is the mean cosine of z' and ẑ'; `gain` is `cosine` minus that of z' and z'₀.
        """
        seen = [view for view in (0, 1) if view in features.online]
        rows = jnp.concatenate([features.online[view] for view in (*own, *seen)])
        plain, *views = jnp.split(networks.equimod_projector(rows, True), 1 + len(seen))
        plain, views = (jnp.concatenate(each) for each in ([plain] * len(seen), views))
        omega = jnp.concatenate([features.targets[self.name][view] for view in seen])
        predicted = networks.equimod_predictor(plain, omega, True)
        loss = losses.nt_xent(views, predicted, temperature=self.temperature, axis_name=axis_name)
        cosine = optax.cosine_similarity(views, predicted, epsilon=1e-12)
        gain = cosine - optax.cosine_similarity(views, plain, epsilon=1e-12)
        return {"prediction": loss}, {"cosine": cosine.mean(), "gain": gain.mean()}
