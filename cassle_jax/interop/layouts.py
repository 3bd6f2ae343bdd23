"""Finds the encoder, and the heads that fit this project's, in the checkpoints of other projects.

A checkpoint's names are read as paths: nested dicts count as one more part of the name. So the
encoder is the part beside a stem (`conv1.weight`, `cls_token`), wherever that is: in MoCo-v2's
`state_dict`, `module.encoder_q.…`, in VISSL's `classy_state_dict`, `…trunk._feature_blocks.…`, or
in DINO's `teacher`, `backbone.…`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.naming import (
    check_number,
    from_dinov2,
    from_hugging_face,
    from_timm,
    from_torchvision,
    is_convnext,
    is_vit,
)
from cassle_jax.interop.pytorch import State

# Prefixes that DataParallel, torch.compile, FSDP, activation checkpointing and Fabric add to names.
WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
# Networks that are not evaluated where a file has another one: DINO evaluates the teacher.
COPIES = re.compile(r"(^|[._])(momentum|ema|k|key|target|student)([._]|$)")
COUNTERS = ("num_batches_tracked", "n_averaged")  # BatchNorm's, torch's AveragedModel's
# Names next to an encoder's own arrays: classifiers, and the heads of SwAV and others.
HEADS = ("fc.", "head.", "heads.", "linear.", "classifier.", "projection_head.", "prototypes.")
# Arrays that only the pretraining of DINOv2, DINOv3, MAE and Hugging Face's ViT uses.
OF_TRAINING = ("mask_token", "local_cls_norm.", "decoder_", "pooler.")
BESIDE = HEADS + OF_TRAINING
OWN = "head.norm."  # a ConvNeXt's last LayerNorm, which is part of the encoder
# An array that each encoder has once. A ConvNeXt's stem.0.weight is none: other networks have it.
STEM = re.compile(
    r"((?:.+\.)?)(?:conv1\.weight|cls_token|class_token"
    r"|stages\.0\.blocks\.0\.gamma|features\.1\.0\.layer_scale)"
)
IN_A_BLOCK = re.compile(r"(?:.+\.)?(?:layer\d|\d+)\.\d+\.")
DEEPEST = 16  # levels of nested dicts
MOST_NAMES = 100_000  # dicts that share dicts multiply: a small file could have any number
KNOWN = (
    "known are checkpoints of CASSLE, AugSelf, MoCo, SimSiam, SwAV, DINO, DINOv2, DINOv3, MAE, "
    "VISSL, Lightly and solo-learn and models of torchvision, timm and Hugging Face"
)
# Attributes of `Weights` that follow from a ViT's layout and not from its arrays. DINOv2's models
# without registers interpolate positions in another way, and on Hugging Face in a third one.
MOCO_V3 = {"heads": 12}
DINOV2, HUGGING_FACE = {"position_offset": 0.1}, {"position_offset": 0.0}


def flat_names(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Everything in nested dicts by its path, without the names that module wrappers add.

    A dict within itself is left out, since files may hold one; a dict under two names has both.

    Raises:
        WeightsError: two arrays have one name, or there are more names than a checkpoint has.
    """
    flat, waiting, visited = {}, [("", content, ())], 0
    while waiting:
        path, value, above = waiting.pop()
        visited += 1
        if not isinstance(value, Mapping):
            if flat.setdefault(path, value) is not value:
                raise WeightsError(f"it has two arrays called {path}")
        elif id(value) not in above and len(above) < DEEPEST:
            names = [name for name in value if isinstance(name, str)]
            above = (*above, id(value))
            waiting += [(_joined(path, name), value[name], above) for name in reversed(names)]
        if visited + len(waiting) > MOST_NAMES:
            raise WeightsError(f"it has more than {MOST_NAMES} names; save the state_dict() alone")
    return flat


def _joined(path: str, name: str) -> str:
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join([path, *parts] if path else parts)


def networks_in(
    content: Mapping[Any, Any],
) -> tuple[dict[str, State], tuple[str, ...], dict[str, Any]]:
    """The encoder and, where they exist, its `projector`, `predictor` and `image_conditioner`.

    Args:
        content: content of the file: a state dict, or dicts that hold some.

    Returns:
        The networks' states by name; the names of everything else beside them; and the
        attributes of `Weights` that follow from the layout.

    Raises:
        WeightsError: there is no encoder, or more than one and no way to choose.
    """
    flat = flat_names(content)
    named = _with_named_stages(_arrays_in(flat))
    arrays = from_hugging_face(named)
    prefix = _prefix(arrays)
    parent, _, called = prefix.removesuffix(".").rpartition(".")
    parent = f"{parent}." if parent else ""
    is_moco_v3 = called == "base_encoder"

    encoder, heads = _without_heads(_under(arrays, prefix))
    networks = {"encoder": encoder}
    if called == "backbone":
        beside = {name: _under(arrays, f"{parent}{name}.") for name in PUBLISHED_HEADS}
        networks |= {name: state for name, state in beside.items() if state}
    elif is_moco_v3 and (projector := _mlp_with_batch_norm(heads, encoder)):
        heads = {}
        networks["projector"] = projector
        if predictor := _under(arrays, f"{parent}predictor."):
            networks["predictor"] = predictor
    if "projector" in networks:
        networks["projector"] = _projector_names(networks["projector"])
    taken = {called, *(networks.keys() - {"encoder"})}
    beside = dict.fromkeys(name.split(".")[0] for name in _under(flat, parent)) if prefix else {}
    unread = (*_summed(heads), *(name for name in beside if name not in taken))
    if is_moco_v3 and is_vit(encoder):
        return networks, unread, MOCO_V3
    if "mask_token" in heads and "blocks.0.ls1.gamma" in encoder and "reg_token" not in encoder:
        return networks, unread, DINOV2 if arrays is named else HUGGING_FACE
    return networks, unread, {}


def _arrays_in(flat: Mapping[str, Any]) -> State:
    """The arrays, without counters, which no result depends on."""
    return {
        name: value
        for name, value in flat.items()
        if isinstance(value, np.ndarray) and not name.endswith(COUNTERS)
    }


PUBLISHED_HEADS = ("projector", "predictor", "image_conditioner")


def _under(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under a prefix, without it in their names."""
    return {name.removeprefix(prefix): flat[name] for name in flat if name.startswith(prefix)}


def _prefix(arrays: State) -> str:
    """The prefix of the names of the encoder to read."""
    stems = (match[1] for name in arrays if (match := STEM.fullmatch(name)))
    prefixes = [prefix for prefix in dict.fromkeys(stems) if not IN_A_BLOCK.fullmatch(prefix)]
    if not prefixes:
        names = ", ".join([*arrays][:3])
        raise WeightsError(
            f"it has neither a ResNet's conv1.weight nor a ViT's cls_token nor a ConvNeXt's "
            f"gamma, but {names}…; {KNOWN}"
        )
    prefixes = [name for name in prefixes if not COPIES.search(name)] or prefixes
    check_number(prefixes)
    first, *others = prefixes
    different = [other for other in others if not _same(_under(arrays, first), arrays, other)]
    if different:
        raise WeightsError(
            f"it has several encoders: {_listed([first, *different])}; save one's state_dict() "
            "alone with torch.save"
        )
    return first


def _same(state: State, arrays: State, prefix: str) -> bool:
    other = _under(arrays, prefix)
    return state.keys() == other.keys() and all(
        np.array_equal(state[name], other[name]) for name in state
    )


def _listed(prefixes: Sequence[str]) -> str:
    return ", ".join(prefix.removesuffix(".") or "one without a name" for prefix in prefixes)


def _with_named_stages(arrays: State) -> State:
    """Names the stages of ResNets that are a `Sequential` of their parts, as Lightly's are."""
    found: dict[str, list[int]] = {}
    for name in arrays:
        if match := re.fullmatch(r"((?:.+\.)?)(\d{1,3})\.0\.conv1\.weight", name):
            found.setdefault(match[1], []).append(int(match[2]))
    sequences = {
        prefix: sorted(stages)
        for prefix, stages in found.items()
        if len(stages) == 4 and f"{prefix}0.weight" in arrays
    }
    check_number(sequences)
    renamed = {}
    for prefix, stages in sequences.items():
        _check_stem(stages[0], arrays[f"{prefix}0.weight"])
        parts = {0: "conv1", 1: "bn1"} | {n: f"layer{i}" for i, n in enumerate(stages, 1)}
        for number, part in parts.items():
            renamed |= {
                f"{prefix}{number}.{rest}": f"{prefix}{part}.{rest}"
                for rest in _under(arrays, f"{prefix}{number}.")
            }
    return {renamed.get(name, name): array for name, array in arrays.items()}


def _check_stem(first_stage: int, kernel: np.ndarray) -> None:
    """Refuses a stem of other parts than convolution, BatchNorm, ReLU and optional max-pooling."""
    if first_stage == 4 or (first_stage == 3 and kernel.shape[-1] == 3):
        return
    lacks = "ReLU" if first_stage == 2 else "max-pooling"
    raise WeightsError(
        f"its ResNet is a Sequential without {lacks} after the stem's BatchNorm, which no ResNet "
        "here computes; pretrain with a torchvision ResNet in the Sequential"
    )


def _summed(names: Iterable[str]) -> dict[str, None]:
    """The names, those of a decoder by their first parts."""
    return dict.fromkeys(
        name.split(".")[0] if name.startswith("decoder_") else name for name in names
    )


def _without_heads(state: State) -> tuple[State, State]:
    """An encoder's arrays in this project's names, and the arrays of heads among them."""
    state = {
        re.sub(r"\bshortcut\.(?=\d)", "downsample.", name): array
        for name, array in from_torchvision(state).items()
    }
    if is_vit(state):
        state = from_timm(from_dinov2(state))
    heads = {
        name: array
        for name, array in state.items()
        if name.startswith(BESIDE) and not (is_convnext(state) and name.startswith(OWN))
    }
    return {name: state[name] for name in state if name not in heads}, heads


def _mlp_with_batch_norm(heads: State, encoder: State) -> State:
    """MoCo-v3's projector, in the place of a classifier; empty where that is a classifier."""
    projector = _under(heads, "head." if is_vit(encoder) else "fc.")
    return projector if any(name.startswith("1.") for name in projector) else {}


def _projector_names(state: State) -> State:
    """A plain projector's names: some are a bare `Sequential`, which CASSLE calls `projector`."""
    bare = all(name[:1].isdigit() for name in state)
    return {f"projector.{name}" if bare else name: array for name, array in state.items()}
