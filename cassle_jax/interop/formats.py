"""Writes an encoder in the file formats of other libraries, with lines that load each of them."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from cassle_jax.interop.architecture import (
    VIT_HEADS,
    Architecture,
    ResNetArchitecture,
    ViTArchitecture,
)
from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.naming import to_detectron2, to_dinov2, to_timm, to_torchvision
from cassle_jax.interop.pytorch import State
from cassle_jax.interop.torch_file import write_detectron2
from cassle_jax.interop.weights import Weights
from cassle_jax.storage import make_shared, write_whole, written_whole

Card = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format for weights.

    Attributes:
        title: title in the model card.
        files: names of its files.
        check: raises WeightsError for an architecture that the format cannot hold, or on a machine
            that cannot write it.
        write: writes weights with their model card into a folder.
        loading: returns the language and the lines of code that load the files.
    """

    title: str
    files: tuple[str, ...]
    check: Callable[[Architecture], None]
    write: Callable[[Weights, Architecture, Card, Path], None]
    loading: Callable[[Architecture, Card], tuple[str, list[str]]]


def save_safetensors(arrays: State, path: Path, card: Card) -> None:
    """Writes arrays with their model card."""
    # `save` writes the memory of an array as it lies there, as in PyTorch's channels-last files.
    rows_first = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    data = save(rows_first, {"format": "pt", "card": json.dumps(card)})
    # safetensors shuffles its metadata: sort them, so that equal weights are equal files.
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(data)[start:])  # a slice of bytes would copy the weights


def timm_config(architecture: Architecture, card: Card) -> dict[str, Any]:
    """The `config.json` that timm needs: the architecture and the preparation of its images."""
    config = architecture.timm_config()
    size = card["input"]["size"]
    prepared = {
        "input_size": [architecture.channels, size, size],
        "mean": card["input"]["mean"],
        "std": card["input"]["std"],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": 0,
    }
    return {
        **config,
        "num_classes": 0,
        "num_features": architecture.feature_width,
        "pretrained_cfg": {**config["pretrained_cfg"], **prepared},
    }


def _write_cassle(weights: Weights, _: Architecture, card: Card, folder: Path) -> None:
    save_safetensors(weights.flat(), folder / "cassle.safetensors", card)


def _write_torchvision(weights: Weights, _: Architecture, card: Card, folder: Path) -> None:
    save_safetensors(to_torchvision(weights.encoder), folder / "torchvision.safetensors", card)


def _write_timm(weights: Weights, architecture: Architecture, card: Card, folder: Path) -> None:
    make_shared(folder / "timm")
    save_safetensors(to_timm(weights.encoder), folder / "timm" / "model.safetensors", card)
    config = json.dumps(timm_config(architecture, card), indent=2)
    write_whole(folder / "timm" / "config.json", config)


def _write_dinov2(weights: Weights, _: Architecture, card: Card, folder: Path) -> None:
    save_safetensors(to_dinov2(weights.encoder), folder / "dinov2.safetensors", card)


def _write_detectron2(weights: Weights, _: Architecture, card: Card, folder: Path) -> None:
    del card
    write_detectron2(folder / "detectron2.pkl", to_detectron2(weights.encoder), "cassle_jax")


def _write_torch(weights: Weights, _: Architecture, card: Card, folder: Path) -> None:
    del card
    import torch

    state = to_torchvision(weights.encoder)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
    with written_whole(folder / "torch.pth") as file:
        torch.save(tensors, file)


def _check_nothing(_: Architecture) -> None:
    pass


def _check_timm(architecture: Architecture) -> None:
    architecture.timm_config()


def _check_torchvision(architecture: Architecture) -> None:
    if isinstance(architecture, ViTArchitecture):
        architecture.check_torchvision()


def _check_dinov2(architecture: Architecture) -> None:
    if not isinstance(architecture, ViTArchitecture):
        raise WeightsError(
            f"DINOv2's format has names for ViTs only, not for {architecture.name}; use the format "
            "torchvision or timm"
        )
    architecture.check_positions()


def _check_detectron2(architecture: Architecture) -> None:
    if not isinstance(architecture, ResNetArchitecture):
        raise WeightsError(
            f"detectron2's format has names for ResNets only, not for {architecture.name}; "
            "use the format torchvision or timm"
        )
    if architecture.small_images or architecture.channels != 3:
        what = "3×3" if architecture.small_images else f"{architecture.channels}-channel"
        raise WeightsError(
            f"detectron2's ResNets have a 7×7 stem on 3 channels, this {architecture.name} a {what}"
            " one; use the format torchvision"
        )
    if architecture.depth < 50 and architecture.width != 64:
        raise WeightsError(
            f"detectron2's {architecture.name} has width 64, and this one {architecture.width}; "
            "use the format torchvision"
        )


def _check_torch(architecture: Architecture) -> None:
    _check_torchvision(architecture)
    if isinstance(architecture, ViTArchitecture):
        usual = VIT_HEADS.get(architecture.width, architecture.heads)
        if architecture.heads != usual:
            raise WeightsError(
                f"the format torch does not hold the {architecture.heads} heads of this ViT of "
                f"width {architecture.width}, which would be taken for {usual}; use the format "
                "torchvision"
            )
    if importlib.util.find_spec("torch") is None:
        raise WeightsError(
            "the format torch is written by PyTorch, which is not installed; pip install torch, or "
            "use the format torchvision, which PyTorch reads as well"
        )


def _load_cassle(*_) -> tuple[str, list[str]]:
    return "python", [
        "from cassle_jax.augment import center_view",
        "from cassle_jax.methods import ViewBatch",
        "from cassle_jax.subjects import open_subject",
        "",
        'model = open_subject("cassle.safetensors")  # its networks, their variables, its settings',
        "view = center_view(image, None, model.spec)  # of an image, uint8 [height, width, 3], RGB",
        "views = ViewBatch(view[None], model.conditioning.neutral[None])",
        'features = model.networks.apply(model.variables, views, train=False, method="encode")',
    ]


def _load_torchvision(architecture: Architecture, _: Card) -> tuple[str, list[str]]:
    return "python", [
        "import torch",
        "import torchvision",
        "from safetensors.torch import load_file",
        "",
        *architecture.torchvision_lines(),
        'model.load_state_dict(load_file("torchvision.safetensors"))',
    ]


def _load_torch(architecture: Architecture, _: Card) -> tuple[str, list[str]]:
    return "python", [
        "import torch",
        "import torchvision",
        "",
        *architecture.torchvision_lines(),
        'model.load_state_dict(torch.load("torch.pth", weights_only=True))',
    ]


def _load_timm(*_) -> tuple[str, list[str]]:
    return "python", [
        "import timm",
        "",
        'model = timm.create_model("local-dir:timm", pretrained=True, num_classes=0)',
    ]


def _load_dinov2(architecture: ViTArchitecture, _: Card) -> tuple[str, list[str]]:
    return "python", [
        "from dinov2.models.vision_transformer import DinoVisionTransformer",
        "from safetensors.torch import load_file",
        "",
        *architecture.dinov2_lines(),
        "# strict=False: mask_token, which features do not use, is missing.",
        'model.load_state_dict(load_file("dinov2.safetensors"), strict=False)',
    ]


def _load_detectron2(architecture: Architecture, card: Card) -> tuple[str, list[str]]:
    """The settings of detectron2 that make its ResNet this one."""
    mean, std = ([round(255 * v, 3) for v in card["input"][name]] for name in ("mean", "std"))
    lines = [
        "MODEL:",
        "  WEIGHTS: detectron2.pkl",
        f"  PIXEL_MEAN: {mean}",
        f"  PIXEL_STD: {std}",
        "  RESNETS:",
        f"    DEPTH: {architecture.depth}",
        "    STRIDE_IN_1X1: False",
        f"    STEM_OUT_CHANNELS: {architecture.width}",
        f"    WIDTH_PER_GROUP: {architecture.width * architecture.widening}",
        f"    RES2_OUT_CHANNELS: {architecture.feature_width // 8}",
    ]
    return "yaml", [*lines, "INPUT:", "  FORMAT: RGB"]


FORMATS = {
    "cassle": Format(
        "cassle_jax, heads included",
        ("cassle.safetensors",),
        _check_nothing,
        _write_cassle,
        _load_cassle,
    ),
    "torchvision": Format(
        "torchvision",
        ("torchvision.safetensors",),
        _check_torchvision,
        _write_torchvision,
        _load_torchvision,
    ),
    "timm": Format(
        "timm",
        ("timm/model.safetensors", "timm/config.json"),
        _check_timm,
        _write_timm,
        _load_timm,
    ),
    "dinov2": Format(
        "DINOv2",
        ("dinov2.safetensors",),
        _check_dinov2,
        _write_dinov2,
        _load_dinov2,
    ),
    "detectron2": Format(
        "detectron2",
        ("detectron2.pkl",),
        _check_detectron2,
        _write_detectron2,
        _load_detectron2,
    ),
    "torch": Format(
        "torchvision, PyTorch's own file",
        ("torch.pth",),
        _check_torch,
        _write_torch,
        _load_torch,
    ),
}
USUAL = ("cassle", "torchvision", "timm")
