"""Names the versions of the code and the packages that compute a run."""

import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path

import cassle_jax

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "simplejpeg")


def versions() -> dict[str, str]:
    """Versions of this project, Python, and the libraries that a run's numbers come from."""
    return {
        "cassle_jax": cassle_jax.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


@functools.cache
def code_fingerprint() -> str:
    """Identifies this project's code and the versions: equal for equal ones."""
    digest = hashlib.blake2b(repr(versions()).encode(), digest_size=8)
    root = Path(cassle_jax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
