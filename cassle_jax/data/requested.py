"""Opens the evaluation datasets that a command names: of the table, drawn, or a user's folder."""

from collections.abc import Sequence
from functools import partial

from cassle_jax.checks import ConfigError, check_one_of
from cassle_jax.data.datasets import DATASETS, OWN_FOLDER, EvaluationData, open_dataset
from cassle_jax.data.families import FAMILIES, SPLITS, open_drawn
from cassle_jax.faults import retried

_DRAWN, _DRAWN_PIXELS = 5000, 64


def check_datasets(datasets: Sequence[str]) -> None:
    """Raises ConfigError, with the closest known name, for an unknown one; opens nothing."""
    for dataset in datasets:
        if not dataset.startswith(OWN_FOLDER):
            check_one_of("datasets", dataset.partition("=")[0], (*DATASETS, *FAMILIES))


def open_datasets(datasets: Sequence[str], data_dir: str) -> list[EvaluationData]:
    """Opens every dataset as `open_evaluated` does; raises ConfigError where two have one name."""
    opened = [retried(each, partial(open_evaluated, each, data_dir)) for each in datasets]
    names = [data.name for data in opened]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"dataset {name!r} is named twice; give each dataset once")
    return opened


def open_evaluated(described: str, data_dir: str) -> EvaluationData:
    """Opens a dataset by its name in the table, a drawn one, `folder:<path>`, or `name=<path>`.

    Raises:
      DataError: the dataset is missing or incomplete.
    """
    if described in FAMILIES:
        train, val, test = (open_drawn(described, _DRAWN, _DRAWN_PIXELS, each) for each in SPLITS)
        classes = len(test.class_names)
        return EvaluationData(described, train, val, test, classes, "accuracy", "classification")
    if described.startswith(OWN_FOLDER):
        return open_dataset(described)
    name, _, path = described.partition("=")
    return open_dataset(name, path=path, data_dir=data_dir)


def datasets_in(text: str) -> tuple[str, ...]:
    """The datasets in a comma-separated list; a comma that no dataset follows belongs to a path."""
    found: list[str] = []
    for piece in text.split(",") if text else []:
        name = piece.strip().partition("=")[0]
        begins = name in DATASETS or name in FAMILIES or piece.strip().startswith(OWN_FOLDER)
        if found and not begins and (":" in found[-1] or "=" in found[-1]):
            found[-1] += f",{piece}"
        else:
            found.append(piece.lstrip() if "=" in piece or ":" in piece else piece.strip())
    return tuple(found)
