"""The projector conditioned on its view's augmentation, in every treatment and injection."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cassle_jax.checks import ConfigError, check_one_of
from cassle_jax.models.batch_norm import BatchNorm
from cassle_jax.models.mlp import MLP

TREATMENTS = ("none", "mlp", "raw", "hypernetwork")
INJECTIONS = ("concat", "add", "multiply", "image", "none")


def check_conditioning(
    treatment: str,
    injection: str,
    *,
    feature_width: int | None = None,
    descriptor_width: int | None = None,
) -> None:
    """Refuses combinations of treatment and injection that cannot work.

    Args:
        treatment: the use of the descriptor ω: through an MLP γ, raw, as weights, or none.
        injection: the place where the result enters.
        feature_width: width of the encoder's features, where it is known.
        descriptor_width: width of ω, where it is known.

    Raises:
        ConfigError: for an unknown name, an injection that a hypernetwork cannot have, a descriptor
            without entries, or raw ω added to or multiplied with features of another width.
    """
    check_one_of("conditioning.treatment", treatment, TREATMENTS)
    check_one_of("conditioning.injection", injection, INJECTIONS)
    if treatment == "hypernetwork" and injection not in ("none", "concat"):
        raise ConfigError(
            f"injection={injection!r} does nothing with treatment='hypernetwork', whose descriptor "
            f"becomes the projector's weights; use injection='none'"
        )
    if not is_conditioned(treatment, injection):
        return
    if descriptor_width == 0:
        raise ConfigError(
            f"treatment={treatment!r} needs a descriptor, and this one has no entries; "
            f"condition on at least one augmentation or use treatment='none'"
        )
    elementwise = treatment == "raw" and injection in ("add", "multiply")
    known = feature_width is not None and descriptor_width is not None
    if elementwise and known and feature_width != descriptor_width:
        raise ConfigError(
            f"treatment='raw' with injection={injection!r} needs a descriptor as wide as the "
            f"features ({feature_width}), not {descriptor_width}; use treatment='mlp'"
        )


def is_conditioned(treatment: str, injection: str) -> bool:
    """Whether a descriptor enters at all."""
    return treatment == "hypernetwork" or "none" not in (treatment, injection)


def check_row_each(name: str, rows: Array, inputs: Array) -> None:
    """Refuses anything but one row per input, which some modules would broadcast.

    Raises:
        ValueError: the message names the shape and what would work.
    """
    if rows.ndim != 2 or len(rows) != len(inputs):
        raise ValueError(
            f"{name} has shape {rows.shape} for {len(inputs)} inputs; use [{len(inputs)}, width]"
        )


class ConditionedProjector(nn.Module):
    """π(features | ω): the projector of CASSLE, conditioned on the view's own augmentation.

    It is the plain projector if `treatment` or `injection` is 'none' and if `injection` is
    'image', where `ImageConditioner` does the conditioning. A hypernetwork has no injection
    ('none', or the usual 'concat', which it ignores).

    Attributes:
        hidden: width of the hidden layers; after a hypernetwork they are as wide as the features.
        out: width of the embedding.
        depth: number of the projector's Linear layers.
        last_bn: end in a BatchNorm.
        last_bn_affine: give that last BatchNorm a scale and a shift.
        treatment: 'mlp' (an MLP γ ending in a BatchNorm maps ω first; the paper's choice), 'raw'
            (ω itself), 'hypernetwork' (such an MLP maps ω to the projector's weights) or 'none'.
        injection: 'concat' ([features, γ(ω)] enters; the paper's choice), 'add', 'multiply',
            'image' or 'none'.
        condition_depth: number of Linear layers of γ or of the hypernetwork.
        condition_width: width of γ's hidden layers, and of its result where that is concatenated.
        hypernetwork_bn: BatchNorm before each ReLU of the projector that a hypernetwork generates.
        optional: the descriptor's last column is 1 where ω is given and 0 elsewhere; a learnt
            vector replaces a missing γ(ω). Not for a hypernetwork.
        axis_name: mapped axis over which BatchNorm statistics are synchronised.
        dtype: dtype the layers compute in; parameters are float32.

    References:
        CASSLE (arXiv 2306.06082), section 3 and the ablations.
    """

    hidden: int
    out: int
    depth: int
    last_bn: bool = False
    last_bn_affine: bool = True
    treatment: str = "mlp"
    injection: str = "concat"
    condition_depth: int = 6
    condition_width: int = 64
    hypernetwork_bn: bool = False
    optional: bool = False
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "batch features"],
        descriptor: Float[Array, "batch descriptor"],
        train: bool,
    ) -> Float[Array, "batch {self.out}"]:
        """Embeddings of one view.

        Args:
            features: the encoder's features.
            descriptor: ω, the augmentation per image of the view.
            train: normalise by the batch's statistics, and record them.

        Raises:
            ConfigError: the errors of `check_conditioning`.
            ValueError: there is not one ω per image.
        """
        check_conditioning(
            self.treatment,
            self.injection,
            feature_width=features.shape[-1],
            descriptor_width=descriptor.shape[-1] - self.optional,
        )
        conditioned = is_conditioned(self.treatment, self.injection)
        if conditioned:
            check_row_each("descriptor", descriptor, features)
        if self.treatment == "hypernetwork":
            return self._hypernetwork(features, descriptor, train)
        if conditioned and self.injection != "image":
            features = self._inject(features, descriptor, train)
        return MLP(
            hidden=self.hidden,
            out=self.out,
            depth=self.depth,
            last_bn=self.last_bn,
            last_bn_affine=self.last_bn_affine,
            axis_name=self.axis_name,
            dtype=self.dtype,
            name="projector",
        )(features, train)

    def _inject(self, features, descriptor, train):
        width = self.condition_width if self.injection == "concat" else features.shape[-1]
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        neutral = ones if self.injection == "multiply" else zeros
        descriptor = _treated(self, descriptor, width, train, neutral)
        match self.injection:
            case "concat":
                return jnp.concatenate([features, descriptor], axis=-1)
            case "add":
                return features + descriptor
            case "multiply":
                return features * descriptor

    def _hypernetwork(self, features, descriptor, train):
        """Applies each sample's own projector: weights (inputs×outputs) and a bias per layer.

        The hypernetwork's result holds them in that order, layer after layer.
        """
        shapes = [(features.shape[-1],) * 2] * (self.depth - 1) + [(features.shape[-1], self.out)]
        total = sum((inputs + 1) * outputs for inputs, outputs in shapes)
        numbers = _gamma(self, total, "hypernetwork")(descriptor, train)

        x, start = features, 0
        for layer, (inputs, outputs) in enumerate(shapes):
            stop = start + inputs * outputs
            weights = numbers[:, start:stop].reshape(-1, inputs, outputs)
            biases = numbers[:, stop : stop + outputs]
            start = stop + outputs
            x = biases + jnp.einsum(
                "bi,bio->bo",
                x.astype(self.dtype),
                weights.astype(self.dtype),
                preferred_element_type=biases.dtype,
            )
            if layer < self.depth - 1:
                if self.hypernetwork_bn:
                    x = BatchNorm(axis_name=self.axis_name, name=f"bn_{layer}")(x, train)
                x = jax.nn.relu(x)
        if self.last_bn:
            affine = self.last_bn_affine
            norm = BatchNorm(affine, affine, axis_name=self.axis_name, name=f"bn_{self.depth - 1}")
            x = norm(x, train)
        return x


class ImageConditioner(nn.Module):
    """γ(ω) as further channels of the image, the same at every pixel.

    Attributes:
        treatment: 'mlp' (an MLP ending in a BatchNorm maps ω first) or 'raw' (ω itself).
        condition_depth: number of γ's Linear layers.
        condition_width: width of γ, which is the number of channels added.
        optional: see `ConditionedProjector`.
        axis_name: mapped axis over which BatchNorm statistics are synchronised.
        dtype: dtype γ's layers compute in; parameters are float32.

    References:
        The injection 'image' of the published CASSLE code, which lists it without implementing it.
    """

    treatment: str = "mlp"
    condition_depth: int = 6
    condition_width: int = 64
    optional: bool = False
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        descriptor: Float[Array, "batch descriptor"],
        train: bool,
    ) -> Float[Array, "batch height width conditioned_channels"]:
        """Images with the descriptor's channels after their own, in the images' dtype.

        Raises:
            ValueError: for a treatment other than 'mlp' and 'raw', a descriptor without entries, or
                another number of ω than of images.
        """
        check_row_each("descriptor", descriptor, images)
        width = descriptor.shape[-1] - self.optional
        check_conditioning(self.treatment, "image", descriptor_width=width)
        if self.treatment == "none":
            raise ValueError("treatment='none' leaves the images as they are; use 'mlp' or 'raw'")
        descriptor = _treated(self, descriptor, self.condition_width, train, nn.initializers.zeros)
        shape = (*images.shape[:-1], descriptor.shape[-1])
        channels = jnp.broadcast_to(descriptor[:, None, None, :], shape)
        return jnp.concatenate([images, channels.astype(images.dtype)], axis=-1)


def _treated(
    module: nn.Module,
    descriptor: Float[Array, "batch descriptor"],
    width: int,
    train: bool,
    neutral: nn.initializers.Initializer,
) -> Float[Array, "batch _"]:
    """γ(ω) of a width, or raw ω; a learnt vector, `ungiven`, in the rows where ω is not given.

    γ sees the ω of all rows, so that its BatchNorm never sees a constant.
    """
    if module.optional:
        descriptor, given = descriptor[:, :-1], descriptor[:, -1:]
    if module.treatment == "mlp":
        descriptor = _gamma(module, width, "condition")(descriptor, train)
    if not module.optional:
        return descriptor
    ungiven = module.param("ungiven", neutral, (descriptor.shape[-1],), jnp.float32)
    return jnp.where(given > 0.5, descriptor, ungiven.astype(descriptor.dtype))


def _gamma(module: nn.Module, out: int, name: str) -> MLP:
    """The MLP, ending in a BatchNorm with scale and shift, that maps ω to `out` numbers."""
    return MLP(
        hidden=module.condition_width,
        out=out,
        depth=module.condition_depth,
        last_bn=True,
        axis_name=module.axis_name,
        dtype=module.dtype,
        name=name,
    )
