"""STL: a head predicts a view from the other one, by a code learnt from another image's views."""

import dataclasses
from functools import partial
from typing import ClassVar

import jax.numpy as jnp
import optax
from typing_extensions import override

from cassle_jax.checks import WIDEST, ConfigError, check_at_least, check_positive
from cassle_jax.methods import losses
from cassle_jax.methods.auxiliary import Auxiliary, Head
from cassle_jax.models import MLP, Bilinear


@dataclasses.dataclass(frozen=True)
class STL(Auxiliary):
    """STL (Yu et al., 2024, section 3): loss = base + weight · (equivariance + λ transformation).

    Images 2i and 2i + 1 of a batch share crop, jitter and grayscale. A network makes a code of an
    image's two views. A linear hypernetwork predicts a view's features from the other view's and
    the partner's code. NT-Xent contrasts the embeddings of views with those of the predictions
    (equivariance), and those of partners' codes (transformation).

    Attributes:
      weight: weight of the loss, 1 in the paper; 0 for no STL.
      transformation_weight: λ.
      temperature: temperature of the softmax over similarities.
      hidden, out: widths of the projector's hidden layer, 0 for the features', and of its result.
      code: width of the code, of its embedding, and of the hidden layers before them.
    """

    name: ClassVar = "stl"
    title: ClassVar = "STL"
    paired: ClassVar = True

    weight: float = 0.0
    transformation_weight: float = 0.1
    temperature: float = 0.2
    hidden: int = 0
    out: int = 128
    code: int = 128

    def __post_init__(self):
        least = {"weight": 0, "transformation_weight": 0, "hidden": 0, "out": 1, "code": 1}
        for name, value in least.items():
            check_at_least(f"stl.{name}", getattr(self, name), value, WIDEST)
        check_positive("stl.temperature", self.temperature)

    @override
    def check(self, global_batch, local_batch):
        if local_batch % 2:
            raise ConfigError(
                f"batch_size={global_batch} leaves {local_batch} images to a device, which stl "
                f"cannot pair; {global_batch + global_batch // local_batch} would work"
            )

    @property
    @override
    def weights(self):
        weights = {"equivariance": 1.0, "transformation": self.transformation_weight}
        return {name: self.weight * each for name, each in weights.items() if self.weight}

    @override
    def heads(self, feature_width, **settings):
        mlp = partial(MLP, depth=2, last_bias=False, **settings)
        code = partial(mlp, self.code, self.code)
        projector = partial(mlp, self.hidden or feature_width, self.out)
        predictor = partial(Bilinear, feature_width, settings["dtype"])
        return {
            "stl_code": Head(code, (2 * feature_width,)),
            "stl_code_projector": Head(code, (self.code,)),
            "stl_predictor": Head(predictor, (feature_width, self.code)),
            "stl_projector": Head(projector, (feature_width,)),
        }

    @override
    def losses(self, networks, features, own, axis_name):
        """`cosine` is that of z and its prediction; `gain` is `cosine` minus that of the views."""
        first, second = pair = features.pair
        orders = pair, pair[::-1]
        forward, backward = (networks.stl_code(jnp.hstack(views), True) for views in orders)
        partner = jnp.arange(len(first)) ^ 1
        predicted = (
            networks.stl_predictor(second, backward[partner], True),
            networks.stl_predictor(first, forward[partner], True),
        )
        z, of_predicted = (
            jnp.concatenate([networks.stl_projector(rows, True) for rows in views])
            for views in (pair, predicted)
        )
        codes = (jnp.concatenate([forward[row::2], backward[row::2]]) for row in (0, 1))
        codes = (networks.stl_code_projector(each, True) for each in codes)
        contrast = partial(losses.nt_xent, temperature=self.temperature, axis_name=axis_name)
        terms = {"equivariance": contrast(z, of_predicted), "transformation": contrast(*codes)}
        cosine = optax.cosine_similarity(z, of_predicted, epsilon=1e-12).mean()
        without = optax.cosine_similarity(*jnp.split(z, 2), epsilon=1e-12).mean()
        return terms, {"cosine": cosine, "gain": cosine - without}
