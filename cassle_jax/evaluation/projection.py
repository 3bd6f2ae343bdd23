"""Projects images with their own ω, another image's ω, or none."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from cassle_jax.evaluation.views import Batch, of_all_images
from cassle_jax.methods import Networks, ViewBatch
from cassle_jax.methods.base import PyTree
from cassle_jax.methods.build import Conditioning


def projector_takes_omega(conditioning: Conditioning) -> bool:
    """Whether the projection depends on ω."""
    return bool(conditioning.descriptors) and conditioning.into != "predictor"


def encoder_takes_omega(networks: Networks) -> bool:
    """Whether ω enters the encoder together with the image."""
    return "image_conditioner" in networks.factories


def has_projector(variables: PyTree) -> bool:
    """Whether the variables hold a projector's weights."""
    return "projector" in variables["params"]


def project(
    networks: Networks, variables: PyTree, view: ViewBatch, features: Float[Array, "B F"]
) -> Float[Array, "B D"]:
    """The projection of a view, conditioned on `view.descriptor`.

    Args:
      networks: the run's networks.
      variables: `params` and `batch_stats`.
      view: images and ω.
      features: the images' features; recomputed only where the encoder takes ω too, or where the
        projector sees those of an earlier stage.
    """

    def projection(bound: Networks) -> Float[Array, "B D"]:
        if encoder_takes_omega(bound) or bound.stage:
            return bound.embed(view, train=False, predict=False).projection
        return bound.projector(bound.seen(features), view.descriptor, False)

    return networks.apply(variables, method=projection)


def another_image(key: PRNGKeyArray, index: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Assigns another image to each image: a permutation without fixed points.

    The images form a circle in a random order, and every image gets its successor. So the other
    image depends on the key and on the set of images, not on their order.

    Args:
      key: the random key.
      index: the images' numbers in their dataset, all different.

    Raises:
      ValueError: there are fewer than two images.
    """
    check_two(len(index))
    order = circle(key, index)
    another = np.empty_like(order)
    another[order] = np.roll(order, -1)
    return another


def circle(key: PRNGKeyArray, index: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """The images' rows in a random order, which depends on the key and the set of images alone."""
    of_image = jax.vmap(lambda each: jax.random.bits(jax.random.fold_in(key, each)))
    return np.lexsort((index, np.asarray(of_image(index))))


def with_wrong_omega(
    describe: Callable[[Batch], Float[Array, "B ..."]],
    batches: Callable[[], Iterable[Batch]],
    key: PRNGKeyArray,
    mesh: Mesh,
) -> Iterable[Batch]:
    """Adds another image's ω to every row of the batches as `wrong`; zeros in padding rows.

    Args:
      describe: returns ω of a sharded batch's images, sharded.
      batches: returns the batches; called twice.
      key: the random key of `another_image`.
      mesh: the devices.

    Raises:
      ValueError: there are fewer than two images.
    """
    index, omega = of_all_images(lambda batch: (batch["index"], describe(batch)), batches(), mesh)
    wrong = dict(zip(index.tolist(), omega[another_image(key, index)], strict=True))
    nothing = np.zeros_like(omega[0])
    for batch in batches():
        rows = [wrong.get(image, nothing) for image in batch["index"].tolist()]
        yield {**batch, "wrong": np.stack(rows)}


def check_two(images: int) -> None:
    """Raises ValueError for fewer than two images."""
    if images < 2:
        raise ValueError(f"{images} images are too few to compare; use at least 2")
