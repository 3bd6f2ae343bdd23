"""Measures how well ω alone, without the image, solves a contrastive objective.

A descriptor that is computed from the image may give the image away. Then the ω of an image's two
views match each other, whatever the encoder computes.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from cassle_jax.augment import AugmentSpec, apply, draw
from cassle_jax.augment.resample import crop_and_resize
from cassle_jax.checks import check_at_least, check_positive
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Chart, Finding, Score, half_interval
from cassle_jax.evaluation.needs import Needs
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Analysis
from cassle_jax.evaluation.views import Batch, of_all_images, protocol_key
from cassle_jax.methods.build import Conditioning
from cassle_jax.methods.losses import nt_xent
from cassle_jax.models import MLP
from cassle_jax.parallel import SHARDED, parallel

LOG = logging.getLogger(__name__)

BATCH, TEMPERATURE = 128, 0.2

# Descriptors of the image are computed from its means, which hardly depend on its size.
_PICTURE, _VIEW = 32, 16
_LEARNING_RATE = 3e-3
# Candidate shares of the embeddings in their mixture with a constant; 0 makes them all equal.
_SHARES = np.linspace(0, 1, 17) ** 2
_DRAWS = 8  # views per held-out image
FEWEST_IMAGES = 8  # two held-out batches of two


@dataclasses.dataclass(frozen=True)
class Leak:
    """Loss of an MLP that pairs the views of an image from ω alone.

    Attributes:
      nt_xent: the loss on held-out images; `chance` where ω says nothing about its image.
      interval: half the width of its 95 % interval over held-out batches (Student's t).
      batch: images per batch, among whose views the other view is looked for.
      temperature: temperature of the loss.
      train_images: number of images the MLP was trained on.
      test_images: number of held-out images.
    """

    nt_xent: float
    interval: float
    batch: int
    temperature: float
    train_images: int
    test_images: int

    @property
    def chance(self) -> float:
        """NT-Xent of equal embeddings: log of the number of candidate views."""
        return math.log(2 * self.batch - 1)

    def findings(self, dataset: str) -> list[Finding]:
        """NT-Xent and its chance level, as scores and as bars."""
        values = ("ω alone", self.nt_xent, self.interval), ("chance", self.chance, None)
        title = (
            f"NT-Xent of an MLP that sees ω and no image, among {2 * self.batch} views at "
            f"temperature {self.temperature:g}"
        )
        bars = {"NT-Xent": tuple((name, value) for name, value, _ in values)}
        return [
            *(
                Score(PROTOCOL.name, dataset, f"NT-Xent, {name}", *value, higher_is_better=None)
                for name, *value in values
            ),
            Chart(PROTOCOL.name, dataset, title, "seen", "NT-Xent", bars),
        ]


def leak_of(
    conditioning: Conditioning,
    specs: Sequence[AugmentSpec],
    images: UInt8[np.ndarray, "N H W 3"] | Float[np.ndarray, "N H W 3"],
    sizes: Int[np.ndarray, "N 2"] | None = None,
    *,
    batch: int = BATCH,
    temperature: float = TEMPERATURE,
    steps: int = 1000,
    seed: int = 0,
) -> Leak:
    """Trains an MLP on the ω of pairs of views, and measures its NT-Xent on other images.

    Half of the images are for training, with new views at every step; the other half is held out.
    The MLP has three layers, two of them hidden and 256 wide. After training, a constant is mixed
    into its embeddings, in a proportion chosen on further views of the training images. So an MLP
    that has learnt nothing is at chance, not above. A loss below chance proves that ω gives away
    something of the image. A loss at chance says that this MLP found nothing. With the defaults it
    takes about half a minute of one CPU core; half of it is compilation.

    Args:
      conditioning: the descriptors that make up ω.
      specs: the run's augmentation per view; the first two are compared.
      images: whole pictures of any aspect ratio; see `pictures_of`.
      sizes: original height and width per picture, which decide the crops that are drawn;
        `None` for the size of `images`.
      batch: images per training step and held-out batch; at most a quarter of the images.
      temperature: temperature of the loss.
      steps: number of training steps.
      seed: seed of the MLP's initial values, the images of a step and their augmentation.

    Raises:
      ValueError: fewer than 8 images, another number of sizes, no descriptors, or a setting out of
        its range.
    """
    check_at_least("steps", steps, 1)
    check_at_least("batch", batch, 2)
    check_positive("temperature", temperature)
    if not conditioning.descriptors:
        raise ValueError("there are no descriptors, so there is no ω that could give images away")
    if len(images) < FEWEST_IMAGES:
        raise ValueError(f"{len(images)} images are too few; use at least {FEWEST_IMAGES}")
    if sizes is None:
        sizes = np.tile(np.int32(images.shape[1:3]), (len(images), 1))
    if sizes.shape != (len(images), 2):
        raise ValueError(f"sizes of shape {sizes.shape} are not a height and width per image")
    batch = min(batch, len(images) // 4)
    order_key, key = jax.random.split(protocol_key("leak", seed))
    # Some more batches of training images choose the constant's share.
    ends = steps, steps + math.ceil(steps / 10)
    train, test = _batches(np.asarray(jax.random.key_data(order_key)), len(images), batch, ends[1])
    rows = np.concatenate([train, *[test] * _DRAWS])
    keys = jax.random.split(key, len(rows))
    omega = _drawn(conditioning, tuple(specs[:2]))(keys, images, sizes, rows)
    losses = _held_out_losses(*jnp.split(omega, ends), jax.random.key(seed), temperature)
    # Draws of the same images are not independent batches: average over them first.
    of_batch = np.asarray(losses, np.float64).reshape(_DRAWS, len(test)).mean(axis=0)
    return Leak(
        nt_xent=float(of_batch.mean()),
        interval=half_interval(of_batch),
        batch=batch,
        temperature=temperature,
        train_images=len(images) // 2,
        test_images=test.size,
    )


def pictures_of(
    batches: Iterable[Batch], mesh: Mesh
) -> tuple[Float[np.ndarray, "N side side 3"], Int[np.ndarray, "N 2"]]:
    """All images, each resized whole to a small square, and their original sizes, by `index`."""

    def resize(image, size):
        whole, unmirrored = jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array(False)
        return crop_and_resize(image, whole, unmirrored, _PICTURE, size).transpose(0, 2, 1)

    def resize_all(batch):
        return batch["index"], jax.vmap(resize)(batch["image"], batch["size"]), batch["size"]

    resize_all = parallel(resize_all, mesh, inputs=(SHARDED,), outputs=SHARDED)
    index, pictures, sizes = of_all_images(resize_all, batches, mesh)
    order = np.argsort(index)
    return pictures[order], sizes[order]


def _batches(
    seed: np.ndarray, images: int, batch: int, steps: int
) -> tuple[Int[np.ndarray, "steps batch"], Int[np.ndarray, "_ batch"]]:
    """The images of every training step, and the held-out batches, which share no image."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(images)
    train, held_out = order[: images // 2], order[images // 2 :]
    drawn = np.stack([draw.choice(train, batch, replace=False) for _ in range(steps)])
    count = len(held_out) // batch
    return drawn, held_out[: count * batch].reshape(count, batch)


def _drawn(conditioning: Conditioning, specs: Sequence[AugmentSpec]):
    """The compiled function that returns ω of both views of many batches, [batches, B, 2, D]."""
    # XLA drops the views, except for what ω is computed from.
    specs = [
        dataclasses.replace(spec, size=min(spec.size, _VIEW), kernel_size=3, jitter_order="image")
        for spec in specs
    ]

    def view_of(spec, key, image, size):
        return apply(image, draw(key, size, spec), spec)

    @jax.jit
    def omega(keys, images, sizes, rows):
        def of_batch(key_and_rows):
            key, rows = key_and_rows
            keys = jax.random.split(key, (len(specs), len(rows)))
            views = [
                jax.vmap(partial(view_of, spec))(each, images[rows], sizes[rows])
                for each, spec in zip(keys, specs, strict=True)
            ]
            return jnp.stack(conditioning.describe(views, specs), axis=1)

        return jax.lax.map(of_batch, (keys, rows))

    return omega


def _standardised(train: Float[Array, "steps B 2 D"], *others: Array) -> tuple[Array, ...]:
    """Standardises all by the mean and the deviation of `train`."""
    mean, deviation = train.mean((0, 1, 2)), train.std((0, 1, 2))
    scale = jnp.where(deviation > 0, deviation, 1)
    return tuple((each - mean) / scale for each in (train, *others))


@partial(jax.jit, static_argnames="temperature")
def _held_out_losses(
    train: Float[Array, "steps B 2 D"],
    val: Float[Array, "choices B 2 D"],
    test: Float[Array, "batches B 2 D"],
    key: PRNGKeyArray,
    temperature: float,
) -> Float[Array, " batches"]:
    """NT-Xent of every batch of `test`, after one step of AdamW on each batch of `train`.

    The batches of `val` choose the constant's share of the embeddings.
    """
    train, val, test = _standardised(train, val, test)
    # Without the last BatchNorm, training takes longer to leave the state of equal embeddings.
    network = MLP(hidden=256, out=64, depth=3, last_bn=True)
    optimizer = optax.adamw(optax.cosine_decay_schedule(_LEARNING_RATE, len(train)))

    def loss(params, batch_stats, omega, *, is_training, share=1.0):
        embeddings, changed = network.apply(
            {"params": params, "batch_stats": batch_stats},
            omega.reshape(-1, omega.shape[-1]),
            is_training,
            mutable=["batch_stats"] if is_training else [],
        )
        first, second = jnp.moveaxis(embeddings.reshape(*omega.shape[:2], -1), 1, 0)
        # A constant turns cosines c into share · c + (1 - share), like another temperature.
        loss = nt_xent(first, second, temperature=temperature / share, axis_name=None)
        return loss, changed.get("batch_stats", batch_stats)

    def step(state, omega):
        params, batch_stats, opt_state = state
        gradient, batch_stats = jax.grad(partial(loss, is_training=True), has_aux=True)(
            params, batch_stats, omega
        )
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), None

    variables = network.init(key, train[0, :, 0], True)
    state = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
    (*learnt, _), _ = jax.lax.scan(step, state, train)

    def losses(batches, share):
        held_out = partial(loss, *learnt, is_training=False, share=share)
        return jax.lax.map(lambda omega: held_out(omega)[0], batches)

    shares = jnp.asarray(_SHARES, jnp.float32)
    of_share = jax.lax.map(lambda share: losses(val, share).mean(), shares)
    return losses(test, shares[jnp.argmin(of_share)])


def _run(bench: Bench, settings: Analysis) -> list[Finding]:
    subject = bench.subject
    if not subject.conditioning.descriptors:
        LOG.info("leak of %s: left out, as the run has no ω", subject.name)
        return []
    pictures = pictures_of(bench.analysed(settings.analysed), bench.mesh)
    found = leak_of(subject.conditioning, subject.views, *pictures, seed=settings.seed)
    return found.findings(bench.data.name)


PROTOCOL = Protocol(
    "leak",
    title="What ω alone gives away",
    usual=(),
    needs=Needs(analysed=FEWEST_IMAGES),
    settings=Analysis,
    run=_run,
)
