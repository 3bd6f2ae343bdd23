"""Identifies the architecture of a state, and how torchvision and timm build the same one."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.naming import has_swiglu, is_convnext, is_rotary, is_vit
from cassle_jax.interop.pytorch import State, check_encoder
from cassle_jax.models.convnext import ConvNeXt
from cassle_jax.models.resnet import ARCHITECTURES, Bottleneck, ResNet
from cassle_jax.models.vit import VisionTransformer, swiglu_width

# Attention heads by width, where all projects agree; SCALED_VIT_HEADS is for ViTs with layer scale.
VIT_HEADS = {768: 12, 1024: 16, 1280: 16, 1536: 24}
SCALED_VIT_HEADS = {384: 6, **VIT_HEADS}
VIT_NAMES = {  # by width
    192: "vit_tiny",
    384: "vit_small",
    768: "vit_base",
    1024: "vit_large",
    1280: "vit_huge",
    1536: "vit_giant",
}
TIMM_PATCHES = {"vit_huge": 14, "vit_giant": 14}  # in timm's names; 16 in the others
# Parts of other projects' ViTs that are unknown here, by a pattern of their arrays' names.
UNKNOWN_OF_VITS = {
    r"rope": "rotary position embeddings of another kind than DINOv3's",
    r".*\.mlp\.w1\.": "a SwiGLU of two matrices, as DINOv3's larger models have",
    r"cls_norm\.": "a LayerNorm of the class token alone",
    r".*\.gamma_[12]": "a layer scale that is not called ls1.gamma, as BEiT's and timm's DINOv3's",
    r"dist_token": "a distillation token, as DeiT has",
    r"norm_pre\.": "a LayerNorm before the blocks, as CLIP has",
    r"fc_norm\.": "a mean of patches as features (fc_norm)",
    r".*\.[qk]_norm\.": "normalised queries and keys",
    r".*(rel_pos|relative_position)": "relative positions, as BEiT has",
}


@dataclasses.dataclass(frozen=True)
class ResNetArchitecture:
    """A ResNet, identified by its arrays.

    Attributes:
        depth: 18, 34, 50, 101 or 152.
        width: channels of the stem.
        small_images: a 3×3 stem without max-pooling.
        channels: channels of the images.
        widening: factor on the channels of the 3×3 convolutions, 2 in a wide ResNet.
    """

    depth: int
    width: int
    small_images: bool
    channels: int
    widening: int = 1

    @property
    def name(self) -> str:
        """The name, in torchvision and timm too where they have such a ResNet."""
        plain = f"resnet{self.depth}"
        return plain if self.widening == 1 else f"wide_{plain}_{self.widening}"

    @property
    def feature_width(self) -> int:
        """Width of the features."""
        block, stages = ARCHITECTURES[self.depth]
        return self.width * 2 ** (len(stages) - 1) * block.expansion

    def encoder(self, axis_name: str | None = None) -> ResNet:
        """This project's module of the architecture, float32."""
        return ResNet(
            self.depth, self.width, self.small_images, axis_name=axis_name, widening=self.widening
        )

    def torchvision_lines(self) -> list[str]:
        """Lines of Python that build it, without a classifier, as `model`."""
        block, stages = ARCHITECTURES[self.depth]
        width = self.width
        lines = [f"model = torchvision.models.{self.name}()", "model.fc = torch.nn.Identity()"]
        if self.widening != 1:
            lines[0] = (
                f"model = torchvision.models.ResNet(torchvision.models.resnet.{block.__name__}, "
                f"{[*stages]}, width_per_group={64 * self.widening})"
            )
        if width != 64:
            lines += [
                f"block, model.inplanes = torchvision.models.resnet.{block.__name__}, {width}",
                f"model.bn1 = torch.nn.BatchNorm2d({width})",
                f"for i, blocks in enumerate({stages}):",
                f"    stage = model._make_layer(block, {width} * 2**i, blocks, min(i + 1, 2))",
                '    setattr(model, f"layer{i + 1}", stage)',
            ]
        size, stride, padding = (3, 1, 1) if self.small_images else (7, 2, 3)
        if self != dataclasses.replace(self, width=64, small_images=False, channels=3):
            lines.append(
                f"model.conv1 = torch.nn.Conv2d({self.channels}, {width}, {size}, {stride}, "
                f"{padding}, bias=False)"
            )
        if self.small_images:
            lines.append("model.maxpool = torch.nn.Identity()")
        return lines

    def timm_config(self) -> dict[str, Any]:
        """The architecture's part of timm's `config.json`.

        Raises:
            WeightsError: timm has no such ResNet.
        """
        known = self.widening == 1 or self.name in ("wide_resnet50_2", "wide_resnet101_2")
        if self.small_images or self.width != 64 or not known:
            stem = "a 3×3 stem without max-pooling" if self.small_images else f"width {self.width}"
            raise WeightsError(
                f"timm cannot make a {self.name} with {stem}; use the format torchvision, whose "
                "names are timm's, and the lines its model card gives"
            )
        return _timm_config(self.name, "avg", {}, self.channels, "conv1", "fc")


@dataclasses.dataclass(frozen=True)
class ViTArchitecture:
    """A Vision Transformer, identified by its arrays except for the heads.

    Attributes:
        width: width of a token.
        depth: number of blocks.
        heads: number of attention heads.
        patch_size: side of a patch, pixels.
        image_size: side of the images that its positions are made for, pixels; `None` for any.
        channels: channels of the images.
        registers: number of register tokens.
        layer_scale: whether each block's outputs are scaled.
        swiglu: whether its feed-forward networks are gated.
        position_offset: see `resize_positions`; its arrays do not show it.
        rotary: whether its positions are DINOv3's, of images of any size.
    """

    width: int
    depth: int
    heads: int
    patch_size: int
    image_size: int | None
    channels: int
    registers: int = 0
    layer_scale: bool = False
    swiglu: bool = False
    position_offset: float | None = None
    rotary: bool = False

    @property
    def name(self) -> str:
        """The nearest name that other projects use."""
        return VIT_NAMES[min(VIT_NAMES, key=lambda width: abs(width - self.width))]

    @property
    def feature_width(self) -> int:
        """Width of the features."""
        return self.width

    def encoder(self, axis_name: str | None = None) -> VisionTransformer:
        """This project's module of the architecture, float32."""
        del axis_name  # it has no BatchNorm to synchronise
        return VisionTransformer(
            self.width,
            self.depth,
            self.heads,
            self.patch_size,
            registers=self.registers,
            layer_scale=float(self.layer_scale),
            swiglu=self.swiglu,
            position_offset=self.position_offset,
            rotary=self.rotary,
        )

    def check_torchvision(self) -> None:
        """Raises WeightsError where torchvision has no such ViT."""
        self.check_positions()
        options = {"registers": self.registers, "layer scale": self.layer_scale}
        lacks = [name for name, has in {**options, "SwiGLU": self.swiglu}.items() if has]
        if lacks:
            raise WeightsError(
                f"torchvision's ViTs have no {', '.join(lacks)}; use the format timm or dinov2"
            )

    def dinov2_lines(self) -> list[str]:
        """Lines of Python that build it with DINOv2's code as `model`."""
        plain = self.position_offset is not None
        return [
            "model = DinoVisionTransformer(",
            f"    img_size={self.image_size}, patch_size={self.patch_size}, "
            f"in_chans={self.channels}, embed_dim={self.width},",
            f"    depth={self.depth}, num_heads={self.heads}, "
            f"init_values={1.0 if self.layer_scale else None}, block_chunks=0,",
            f'    ffn_layer="{"swiglufused" if self.swiglu else "mlp"}", '
            f"num_register_tokens={self.registers},",
            f"    interpolate_antialias={not plain}, "
            f"interpolate_offset={self.position_offset or 0.0},",
            ")",
        ]

    def torchvision_lines(self) -> list[str]:
        """Lines of Python that build it, without a classifier, as `model`."""
        lines = [
            "model = torchvision.models.VisionTransformer(",
            f"    image_size={self.image_size}, patch_size={self.patch_size}, "
            f"num_layers={self.depth}, num_heads={self.heads}, hidden_dim={self.width}, "
            f"mlp_dim={4 * self.width}",
            ")",
            "model.heads = torch.nn.Identity()",
        ]
        if self.channels != 3:
            patch = f"{self.patch_size}, {self.patch_size}"
            lines.append(
                f"model.conv_proj = torch.nn.Conv2d({self.channels}, {self.width}, {patch})"
            )
        return lines

    def check_positions(self) -> None:
        """Raises WeightsError for rotary positions, which other formats have under other names."""
        if self.rotary:
            raise WeightsError(
                "a ViT with rotary positions is written for this project alone; use the format "
                "cassle"
            )

    def timm_config(self) -> dict[str, Any]:
        """The architecture's part of timm's `config.json`.

        Raises:
            WeightsError: it has rotary positions.
        """
        self.check_positions()
        arguments = {
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "patch_size": self.patch_size,
            "img_size": self.image_size,
        }
        architecture = f"{self.name}_patch{TIMM_PATCHES.get(self.name, 16)}_224"
        if self.name == "vit_giant":  # timm's own is 48/11
            arguments["mlp_ratio"] = 4.0
        if self.layer_scale or self.swiglu:  # timm's model with SwiGLU has its own layer scale
            arguments["init_values"] = 1e-5 if self.layer_scale else None
        if self.registers:
            arguments |= {"reg_tokens": self.registers, "no_embed_class": True}
        if self.swiglu:  # a class, which timm gives this model alone
            architecture = "vit_giant_patch14_dinov2"
            # timm rounds down the width of both halves.
            arguments["mlp_ratio"] = (2 * swiglu_width(self.width) + 0.5) / self.width
        ends = "patch_embed.proj", "head"
        return _timm_config(architecture, "token", arguments, self.channels, *ends, fixed_size=True)


CONVNEXTS = {
    ((3, 3, 9, 3), 96): "convnext_tiny",
    ((3, 3, 27, 3), 96): "convnext_small",
    ((3, 3, 27, 3), 128): "convnext_base",
    ((3, 3, 27, 3), 192): "convnext_large",
    ((3, 3, 27, 3), 256): "convnext_xlarge",
}


@dataclasses.dataclass(frozen=True)
class ConvNeXtArchitecture:
    """A ConvNeXt, identified by its arrays.

    Attributes:
        depths: number of blocks per stage; there are four stages.
        width: channels of the stem.
        channels: channels of the images.
    """

    depths: tuple[int, int, int, int]
    width: int
    channels: int

    @property
    def name(self) -> str:
        """The nearest name that torchvision and timm use."""

        def distance(known):
            depths, width = known
            return abs(width - self.width), abs(sum(depths) - sum(self.depths))

        return CONVNEXTS[min(CONVNEXTS, key=distance)]

    @property
    def widths(self) -> list[int]:
        """Channels of the stages."""
        return [self.width * 2**stage for stage in range(len(self.depths))]

    @property
    def feature_width(self) -> int:
        """Width of the features."""
        return self.widths[-1]

    def encoder(self, axis_name: str | None = None) -> ConvNeXt:
        """This project's module of the architecture, float32."""
        del axis_name  # it has no BatchNorm to synchronise
        return ConvNeXt(self.depths, self.width)

    def torchvision_lines(self) -> list[str]:
        """Lines of Python that build it, without a classifier, as `model`."""
        lines = [
            f"widths, depths = {self.widths}, {[*self.depths]}",
            "stages = map(torchvision.models.convnext.CNBlockConfig, widths, [*widths[1:], None], "
            "depths)",
            "model = torchvision.models.ConvNeXt(list(stages))",
            "model.classifier[2] = torch.nn.Identity()",
        ]
        if self.channels != 3:
            lines.append(
                f"model.features[0][0] = torch.nn.Conv2d({self.channels}, {self.width}, 4, 4)"
            )
        return lines

    def timm_config(self) -> dict[str, Any]:
        """The architecture's part of timm's `config.json`."""
        arguments = {"depths": [*self.depths], "dims": self.widths}
        return _timm_config(self.name, "avg", arguments, self.channels, "stem.0", "head.fc")


Architecture = ResNetArchitecture | ViTArchitecture | ConvNeXtArchitecture


def _timm_config(
    name: str,
    pool: str,
    arguments: Mapping[str, Any],
    channels: int,
    first: str,
    last: str,
    fixed_size: bool = False,
) -> dict[str, Any]:
    """An architecture's part of timm's `config.json`, with its first and last layer's names."""
    return {
        "architecture": name,
        "global_pool": pool,
        "model_args": {**arguments, **({} if channels == 3 else {"in_chans": channels})},
        "pretrained_cfg": {"first_conv": first, "classifier": last, "fixed_input_size": fixed_size},
    }


def architecture_of(
    state: State, heads: int | None = None, position_offset: float | None = None
) -> Architecture:
    """The architecture of an encoder's state, in this project's names.

    Args:
        state: the arrays; only their names and a few shapes are read, see `check_arrays`.
        heads: number of a ViT's attention heads, which its arrays do not show; `None` if unknown.
        position_offset: a ViT's, see `resize_positions`.

    Raises:
        WeightsError: this project lacks the architecture, or a ViT's number of heads is unknown.
    """
    try:
        if is_convnext(state):
            return _convnext(state)
        return _vit(state, heads, position_offset) if is_vit(state) else _resnet(state)
    except ValueError as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"the encoder is not a known ResNet, ViT or ConvNeXt: {error}"
        ) from error


def image_size(architecture: Architecture, given: Mapping[str, Any]) -> int:
    """Side of an encoder's images in pixels.

    A ViT's positions show it, if they are not rotary. Otherwise the card's `input` gives it, and
    without one the encoder's usual images have it: 32 pixels for a ResNet with a 3×3 stem, or 224.

    Args:
        architecture: the encoder's.
        given: the `input` of its card; empty without one.
    """
    stated = None if given.get("assumed") else given.get("size")
    usual = 32 if getattr(architecture, "small_images", False) else 224
    return getattr(architecture, "image_size", None) or stated or usual


def check_arrays(state: State, architecture: Architecture) -> None:
    """Refuses arrays that are not exactly those of the architecture.

    Raises:
        WeightsError: the message names each array that is missing, unexpected or of another shape.
    """
    encoder, size = architecture.encoder(), getattr(architecture, "image_size", 32)
    size = size or architecture.patch_size
    images = jax.ShapeDtypeStruct((1, size, size, architecture.channels), jnp.float32)
    try:
        variables = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, False), images)
        check_encoder(state, variables)
    except (ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"the encoder is not a known {architecture.name}: {error}") from error


def _resnet(state: State) -> ResNetArchitecture:
    blocks = {match.groups() for name in state if (match := re.match(r"layer(\d)\.(\d+)\.", name))}
    stages = tuple(sum(stage == str(n) for stage, _ in blocks) for n in range(1, 5))
    bottleneck = "layer1.0.conv3.weight" in state
    for depth, (block, usual) in ARCHITECTURES.items():
        if usual == stages and (block is Bottleneck) == bottleneck:
            width, channels, size, _ = _shape(state, "conv1.weight", 4)
            inner = _shape(state, "layer1.0.conv1.weight", 4)[0]
            if inner % width:
                raise WeightsError(f"its first block is {inner} wide, no multiple of {width}")
            widening = inner // width if bottleneck else 1
            return ResNetArchitecture(depth, width, size == 3, channels, widening)
    depths = ", ".join(f"ResNet-{depth}" for depth in ARCHITECTURES)
    raise WeightsError(f"a ResNet of {stages} blocks is not known here; known are {depths}")


def _vit(state: State, heads: int | None, position_offset: float | None) -> ViTArchitecture:
    for pattern, what in UNKNOWN_OF_VITS.items():
        if any(re.match(pattern, name) for name in state):
            raise WeightsError(f"its ViT has {what}; ViTs here have none")
    if "pos_embed" not in state:
        raise WeightsError("its ViT has no pos_embed, and ViTs here need one")
    width, channels, patch_size, _ = _shape(state, "patch_embed.proj.weight", 4)
    if has_swiglu(state):
        _check_swiglu(state["blocks.0.mlp.fc2.weight"].shape[1], width)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    scaled = "blocks.0.ls1.gamma" in state
    heads = (SCALED_VIT_HEADS if scaled else VIT_HEADS).get(width) if heads is None else heads
    if heads is None:
        raise WeightsError(
            f"the arrays of a ViT of width {width} do not show its number of heads; "
            "convert the file with python -m cassle_jax.export --weights=FILE --heads=N"
        )
    if heads < 1 or width % heads:
        raise WeightsError(f"heads={heads} does not divide the ViT's width of {width}")
    image_size, rotary = None, is_rotary(state)
    if not rotary:
        image_size = math.isqrt(_shape(state, "pos_embed", 3)[1] - 1) * patch_size
    registers = _shape(state, "reg_token", 3)[1] if "reg_token" in state else 0
    return ViTArchitecture(
        width,
        depth,
        heads,
        patch_size,
        image_size,
        channels,
        registers,
        scaled,
        has_swiglu(state),
        position_offset,
        rotary,
    )


def _check_swiglu(found: int, width: int) -> None:
    """Raises WeightsError for gated networks of another width than a ViT of `width` has here."""
    if found != swiglu_width(width):
        raise WeightsError(
            f"its ViT has a SwiGLU {found} wide, as DINOv3's larger models have; those here are "
            f"{swiglu_width(width)} wide on tokens of {width}, as DINOv2's"
        )


def _convnext(state: State) -> ConvNeXtArchitecture:
    blocks = [
        match[1] for name in state if (match := re.fullmatch(r"stages\.(\d)\..+\.gamma", name))
    ]
    width, channels, _, _ = _shape(state, "stem.0.weight", 4)
    return ConvNeXtArchitecture(tuple(blocks.count(str(n)) for n in range(4)), width, channels)


def _shape(state: State, name: str, axes: int) -> tuple[int, ...]:
    """The shape of an array; ValueError names one that is missing or of other axes."""
    if name not in state:
        raise ValueError(f"it has no {name}")
    shape = state[name].shape
    if len(shape) != axes:
        many = "not enough" if len(shape) < axes else "too many"
        raise ValueError(f"{many} values: its {name} is of shape {shape}, not of {axes} axes")
    return shape
