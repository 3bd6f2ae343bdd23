"""Settings of reading and encoding images, which all protocols share."""

import dataclasses
from typing import Any

from cassle_jax.augment import AugmentSpec
from cassle_jax.checks import ConfigError, check_at_least, check_one_of
from cassle_jax.evaluation.settings import Settings, setting


@dataclasses.dataclass(frozen=True)
class Extraction(Settings):
    """The evaluated network, and the size, number and normalisation of the images it sees."""

    network: str = setting("online", "Network of a run to evaluate: online or momentum.")
    batch: int = setting(256, "Images per step, all devices together.")
    limit: int = setting(0, "Largest number of images per part; 0: all.")
    size: int = setting(0, "Side of an image in pixels; 0: as in training.")
    mean: tuple[float, ...] = setting((), "Mean per channel, in [0, 1]; default: training's.")
    std: tuple[float, ...] = setting((), "Standard deviation per channel; default: training's.")

    def __post_init__(self):
        check_one_of("network", self.network, ("online", "momentum"))
        check_at_least("batch", self.batch, 2)
        check_at_least("limit", self.limit, 0)
        try:
            AugmentSpec(**{"size": 1, "blur": 0, **self.prepared})
        except ValueError as error:
            raise ConfigError(str(error).removeprefix("augment.")) from error

    @property
    def prepared(self) -> dict[str, Any]:
        """`size`, `mean` and `std`, where they differ from training's."""
        return {name: value for name in ("size", "mean", "std") if (value := getattr(self, name))}
