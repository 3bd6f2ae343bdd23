"""Trains a linear classifier on an encoder, frozen or not, by SGD on images, and measures it.

The protocols that train on images share this file. Training images are cropped at random and
flipped, nothing else. Test images are resized so that the short side is 256/224 of the view, and
the view is cut out of the centre. The head sees float32 features. Order and augmentation depend
only on the seed, the step and an image's position in the global batch. So any number of devices
trains the same classifier.
"""

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from cassle_jax.augment import CHANCES, AugmentSpec, center_view
from cassle_jax.data import BatchIterator, Source, evaluation_batches, training_batches
from cassle_jax.data.feed import DeviceFeed
from cassle_jax.evaluation.store import canvas_for, tolerant_log, uncropped_side
from cassle_jax.evaluation.subject import Subject
from cassle_jax.methods import Networks
from cassle_jax.methods.base import PyTree, Schedule
from cassle_jax.methods.views import augmented_views
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, parallel, shard_batch

LOG = logging.getLogger(__name__)

MOMENTUM = 0.9
CROP_AREA = (0.08, 1.0)  # torchvision's for supervised training
TOP_5_CLASSES = 10  # with fewer classes a top-5 accuracy says little

_CACHE_BYTES = 4 << 30
_STEPS_AHEAD = 2
_REPORTS = 10


@dataclasses.dataclass(frozen=True)
class Training:
    """Settings of a classifier's training: SGD with momentum 0.9, without weight decay.

    Attributes:
      rates: the learning rate over the steps, by trained part: the `head`, and the `encoder` unless
        it is frozen. A frozen encoder is in evaluation mode. In a trained one, BatchNorm uses the
        statistics of the batch over all devices.
      steps: number of steps.
      batch: images per step, all devices together.
      seed: seed of the head's initial values, the order of the images and their augmentation.
      dtype: dtype of the encoder's convolutions and products; `None` for bfloat16 on accelerators
        and float32 on CPUs.
    """

    rates: Mapping[str, Schedule]
    steps: int
    batch: int
    seed: int = 0
    dtype: DTypeLike | None = None


@dataclasses.dataclass(frozen=True)
class Accuracies:
    """Accuracies of a classifier on the test images; shares in [0, 1].

    Attributes:
      top_1: share of the images classified correctly.
      class_average: the mean of that share over the classes that occur.
      top_5: share of the images whose class is among the five most probable; `None` below ten
        classes.
    """

    top_1: float
    class_average: float
    top_5: float | None


def train_classifier(
    subject: Subject, train: Source, training: Training, *, classes: int, mesh: Mesh
) -> PyTree:
    """Trains a linear head on the subject's encoder, and the encoder where it has a learning rate.

    The head's weights start from N(0, 0.01), its biases from 0. An encoder conditioned on ω gets
    the ω of an unaugmented image; its layers for ω are not trained.

    Args:
      subject: provides the encoder; it is not changed.
      train: images with labels from 0 to `classes` − 1.
      training: the settings of the training.
      classes: number of classes.
      mesh: the devices.

    Returns:
      Parameters and BatchNorm statistics of the encoder and the `head`, on the devices.

    Raises:
      ValueError: the loss or the update of a step is not finite; the message names the learning
        rates.
    """
    networks = _networks(subject, classes, training.dtype, mesh)
    optimizer = _optimizer(training.rates)
    step = _training_step(networks, optimizer, subject, training)
    on_devices = parallel(
        step, mesh, inputs=(REPLICATED, REPLICATED, SHARDED), outputs=REPLICATED, donate=(0,)
    )
    state, fixed = _start(networks, optimizer, subject, training, mesh)

    def losses(batches: Iterator) -> Iterator[Float[Array, ""]]:
        nonlocal state
        for _ in range(training.steps):
            batch, _ = next(batches)
            state, loss = on_devices(state, fixed, batch)
            yield loss

    with (
        closing(_shuffled(train, training, canvas_for(subject.spec.size))) as batches,
        closing(DeviceFeed(batches, mesh)) as feed,
    ):
        for number, loss in enumerate(_steps_behind(losses(feed)), start=1):
            _check_finite(loss, number, training)
            if number % max(1, training.steps // _REPORTS) == 0:
                LOG.info("step %d of %d: loss %.4f", number, training.steps, loss)
    return _variables(state.params, state.batch_stats, fixed)


def measured_accuracies(
    subject: Subject,
    variables: PyTree,
    test: Source,
    *,
    classes: int,
    batch: int,
    mesh: Mesh,
    dtype: DTypeLike | None = None,
) -> Accuracies:
    """The accuracies of a trained classifier.

    Args:
      subject: the subject whose encoder was trained on.
      variables: from `train_classifier`.
      test: images with labels.
      classes: number of classes.
      batch: images per step, all devices together.
      mesh: the devices.
      dtype: see `Training`.
    """
    networks = _networks(subject, classes, dtype, mesh)
    measure = parallel(
        _measurement(networks, subject, classes),
        mesh,
        inputs=(REPLICATED, SHARDED),
        outputs=REPLICATED,
    )
    batches = evaluation_batches(
        test,
        batch=batch,
        canvas=subject.spec.size,
        short_side=uncropped_side(subject.spec.size),
        damaged=tolerant_log(test),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with closing(batches):
        counts = _steps_behind(measure(variables, shard_batch(each, mesh)) for each in batches)
        right_1, right_5, images = sum(each.astype(np.float64) for each in counts)
    occurs = images > 0
    return Accuracies(
        top_1=float(right_1.sum() / images.sum()),
        class_average=float(np.mean(right_1[occurs] / images[occurs])),
        top_5=float(right_5.sum() / images.sum()) if classes >= TOP_5_CLASSES else None,
    )


@struct.dataclass
class _State:
    """The values that change from step to step; equal on all devices.

    Attributes:
      step: number of steps done.
      params: parameters of the trained parts.
      batch_stats: statistics of the encoder, where it is trained.
      opt_state: state of the optimiser.
    """

    step: PyTree
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


def _networks(subject: Subject, classes: int, dtype: DTypeLike | None, mesh: Mesh) -> Networks:
    """The subject's encoder, in the dtype, with a linear head."""
    if dtype is None:
        dtype = jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16
    encoding = {
        name: _in_dtype(factory, dtype)
        for name, factory in subject.networks.factories.items()
        if name in ("encoder", "image_conditioner")
    }
    # Accelerators would otherwise round the features to bfloat16 or TF32.
    head = partial(
        nn.Dense,
        classes,
        kernel_init=nn.initializers.normal(0.01),
        precision=jax.lax.Precision.HIGHEST,
    )
    return Networks({**encoding, "head": head})


def _in_dtype(factory: Callable[[], nn.Module], dtype: DTypeLike) -> Callable[[], nn.Module]:
    """A factory whose module computes in `dtype`, where the module takes one."""
    module = factory()
    return partial(module.clone, dtype=dtype) if hasattr(module, "dtype") else factory


def _optimizer(rates: Mapping[str, Schedule]) -> optax.GradientTransformation:
    by_part = {part: optax.scale_by_learning_rate(rate) for part, rate in rates.items()}
    labels = {part: part for part in rates}
    return optax.chain(optax.trace(MOMENTUM), optax.partition(by_part, labels))


def _logits(
    networks: Networks, images: Float[Array, "B S S 3"], neutral: Float[Array, " D"], train: bool
) -> Float[Array, "B classes"]:
    """The head's logits; `train` is the encoder's mode."""
    if "image_conditioner" in networks.factories:
        omega = jnp.broadcast_to(neutral, (len(images), neutral.size))
        images = networks.image_conditioner(images, omega, False)
    return networks.head(networks.encoder(images, train).astype(jnp.float32))


def _start(
    networks: Networks,
    optimizer: optax.GradientTransformation,
    subject: Subject,
    training: Training,
    mesh: Mesh,
) -> tuple[_State, PyTree]:
    """The state before the first step, and the variables that no step changes."""
    size, neutral = subject.spec.size, subject.conditioning.neutral

    def start(variables):
        # XLA drops the computation of parameters that the subject already has.
        made = networks.init(
            jax.random.key(training.seed),
            jnp.zeros((2, size, size, 3)),
            neutral,
            False,
            method=_logits,
        )
        params = {**variables["params"], "head": made["params"]["head"]}
        batch_stats = dict(variables["batch_stats"])
        trained = {part: params.pop(part) for part in training.rates}
        moving = {part: batch_stats.pop(part) for part in trained if part in batch_stats}
        state = _State(jnp.zeros((), jnp.int32), trained, moving, optimizer.init(trained))
        # Copies, since the state is donated and the subject must not be.
        return jax.tree.map(jnp.copy, (state, {"params": params, "batch_stats": batch_stats}))

    encoding = {
        collection: {
            part: tree
            for part, tree in subject.variables.get(collection, {}).items()
            if part in networks.factories
        }
        for collection in ("params", "batch_stats")
    }
    return parallel(start, mesh, inputs=(REPLICATED,), outputs=REPLICATED)(encoding)


def _variables(params: PyTree, batch_stats: PyTree, fixed: PyTree) -> PyTree:
    return {
        "params": {**fixed["params"], **params},
        "batch_stats": {**fixed["batch_stats"], **batch_stats},
    }


def _training_step(
    networks: Networks,
    optimizer: optax.GradientTransformation,
    subject: Subject,
    training: Training,
) -> Callable[[_State, PyTree, PyTree], tuple[_State, Float[Array, ""]]]:
    """The step of one device of `AXIS`; its loss is NaN where the update is not finite."""
    spec = _crop_and_flip(subject.spec)
    neutral = subject.conditioning.neutral
    trains_encoder = "encoder" in training.rates

    def step(state, fixed, batch):
        key = jax.random.fold_in(jax.random.key(training.seed), state.step)
        (view,) = augmented_views(key, batch["image"], batch["size"], (spec,), AXIS)

        def objective(params):
            logits, changed = nn.apply(_logits, networks, mutable=["batch_stats"])(
                _variables(params, state.batch_stats, fixed), view.image, neutral, trains_encoder
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean(), {part: changed["batch_stats"][part] for part in state.batch_stats}

        (loss, batch_stats), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
        loss, gradient = jax.lax.pmean((loss, gradient), AXIS)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        loss = jnp.where(jnp.isfinite(optax.tree.norm(updates)), loss, jnp.nan)
        return _State(state.step + 1, params, batch_stats, opt_state), loss

    return step


def _crop_and_flip(spec: AugmentSpec) -> AugmentSpec:
    """The augmentation of supervised training, for views as the subject takes them."""
    chances = dict.fromkeys(CHANCES, 0.0) | {"flip": 0.5}
    return AugmentSpec(spec.size, crop_area=CROP_AREA, mean=spec.mean, std=spec.std, **chances)


def _measurement(
    networks: Networks, subject: Subject, classes: int
) -> Callable[[PyTree, PyTree], Float[Array, "3 classes"]]:
    """Returns a function of variables and a batch, for one device of `AXIS`.

    It counts per class, over all devices: the images whose class is the most probable, the images
    whose class is among the five most probable, and all images.
    """
    neutral = subject.conditioning.neutral
    center = partial(center_view, spec=subject.spec)

    def measure(variables, batch):
        images = jax.vmap(center)(batch["image"], batch["size"])
        logits = nn.apply(_logits, networks)(variables, images, neutral, False)
        ahead = _ahead(logits, batch["label"])
        right = jnp.stack([ahead < 1, ahead < 5, jnp.ones_like(ahead, bool)]) & batch["mask"]
        counts = right.astype(jnp.float32) @ jax.nn.one_hot(batch["label"], classes)
        return jax.lax.psum(counts, AXIS)

    return measure


def _ahead(logits: Float[Array, "B classes"], labels: Int[Array, " B"]) -> Int[Array, " B"]:
    """The number of classes ranked above the label; ties go to the lower class, NaN ranks first."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    return jnp.sum(~(logits <= own) | ((logits == own) & earlier), axis=1)


def _shuffled(train: Source, training: Training, canvas: int) -> BatchIterator:
    """Endless batches; tolerates one damaged image even in the smallest dataset."""
    return training_batches(
        train,
        batch=training.batch,
        canvas=canvas,
        seed=training.seed,
        damaged=tolerant_log(train),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        cache_bytes=_CACHE_BYTES,
    )


def _steps_behind(results: Iterable[Array]) -> Iterator[np.ndarray]:
    """Yields results on the host, in order, two steps behind the devices.

    So the devices never wait for the host, and the host does not run far ahead.
    """
    pending: deque = deque()
    for result in results:
        pending.append(result)
        if len(pending) > _STEPS_AHEAD:
            yield np.asarray(pending.popleft())
    for result in pending:
        yield np.asarray(result)


def _check_finite(loss: np.ndarray, number: int, training: Training) -> None:
    if not np.isfinite(loss):
        rates = " and ".join(
            f"{float(rate(0)):g} of the {part}" for part, rate in training.rates.items()
        )
        raise ValueError(
            f"the loss or the update of step {number} is not finite; a smaller learning rate "
            f"usually helps (now {rates})"
        )
