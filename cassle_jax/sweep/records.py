"""Reads the folder of a sweep's or table's run: its state, and why it failed."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from ml_collections import ConfigDict

from cassle_jax.checks import ConfigError
from cassle_jax.command import EXIT_DIVERGED, Stop
from cassle_jax.data import DataError, names_of, open_source
from cassle_jax.faults import Outage, retried
from cassle_jax.sweep.jobs import LOG_FILE, outcome_of
from cassle_jax.training.saved_config import changes, read_config
from cassle_jax.training.start_records import last_start_record

FINISHED, DIVERGED, FAILED, MISSING = "finished", "diverged", "failed", "missing"


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run, or an evaluation, by its folder; every property reads the folder again.

    Attributes:
      folder: workdir of the run; need not exist.
    """

    folder: Path

    @property
    def exit_code(self) -> int | None:
        """The exit code; `None` where the run has not ended, or was killed."""
        outcome = outcome_of(self.folder)
        return None if outcome is None else int(outcome["exit_code"])

    @property
    def state(self) -> str:
        """`missing`, `finished`, `diverged` or `failed`."""
        if self.exit_code is None:
            return FAILED if self.folder.exists() else MISSING
        return {0: FINISHED, EXIT_DIVERGED: DIVERGED}.get(self.exit_code, FAILED)

    @property
    def reason(self) -> str:
        """The last line of a run that failed, and where to read more."""
        outcome = outcome_of(self.folder) or {"last_line": "the process was killed"}
        line = str(outcome["last_line"]).removeprefix("error: ")
        return f"{line} (see {self.folder / LOG_FILE})"

    @property
    def failure(self) -> str:
        """One line with the run's name and the reason of its failure."""
        return f"{self.folder.name}: {self.reason}"

    def changes(self, config: ConfigDict, *, opens: bool = True) -> list[str]:
        """The settings in which the run differs from a configuration, such as `steps=9 was 7`.

        Images with other names count, a `data.path` that moved does not.

        Args:
          config: the configuration.
          opens: whether to compare the images, which only a run's own host may have.

        Raises:
          DataError: the images cannot be opened at another `data.path` than the run's.
        """
        before = read_config(self.folder)
        changed = list(changes(before, config).values())
        return changed or (self._other_images(before, config) if opens else [])

    def _other_images(self, before: ConfigDict, now: ConfigDict) -> list[str]:
        names = last_start_record(self.folder, sys.maxsize).get("names")
        if names is None:  # drawn images, and older versions' runs
            return []
        path = before.data.get("path", "")
        try:
            if names == _names_of(json.dumps(now.data.to_dict())):
                return []
        except (DataError, Outage):
            if path == now.data.path:  # there are no images to compare
                return []
            raise
        if path == now.data.path:
            return ["its training images have changed since"]
        return [f"data.path={now.data.path!r} has other images than {path!r} had"]

    def check_same(self, config: ConfigDict, *, opens: bool = True) -> None:
        """Raises ConfigError where the run had other settings than the requested ones."""
        if changed := self.changes(config, opens=opens):
            raise ConfigError(
                f"{self.folder} holds a run with other settings ({'; '.join(changed)}); use "
                "another folder (--to), or the run's settings"
            )


@cache
def _names_of(data: str) -> str | None:
    """See `names_of`, for the training images of `data` settings as JSON; lists them once."""
    settings = ConfigDict(json.loads(data))
    opened = partial(open_source, settings, settings.train_split)
    return names_of(retried(f"data.path={settings.path}", opened))


def check_finished(records: Sequence[RunRecord]) -> None:
    """Raises Stop with the reason of the first run that did not finish."""
    failed = [record for record in records if record.state != FINISHED]
    if failed:
        raise Stop(f"{len(failed)} of {len(records)} runs failed; {failed[0].failure}", 1)


def workdir_of(folder: Path, name: str) -> Path:
    """The workdir of a run in the folder of a sweep or table."""
    return folder / "runs" / name
