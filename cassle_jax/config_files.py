"""Finds the files of `configs/`, in a clone and where the project is installed."""

from pathlib import Path

from cassle_jax.checks import ConfigError, did_you_mean
from cassle_jax.storage import check_ends, path_of

_PACKAGE = Path(__file__).resolve().parent
# A wheel has the folder inside the package, a clone beside it.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
TABLES = CONFIGS / "tables"


def find_file(setting: str, written: str, folder: Path = CONFIGS) -> str:
    """Finds a Python file by its path, or by its name in a folder of this project.

    A relative path starts here, or else where this project has its `configs/`.

    Args:
      setting: `config` or `table`, for the message.
      written: a path such as `configs/imagenet.py`, or a name such as `imagenet`.
      folder: folder of the names.

    Returns:
      The path of an existing file, or else the path as it is written.

    Raises:
      ConfigError: the name is unknown, with the closest known one.
      OSError: it is a pipe or a device.
    """
    path = Path(path_of(written))
    if path.suffix == ".py" or len(path.parts) != 1 or path.is_file():
        for found in (path, CONFIGS.parent / path):
            if found.exists():
                check_ends(found)
                return str(found)
        return str(path)
    known = sorted(file.stem for file in folder.glob("*.py"))
    if written not in known:
        raise ConfigError(
            f"{setting}={written!r} is unknown; use one of {', '.join(known)}, or the path of a "
            f"file{did_you_mean(written, known)}"
        )
    return str(folder / f"{written}.py")


def find_config(written: str) -> str:
    """Finds the file of a configuration, and keeps the arguments: `imagenet:method=simclr`."""
    path, separator, arguments = written.partition(":")
    return f"{find_file('config', path)}{separator}{arguments}"
