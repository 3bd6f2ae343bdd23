"""Rows that the short tables share: twelve epochs of Tiny-ImageNet at 64 pixels, ResNet-18."""

from cassle_jax.sweep.table import Row

BASE = (
    "data.classes=tiny_imagenet80",
    "epochs=12",
    "batch_size=256",
    "encoder.small_images=False",
    "optimizer.name=adamw",
    "optimizer.base_learning_rate=0.002",
    "optimizer.weight_decay=1e-4",
    "optimizer.warmup_epochs=1.0",
    "checkpoint.every_steps=100000",
)
# Name and settings of the methods, by name in the table.
METHODS = {
    "SimCLR": ("simclr", ()),
    "MoCo-v2": ("moco_v2", ("method.momentum=0.99", "method.queue_size=16384")),
    "Barlow Twins": (
        "barlow_twins",
        (
            "method.projector_hidden=1024",
            "method.projector_out=1024",
            "method.vector_rate=1.0",
        ),
    ),
}
COLOURS = "color.hue+color.saturation+grayscale"
VARIANTS = {
    "plain": ("conditioning=none",),
    "AugSelf": ("conditioning=none", "augself=main"),
    "CASSLE": ("conditioning=cassle",),
    "leak-free": ("conditioning=leak_free",),
    "CASSLE + plain branch": ("conditioning=cassle", "conditioning.plain_branch=0.5"),
    "leak-free + plain branch": ("conditioning=branched",),
    "leak-free + plain branch 0.8": ("conditioning=leak_free", "conditioning.plain_branch=0.8"),
    "leak-free + dropout 0.5": ("conditioning=leak_free", "conditioning.dropout=0.5"),
    "leak-free from a third on": ("conditioning=leak_free", "conditioning.start_epoch=4"),
    "colours": (f"conditioning={COLOURS}",),
    "colours + crop + blur": (f"conditioning=blur+crop+{COLOURS}",),
    "colours + plain branch": (f"conditioning={COLOURS}", "conditioning.plain_branch=0.5"),
}
COMPARED = ("plain", "AugSelf", "CASSLE", "leak-free", "leak-free + plain branch")


def row(method: str, variant: str, *settings: str, name: str = "") -> Row:
    """A variant of a method; its baseline is the plain variant with the same further settings.

    Args:
      method: a name in `METHODS`.
      variant: a name in `VARIANTS`.
      settings: further settings, as `name=value`.
      name: their name in the row's subject, after the method's.
    """
    builder, own = METHODS[method]
    return Row(
        f"{method}{name}, {variant}",
        f"configs/tiny_imagenet.py:method={builder}",
        (*own, *VARIANTS[variant], *settings),
        against=f"{method}{name}, plain",
    )
