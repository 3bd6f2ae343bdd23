"""The imports between the rooms of the package are those of docs/architecture.md."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cassle_jax"


def room_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "cassle_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cassle_jax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (name[1] for name in names if name[0] == "cassle_jax" and len(name) > 1)


def imports():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        if path.parent != PACKAGE or path.name != "__init__.py":
            room = room_of(path)
            found.setdefault(room, set()).update(set(imported_rooms(path)) - {room})
    return found


def documented():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", page, re.MULTILINE)
    return {room: set(re.findall(r"`(\w+)`", uses)) for room, uses in rows}


def test_every_room_imports_what_the_page_says():
    assert imports() == documented()


def test_the_arrows_run_one_way():
    """Every room imports only rooms that stand above it in the page's table."""
    above = set()
    for room, uses in documented().items():
        assert uses <= above, room
        above.add(room)
