"""Rows that the paper's tables share: methods, variants, ablations, and evaluation datasets."""

from collections.abc import Mapping

from cassle_jax.sweep.table import Row, Table

METHODS = {
    "MoCo-v2": "moco_v2",
    "SimCLR": "simclr",
    "Barlow Twins": "barlow_twins",
    "MoCo-v3": "moco_v3",
    "BYOL": "byol",
    "SimSiam": "simsiam",
}
VARIANTS = {
    "plain": "conditioning=none",
    "AugSelf": "conditioning=none,augself=main",
    "CASSLE": "conditioning=cassle",
}
# Base learning rates of the authors' logged runs that differ from 0.03. MoCo-v3 uses AdamW with the
# rate of the MoCo-v3 paper.
LEARNING_RATES = {
    "Barlow Twins": dict.fromkeys(VARIANTS, 0.05),
    "SimSiam": dict.fromkeys(VARIANTS, 0.05),
    "BYOL": {"CASSLE": 0.05},
}
# In the order of the paper's table.
LINEAR = (
    "aircraft", "caltech101", "cars", "cifar10", "cifar100", "dtd", "flowers102", "food101",
    "mit67", "pets", "sun397",
)  # fmt: skip
MORE_LINEAR = ("cub200", "300w")
IMAGENET100 = "configs/imagenet100.py:follow=published"


def rows_of(config: str, methods: Mapping[str, str] = METHODS) -> tuple[Row, ...]:
    """Rows for plain, AugSelf and CASSLE, per method.

    Args:
      config: a configuration file with its arguments, without method and variant.
      methods: configuration names of the methods, by name in the table.
    """
    return tuple(
        Row(f"{method}, {variant}", f"{config},method={name},{arguments}", _rate(method, variant))
        for method, name in methods.items()
        for variant, arguments in VARIANTS.items()
    )


def moco_rows() -> tuple[Row, ...]:
    """The three variants of MoCo-v2 on ImageNet-100, which several tables share."""
    return rows_of(IMAGENET100, {"MoCo-v2": "moco_v2"})


def ablation(title: str, question: str, settings: Mapping[str, tuple[str, ...]]) -> Table:
    """A table of MoCo-v2 with CASSLE on ImageNet-100; every row varies a setting, against plain.

    Args:
      title: title of the table.
      question: question that the table answers.
      settings: overrides `name=value`, by the row's subject.
    """
    rows = [
        Row(subject, f"{IMAGENET100},conditioning=cassle", own, against="plain")
        for subject, own in settings.items()
    ]
    return Table(
        title=title,
        question=question,
        rows=(Row("plain", f"{IMAGENET100},conditioning=none"), *rows),
        seeds=(0,),
        datasets=LINEAR,
        tasks=("linear",),
    )


def _rate(method: str, variant: str) -> tuple[str, ...]:
    rate = LEARNING_RATES.get(method, {}).get(variant)
    return (f"optimizer.base_learning_rate={rate}",) if rate else ()
