"""Lists the lines of the package that no test reached and that no list excuses; see coverage.sh."""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXCUSED = ROOT / "tests" / "uncovered.txt"


def key(line: str) -> str:
    """A line as `path: text`: its number changes whenever something above it does."""
    return re.sub(r"^([^:]+):\d+:", r"\1:", line.strip())


def judged(missing: Iterable[str], excused: str, of: str) -> tuple[list[str], list[str]]:
    """The missing lines that the list does not excuse, and its lines that are not missing.

    Args:
      missing: lines as `path:number: text`.
      excused: the list, one line each, with or without its number; `#` begins a comment.
      of: folder of the lines of the list to look at.
    """
    lines = (each for each in excused.splitlines() if each and not each.startswith("#"))
    known = {key(each) for each in lines}
    missing = list(missing)
    covered = known - {key(each) for each in missing}
    return (
        [each for each in missing if key(each) not in known],
        sorted(each for each in covered if each.startswith(f"{of}/")),
    )


def gone(excused: str, root: Path) -> list[str]:
    """The lines of the list that are not in their file any more; paths are below `root`."""
    found = []
    for each in excused.splitlines():
        if not each or each.startswith("#"):
            continue
        path, _, text = key(each).partition(": ")
        file = root / path
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        if text not in map(str.strip, lines):
            found.append(each)
    return found


def missing_lines(of: str) -> Iterator[str]:
    """The lines in a folder that the measurement in COVERAGE_FILE did not see."""
    from coverage import Coverage

    measured = Coverage()
    measured.load()
    for path in sorted(Path(of).rglob("*.py")):
        text = path.read_text(encoding="utf-8").splitlines()
        _, _, _, missing, _ = measured.analysis2(str(path.resolve()))
        for number in missing:
            yield f"{path}:{number}: {text[number - 1].strip()}"


def main(of: str) -> int:
    """Prints the lists; returns 1 where a line has no excuse, or an excuse has no line."""
    excused = EXCUSED.read_text(encoding="utf-8")
    lines, covered = judged(missing_lines(of), excused, of)
    stale = gone(excused, ROOT)
    for line in lines:
        print(line)
    for line in covered:
        if line not in map(key, stale):
            print(f"{EXCUSED.relative_to(ROOT)} need not excuse this: {line}")
    for line in stale:
        print(f"{EXCUSED.relative_to(ROOT)} excuses what is not a line any more: {line}")
    print(f"{len(lines)} lines of {of} are reached by no test")
    return int(bool(lines or stale))


if __name__ == "__main__":
    sys.exit(main(str(Path(sys.argv[1]))))
