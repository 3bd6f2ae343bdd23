"""Reads PyTorch's files into numpy arrays, without PyTorch and without running their content.

A PyTorch file is a pickle whose tensors refer to storages outside it. A pickle is a program that
may call anything it can name. This reader accepts a handful of names, all among those that
`torch.load(weights_only=True)` accepts, and replaces each by its own function. It refuses a file
with any other name before importing anything. The pickle cannot change the objects it receives,
nor make anything larger than its file.
"""

import collections
import io
import math
import os
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cassle_jax.faults import reason_of
from cassle_jax.interop.errors import WeightsError
from cassle_jax.storage import open_to_read, written_whole

# Element type by storage class; bfloat16 is read as the integers it is stored in.
STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
# Instructions that torch.save does not write; most allocate, or hash, whatever the file claims.
REFUSED = (pickle.PERSID, pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8)
LARGEST_KEY = 2**63  # bound of a dict's integer keys
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Settings and counters that training scripts save beside the weights; their content is dropped.
UNNEEDED = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
BEGIN = 32  # bytes of a file that a message quotes
RESAVE = "load it with PyTorch and save its state_dict() again with torch.save"


def read_torch_file(path: str | Path) -> Any:
    """Reads a PyTorch file: numpy arrays for its tensors; half precision as float32.

    Reads the files of `torch.save`, in its current (zip) and its former format, and a detectron2
    pickle as `write_detectron2` writes it.

    Raises:
        WeightsError: the file names something other than arrays, is damaged, or is of another kind.
    """
    path, begin = Path(path), b""
    try:
        with open_to_read(path) as file:
            begin = file.read(BEGIN)
            if zipfile.is_zipfile(file):
                return _read_zip(file)
            file.seek(0)
            return _read_legacy(file)
    except WeightsError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {reason_of(error)}") from error
    except Exception as error:  # A damaged pickle raises any type, depending on its bytes.
        raise WeightsError(
            f"{path} is damaged or no PyTorch file ({type(error).__name__}): it begins with {begin}"
        ) from error


def write_detectron2(path: str | Path, arrays: dict[str, np.ndarray], author: str) -> None:
    """Writes arrays as a pickle that detectron2 loads, matching names by their ends."""
    content = {"model": arrays, "__author__": author, "matching_heuristics": True}
    with written_whole(path) as file:
        _ArrayPickler(file, protocol=4).dump(content)


class _ArrayPickler(pickle.Pickler):
    """Pickles arrays by their public constructor, which every version of numpy has."""

    def reducer_override(self, value):
        if not isinstance(value, np.ndarray):
            return NotImplemented
        return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))


def _read_zip(file: io.BufferedIOBase) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise WeightsError(
                "it is a zip file without PyTorch's one data.pkl; save the arrays of others, such "
                "as NumPy's, with safetensors.numpy.save_file"
            )
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in names:
            raise WeightsError(
                "it is a TorchScript archive, which holds a program; load it with torch.jit.load "
                "and save its state_dict() with torch.save"
            )
        if f"{root}byteorder" in names and _member(archive, f"{root}byteorder") != b"little":
            raise WeightsError(f"it was written on a big-endian machine; {RESAVE} on another")

        unpickler = _Unpickler(io.BytesIO(_member(archive, pickles[0])), _size(file))
        content = unpickler.load()
        for key in [*unpickler.storages]:
            unpickler.fill(key, _member(archive, f"{root}data/{key}"))
        return content


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The content of `archive` under `name`, which is no larger than the archive."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise WeightsError(f"its {name} is compressed, as torch.save does not; {RESAVE}")
    try:
        return archive.read(name)
    except zipfile.BadZipFile as error:
        if "CRC" not in str(error):
            raise
        raise WeightsError(
            f"its {name} has another checksum than it states: it is damaged, or was written with "
            f"torch.serialization.set_crc32_options(False); {RESAVE}"
        ) from error


def _read_legacy(file: io.BufferedIOBase) -> Any:
    """A plain pickle, or PyTorch's format before 1.6: five pickles, then the storages."""
    size = _size(file)
    unpickler = _Unpickler(file, size)
    content = unpickler.load()
    if isinstance(content, int) and content == LEGACY_MAGIC:
        _Unpickler(file, size).load()  # the format's version
        if not _Unpickler(file, size).load().get("little_endian", True):
            raise WeightsError(f"it was written on a big-endian machine; {RESAVE} on another")
        unpickler = _Unpickler(file, size)
        content = unpickler.load()
        for key in _keys(_Unpickler(file, size).load()):
            stored = int.from_bytes(file.read(8), "little") * unpickler.itemsize(key)
            unpickler.fill(key, file.read(min(stored, size)))
    if unpickler.storages:
        raise WeightsError("it has tensors, and no numbers for them")
    return content


class _Unneeded(dict):
    """A stand-in for an object that weights do not need; it stays empty."""


def _size(file: io.BufferedIOBase) -> int:
    """Bytes of a file; its position is unchanged."""
    return os.fstat(file.fileno()).st_size


def _keys(keys: Iterable[Any]) -> list[str | int]:
    """Keys of a dict; refuses other types: hashing a deeply nested one would overrun the stack."""
    keys = list(keys)
    for key in keys:
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < LARGEST_KEY):
            raise WeightsError(f"it has a {type(key).__name__} where a name should be")
    return keys


# The Python twin of `pickle.Unpickler`: the C one allocates room for any number of objects that a
# small file claims to have, and sets attributes without a check.
class _Unpickler(pickle._Unpickler):
    """Unpickles containers, scalars and tensors; the tensors' numbers come with `fill`.

    Args:
        file: the file to read from.
        size: bytes of the file, a bound for all storages and copies together.
    """

    def __init__(self, file: io.BufferedIOBase, size: int):
        super().__init__(file, encoding="utf-8")
        # Storages still to fill: kind and numbers by key.
        self.storages: dict[str, tuple[str, np.ndarray]] = {}
        self._room = size
        self._known = {
            "collections.OrderedDict": self._ordered,
            "collections.Counter": self._counter,
            "builtins.set": self._set,
            "builtins.bytearray": self._bytes,
            "_codecs.encode": self._bytes,
            "numpy.ndarray": self._array,
            "torch.Size": self._shape,
            "torch.device": self._device,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_parameter_with_state": self._parameter,
        }
        # Names stand in for types: a stand-in must not be a type itself.
        self._known |= {f"torch.{dtype}": dtype for dtype in DTYPES}
        self._known |= {f"torch.{kind}": kind for kind in STORAGES}
        self._known |= {f"torch.cuda.{kind}": kind for kind in STORAGES}
        self._known |= dict.fromkeys(UNNEEDED, self._unneeded)

    def find_class(self, module, name):
        full_name = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)
        if full_name not in self._known:
            raise WeightsError(
                f"it names {full_name}, which weights do not need and which is not run; if you "
                f"trust the file, {RESAVE}"
            )
        return self._known[full_name]

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or pid[0] != "storage":
            raise WeightsError(f"it holds a whole module, not a state dict; {RESAVE}")
        _, kind, key, _, length, *view = pid
        _keys((kind, key, length))
        if key not in self.storages:
            self._spend(length * np.dtype(STORAGES[kind]).itemsize)
            wide = kind in ("HalfStorage", "BFloat16Storage")
            self.storages[key] = kind, np.zeros(length, "<f4" if wide else STORAGES[kind])
        storage = self.storages[key][1]
        if view and view[0] is not None:
            _, start, length = view[0]
            return storage[start : start + length]
        return storage

    def _spend(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise WeightsError("its tensors and lists claim to be larger than the file")

    def itemsize(self, key: str) -> int:
        """Bytes that an element of the storage called `key` takes in the file."""
        return np.dtype(STORAGES[self.storages[key][0]]).itemsize

    def fill(self, key: str, data: bytes) -> None:
        """Puts the numbers of the storage called `key` into its tensors."""
        kind, storage = self.storages.pop(key)
        values = np.frombuffer(data, STORAGES[kind])
        if len(values) != len(storage):
            raise WeightsError(f"storage {key} is not as long as its tensors say")
        if kind == "BFloat16Storage":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        storage[:] = values

    def load_build(self):
        state = self.stack.pop()
        if isinstance(self.stack[-1], _Unneeded):
            return
        # A state dict's versions of its modules, which nothing here needs.
        versions = isinstance(state, dict) and state.keys() == {"_metadata"}
        if not (versions and isinstance(self.stack[-1], collections.OrderedDict)):
            raise WeightsError("it sets attributes, which weights do not have")

    def load_setitem(self):
        self._set_items([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self):
        self._set_items(self.pop_mark())

    def _set_items(self, items):
        if isinstance(self.stack[-1], _Unneeded):
            return
        if not isinstance(self.stack[-1], dict):
            raise WeightsError(f"it puts items into a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(zip(_keys(items[::2]), items[1::2], strict=True))

    dispatch = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in REFUSED
    } | {
        pickle.NEWOBJ[0]: pickle._Unpickler.load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }

    def _tensor(self, storage, offset, shape, strides, *others):
        # After gradients and hooks: signs that PyTorch changes only when it reads the numbers.
        metadata = others[2] if len(others) > 2 else None
        if isinstance(metadata, dict) and (metadata.get("neg") or metadata.get("conj")):
            raise WeightsError(
                "it has a negated or conjugated view of a tensor; load it with PyTorch and save "
                "its resolve_neg().resolve_conj()"
            )
        # Python's integers do not overflow; and numpy would take a length of −1 for unknown.
        if not all(type(number) is int for number in (offset, *shape, *strides)):
            raise WeightsError("it has a tensor whose place in its storage is not in integers")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        inside = min(offset, *shape, *strides, 0) == 0 and (0 in shape or last < len(storage))
        # Expanded tensors, whose numbers repeat, are rare in files, and may claim any size.
        if not inside or math.prod(shape) > len(storage):
            raise WeightsError(
                "it has a tensor that leaves, or repeats, the numbers of its storage; if you trust "
                "the file, load it with PyTorch and save its tensors' clones"
            )
        size = storage.itemsize
        strides = [size * each for each in strides]
        return np.ndarray(shape, storage.dtype, storage, size * offset, strides)

    def _parameter(self, tensor, *_):
        return tensor

    def _array(self, shape, dtype, data):
        if not isinstance(dtype, str):
            raise WeightsError(f"it has an array whose dtype is a {type(dtype).__name__}")
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape)

    def _bytes(self, data=b"", encoding="latin1"):
        if encoding not in ("latin1", "latin-1") or not isinstance(data, str | bytes):
            raise WeightsError("it holds text that is not encoded as latin1")
        self._spend(len(data))
        return data.encode("latin1") if isinstance(data, str) else data

    def _ordered(self, pairs=()):
        self._spend(len(pairs))
        names, values = zip(*pairs, strict=True) if pairs else ((), ())
        return collections.OrderedDict(zip(_keys(names), values, strict=True))

    def _counter(self, counts):
        self._spend(len(counts))
        return {**counts}

    def _set(self, members):
        self._spend(len(members))
        return set(_keys(members))

    def _shape(self, lengths):
        self._spend(len(lengths))
        return tuple(lengths)

    def _unneeded(self, *_):
        return _Unneeded()

    def _device(self, *names):
        self._spend(sum(len(str(name)) for name in _keys(names)))
        return ":".join(str(name) for name in names)
