"""Defines a protocol: its name, the datasets it takes, its settings, and how it runs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, get_args

from cassle_jax.data import Drawn
from cassle_jax.data.datasets import EvaluationData, Task
from cassle_jax.data.sources import views_of
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Finding
from cassle_jax.evaluation.needs import Needs
from cassle_jax.evaluation.settings import Analysis, Settings, settings_of

DRAWN = "drawn"
"""The kind of the embedded datasets, whose factors are known."""

OBJECTS = "objects"
"""The kind of datasets with several views per object, whose differences are known."""

ANY: tuple[str, ...] = get_args(Task)

TWO_IMAGES = Needs(test=2)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A measurement of a subject on a dataset.

    Attributes:
      name: its name in `--tasks`, in the report and in its CSV.
      title: heading of its section of the page.
      run: measures a subject on a dataset, with the settings; returns findings whose `task` is
        the protocol's name.
      takes: the kinds of dataset it suits: their tasks, `DRAWN` or `OBJECTS`.
      usual: the kinds that it runs on where no tasks are requested; `None` for all it suits.
      needs: the least that it needs of a dataset, or a function of the settings and the number of
        devices that returns it.
      settings: the dataclass of its settings.
    """

    name: str
    title: str
    run: Callable[[Bench, Any], list[Finding]]
    takes: Sequence[str] = ANY
    usual: Sequence[str] | None = None
    needs: Needs | Callable[[Any, int], Needs] = TWO_IMAGES
    settings: type[Settings] = Settings

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ValueError(
                f"name={self.name!r} of a protocol is not one word, such as 'few_shot'"
            )
        for kind in (*self.takes, *(self.usual or ())):
            if kind not in (known := (*ANY, DRAWN, OBJECTS)):
                raise ValueError(f"{self.name} takes {kind!r}; use {', '.join(known)}")
        settings_of([self.settings])

    def suits(self, data: EvaluationData, *, requested: bool) -> bool:
        """Whether the protocol runs on a dataset, by request or by default."""
        kinds = {data.task} | ({DRAWN} if isinstance(data.test, Drawn) else set())
        kinds |= {OBJECTS} if views_of(data.test) > 1 else set()
        usual = self.takes if requested or self.usual is None else self.usual
        return not kinds.isdisjoint(usual)

    def measure(self, bench: Bench, settings: Settings) -> list[Finding]:
        """Runs the protocol.

        Args:
          bench: the subject and the dataset.
          settings: the protocol's settings.

        Returns:
          The findings.

        Raises:
          ValueError: a finding has the name of another protocol or dataset; or an error of `run`.
        """
        findings = list(self.run(bench, settings))
        for each in findings:
            if (each.task, each.dataset) != (self.name, bench.data.name):
                raise ValueError(
                    f"a finding of {self.name} on {bench.data.name} has task={each.task!r} and "
                    f"dataset={each.dataset!r}; use PROTOCOL.name and bench.data.name"
                )
        return findings

    def unmet(
        self, data: EvaluationData, settings: Settings, *, limit: int = 0, devices: int = 1
    ) -> str:
        """The first need that the dataset does not meet, in one line; "" where it meets all.

        Args:
          data: the dataset.
          settings: the protocol's settings.
          limit: largest number of images per part; 0 for all.
          devices: number of devices.
        """
        needs = self.needs if isinstance(self.needs, Needs) else self.needs(settings, devices)
        analysed = settings.analysed if isinstance(settings, Analysis) else 0
        return needs.unmet(data, limit=limit, analysed=analysed)
