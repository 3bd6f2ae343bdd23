"""Translates names: torchvision's for ViTs and ConvNeXts, DINOv2's, and detectron2's for ResNets.

This project's names (see `pytorch.py`) are already torchvision's and timm's for ResNets, and timm's
for ViTs and ConvNeXts. A ViT's `pos_embed` begins with the class token's position, which timm's
lacks where a ViT has registers. Where its positions are rotary, `pos_embed` has their periods.
"""

import math
import re
from collections.abc import Collection

import numpy as np

from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.pytorch import State
from cassle_jax.models.vit import rotary_periods

VIT_ARRAYS = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}
VIT_MODULES = {"patch_embed.proj": "conv_proj", "norm": "encoder.ln"}
VIT_BLOCK_MODULES = {
    "norm1": "ln_1",
    "attn.proj": "self_attention.out_proj",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}
VIT_BLOCK_ARRAYS = {
    "attn.qkv.weight": "self_attention.in_proj_weight",
    "attn.qkv.bias": "self_attention.in_proj_bias",
}


# Names in other projects and here.
DINOV2 = {"reg_token": "register_tokens"}
DINOV3 = {"storage_tokens": "reg_token", "rope_embed.periods": "pos_embed"}
DINOV3_PERIODS = 16  # for each axis, as its heads have 64 channels
DINOV2_SWIGLU = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
# Names of Hugging Face's ViTModel, ViTMAEModel, Dinov2Model and DINOv3ViTModel, in their files and
# in the `state_dict()` of transformers 5. A name comes before the names that it contains.
HUGGING_FACE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "encoder.layer": "blocks",
    "model.layer": "blocks",
    "layers": "blocks",
    "layer": "blocks",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm": "norm",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "attention.attention": "attention",
    "attention.q_proj": "attention.query",
    "attention.k_proj": "attention.key",
    "attention.v_proj": "attention.value",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
QUERY_KEY_VALUE = ("query", "key", "value")
MOST_ENCODERS = 16  # in a file: each takes a pass over all names
# A ConvNeXt block's modules here and their index in torchvision's `Sequential`.
CONVNEXT_BLOCK = {"conv_dw": "0", "norm": "2", "mlp.fc1": "3", "mlp.fc2": "5"}


def is_convnext(state: State) -> bool:
    """Whether a state in this project's names is a ConvNeXt's."""
    return "stages.0.blocks.0.gamma" in state


def is_vit(state: State) -> bool:
    """Whether a state in this project's names is a ViT's, not a ResNet's."""
    return "cls_token" in state


def to_torchvision(state: State) -> State:
    """An encoder's arrays under torchvision's names."""
    if is_convnext(state):
        return dict(_to_torchvision_convnext(*item) for item in state.items())
    names = _torchvision_vit_names(state) if is_vit(state) else {}
    return {names.get(name, name): array for name, array in state.items()}


def from_torchvision(state: State) -> State:
    """The reverse of `to_torchvision`; unknown names are unchanged."""
    if "features.1.0.layer_scale" in state:
        return dict(_from_torchvision_convnext(*item) for item in state.items())
    if "class_token" not in state:
        return state
    # torchvision's own published ViTs are older than its current names of the MLP.
    renewed = {
        name.replace("mlp.linear_1", "mlp.0").replace("mlp.linear_2", "mlp.3"): array
        for name, array in state.items()
    }
    ours = {theirs: ours for ours, theirs in _torchvision_vit_names(renewed).items()}
    return {ours.get(name, name): array for name, array in renewed.items()}


def is_rotary(state: State) -> bool:
    """Whether a ViT's state in this project's names has rotary positions."""
    return state["pos_embed"].ndim == 1


def has_swiglu(state: State) -> bool:
    """Whether a ViT's state in this project's names has gated feed-forward networks."""
    first, last = (state.get(f"blocks.0.mlp.fc{n}.weight") for n in (1, 2))
    if first is None or last is None or not first.ndim == last.ndim == 2:
        return False
    return first.shape[0] == 2 * last.shape[1]


def to_timm(state: State) -> State:
    """An encoder's arrays as timm's: a ViT with registers has positions of the patches alone."""
    if "reg_token" not in state:
        return state
    own, *patches = np.split(state["pos_embed"], [1], axis=1)
    return {**state, "cls_token": state["cls_token"] + own, "pos_embed": patches[0]}


def from_timm(state: State) -> State:
    """The reverse of `to_timm`, also for positions that the registers share."""
    positions, registers = state.get("pos_embed"), state.get("reg_token", np.zeros((1, 0, 0)))
    if positions is None or not positions.ndim == registers.ndim == 3:
        return state
    if _is_square(positions.shape[1]):
        return {**state, "pos_embed": np.pad(positions, ((0, 0), (1, 0), (0, 0)))}
    count = registers.shape[1]
    if _is_square(positions.shape[1] - 1) or not _is_square(positions.shape[1] - 1 - count):
        return state
    own, of_registers, patches = np.split(positions, [1, 1 + count], axis=1)
    positions = np.concatenate([own, patches], axis=1)
    return {**state, "reg_token": registers + of_registers, "pos_embed": positions}


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def to_dinov2(state: State) -> State:
    """A ViT's arrays under DINOv2's names."""
    names = DINOV2 | (DINOV2_SWIGLU if has_swiglu(state) else {})
    return {_replaced(name, names): array for name, array in state.items()}


def from_dinov2(state: State) -> State:
    """The reverse of `to_dinov2`, also for the blocks of its training, which are in chunks.

    Reads DINOv3's arrays as well: a mask beside their biases sets those of the keys to 0.
    """
    names = {theirs: ours for ours, theirs in (DINOV2 | DINOV2_SWIGLU).items()}
    names |= DINOV3
    renamed = {
        re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", _replaced(name, names)): array
        for name, array in state.items()
    }
    for bias in [name for name in renamed if f"{name}_mask" in renamed]:
        renamed[bias] = np.where(renamed.pop(f"{bias}_mask") == 0, 0, renamed[bias])
    return renamed


def _replaced(name: str, names: dict[str, str]) -> str:
    """A name whose whole parts are replaced."""
    for old, new in names.items():
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name


def from_hugging_face(state: State) -> State:
    """The arrays of Hugging Face's ViTs in this project's names; others are unchanged.

    DINOv3's files have no periods of its rotary positions, which are the same for every size.
    """
    first = "embeddings.cls_token"
    prefixes = [name.removesuffix(first) for name in state if f".{name}".endswith(f".{first}")]
    check_number(prefixes)
    for prefix in prefixes:
        state = _from_hugging_face(state, prefix)
    return state


def check_number(encoders: Collection[str]) -> None:
    """Raises WeightsError for more encoders (their prefixes) than any project's file has."""
    if len(encoders) > MOST_ENCODERS:
        raise WeightsError(
            f"it has {len(encoders)} encoders; save one's state_dict() alone with torch.save"
        )


def _from_hugging_face(state: State, prefix: str) -> State:
    """As `from_hugging_face`, for the one ViT under a prefix."""
    found = {name: array for name, array in state.items() if not name.startswith(prefix)}
    inner = {
        _replaced(name.removeprefix(prefix), HUGGING_FACE): array
        for name, array in state.items()
        if name.startswith(prefix)
    }
    if f"{prefix}embeddings.patch_embeddings.weight" in state:  # as DINOv3 alone calls it
        inner["pos_embed"] = rotary_periods(DINOV3_PERIODS)
    for name, array in inner.items():
        part = re.fullmatch(r"(.+)\.attention\.(query|key|value)\.(.+)", name)
        gated = name.replace(".mlp.gate_proj.", ".mlp.fc1.")
        if gated != name and gated in inner:
            found[prefix + gated] = np.concatenate([array, inner[gated]])
        elif part is None:
            found.setdefault(prefix + name, array)
        elif part[2] == "query":
            parts = [inner.get(f"{part[1]}.attention.{each}.{part[3]}") for each in QUERY_KEY_VALUE]
            # DINOv3's keys have no bias.
            filled = [np.zeros_like(array) if each is None else each for each in parts]
            found[f"{prefix}{part[1]}.attn.qkv.{part[3]}"] = np.concatenate(filled)
    return found


def to_detectron2(state: State) -> State:
    """A ResNet's arrays under detectron2's names, as MoCo's converter chooses them."""
    return {_to_detectron2(name): array for name, array in state.items()}


def from_detectron2(state: State) -> State:
    """The reverse of `to_detectron2`."""
    return {_from_detectron2(name): array for name, array in state.items()}


def _torchvision_vit_names(state: State) -> dict[str, str]:
    """Torchvision's names by this project's, for the blocks that `state` has under either."""
    pattern = re.compile(r"(?:blocks\.|encoder\.layers\.encoder_layer_)(\d+)\.")
    blocks = {match[1] for name in state if (match := pattern.match(name))}
    names, modules = dict(VIT_ARRAYS), dict(VIT_MODULES)
    for block in blocks:
        ours, theirs = f"blocks.{block}.", f"encoder.layers.encoder_layer_{block}."
        names |= {ours + a: theirs + b for a, b in VIT_BLOCK_ARRAYS.items()}
        modules |= {ours + a: theirs + b for a, b in VIT_BLOCK_MODULES.items()}
    for leaf in ("weight", "bias"):
        names |= {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in modules.items()}
    return names


def _to_torchvision_convnext(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    if match := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", name):
        block = f"features.{2 * int(match[1]) + 1}.{match[2]}"
        if match[3] == "gamma":
            return f"{block}.layer_scale", array.reshape(-1, 1, 1)
        module, _, leaf = match[3].rpartition(".")
        return f"{block}.block.{CONVNEXT_BLOCK.get(module, module)}.{leaf}", array
    name = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"features.{2 * int(m[1])}", name)
    name = re.sub(r"^stem\.", "features.0.", name)
    return name.replace("head.norm.", "classifier.0."), array


def _from_torchvision_convnext(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    modules = {theirs: ours for ours, theirs in CONVNEXT_BLOCK.items()}
    if match := re.fullmatch(r"features\.(\d)\.(\d+)\.layer_scale", name):
        return f"stages.{int(match[1]) // 2}.blocks.{match[2]}.gamma", array.reshape(-1)
    if match := re.fullmatch(r"features\.(\d)\.(\d+)\.block\.(\d)\.(.+)", name):
        block = f"stages.{int(match[1]) // 2}.blocks.{match[2]}"
        return f"{block}.{modules.get(match[3], match[3])}.{match[4]}", array
    name = re.sub(r"^features\.0\.", "stem.", name)
    name = re.sub(r"^features\.(\d)", lambda m: f"stages.{int(m[1]) // 2}.downsample", name)
    return name.replace("classifier.0.", "head.norm."), array


def _to_detectron2(name: str) -> str:
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    if not name.startswith("layer"):
        return f"stem.{name}"
    return re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)


def _from_detectron2(name: str) -> str:
    name = re.sub(r"\bconv(\d)\.norm", r"bn\1", name)
    name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    name = name.removeprefix("stem.")
    return re.sub(r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}", name)
