"""A report that grows as results come in; a later call of the command continues it."""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cassle_jax.checks import ConfigError
from cassle_jax.evaluation.findings import Failure, Finding
from cassle_jax.report.comparison import check_subjects, each_finding, failures_of
from cassle_jax.report.files import HTML, JSON, read_parts, read_report, write_report
from cassle_jax.report.overview import Pairing, named_baselines

LOG = logging.getLogger(__name__)

# Largest share of the time that goes into writing pages.
_WRITING_SHARE = 0.05


class GrowingReport:
    """A report whose results come one after the other.

    Args:
      folder: folder of the report; continues the report of an earlier call there.
      summary: see `write_report`.
      facts: facts by subject, see `write_report`.
      seeds: seeds by subject where they are known, see `Pairing`.
      writes: whether this process writes the files; one of several processes does.

    Raises:
      OSError, Outage: an earlier report there cannot be read, for good or for now.

    Attributes:
      folder: the folder of the report.
    """

    def __init__(
        self,
        folder: Path,
        summary: str,
        facts: Mapping[str, Mapping[str, object]],
        *,
        seeds: Mapping[str, Sequence[int]] | None = None,
        writes: bool = True,
    ):
        self.folder, self._summary, self._facts, self._writes = folder, summary, facts, writes
        self._seeds = seeds or {}
        self._runs: dict[str, list[list[tuple[str, Sequence[Finding]]]]] = {}
        self._due = 0.0
        self._kept: dict[str, Sequence[Finding]] = {}
        try:
            self._kept = read_parts(folder / JSON)
        except ConfigError as error:
            LOG.warning("%s cannot be read and is written again: %s", folder / JSON, error)

    @property
    def failures(self) -> list[tuple[str, Failure]]:
        """The protocols that failed, each with its subject and run, see `failures_of`."""
        return failures_of(self._findings, self._seeds)

    @property
    def _findings(self) -> dict[str, list[list[Finding]]]:
        """All findings by subject and run, without their keys."""
        return {
            name: [[each for _, part in run for each in part] for run in of_subject]
            for name, of_subject in self._runs.items()
        }

    def kept(self, key: str) -> Sequence[Finding] | None:
        """The findings under a key, from this or an earlier call; `None` without any."""
        return self._kept.get(key)

    def warn_of_replaced(self, planned: Collection[tuple[str, str, str]]) -> None:
        """Warns where the page of an earlier call shows results that this call's will not.

        Args:
          planned: subject, dataset and task of all results to come.
        """
        if not self._writes:
            return
        try:
            before, _ = read_report(self.folder / JSON)
        except (FileNotFoundError, ConfigError):
            return
        replaced = [
            f"{each.task} of {name} on {each.dataset}"
            for name, _, each in each_finding(before)
            if (name, each.dataset, each.task) not in planned and not isinstance(each, Failure)
        ]
        if replaced:
            LOG.warning(
                "to=%s: the page there shows %s, which the page of this call will not show; give "
                "another folder to keep both",
                self.folder,
                ", ".join(dict.fromkeys(replaced)),
            )

    def begin(self, subject: str) -> None:
        """Begins another run of a subject; later findings are added to it."""
        self._runs.setdefault(subject, []).append([])

    def check(self, findings: Sequence[Finding]) -> None:
        """Raises ValueError where findings cannot be reported beside those of the newest run."""
        name = next(reversed(self._runs))
        check_subjects({name: [[*self._findings[name][-1], *findings]]})

    def add(self, findings: Sequence[Finding], key: str = "") -> None:
        """Adds to the newest run, and writes the page where that takes little of the time.

        Args:
          findings: see `check`.
          key: key under which a later call finds them; "" lets a later call compute them again.
        """
        self._runs[next(reversed(self._runs))][-1].append((key, findings))
        if key:
            self._kept[key] = findings
        if time.monotonic() < self._due:
            return
        start = time.monotonic()
        try:
            self.write(complete=False)
        except OSError as error:
            LOG.warning("%s cannot be written for now: %s", self.folder, error.strerror)
        now = time.monotonic()
        self._due = now + (now - start) / _WRITING_SHARE

    def write(self, *, complete: bool) -> Path:
        """Writes all there is, and returns the path of the page.

        Raises:
          OSError: it cannot be written.
          ValueError: there is nothing to write, or see `write_report`.
        """
        if not self._writes:
            return self.folder / HTML
        runs = self._findings
        parts = {
            name: [[(key, len(part)) for key, part in run] for run in of_subject]
            for name, of_subject in self._runs.items()
        }
        shown = {key for of_subject in parts.values() for run in of_subject for key, _ in run}
        # Results of an earlier call, which this call has yet to reach: its end must not lose them.
        kept = {} if complete else {k: v for k, v in self._kept.items() if k not in shown}
        return write_report(
            self.folder,
            runs,
            summary=self._summary,
            provenance={name: self._facts[name] for name in runs},
            pairing=Pairing(self._seeds, named_baselines(list(runs))),
            parts=parts,
            kept=kept,
            complete=complete,
        )
