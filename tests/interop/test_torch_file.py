"""PyTorch's files are read without PyTorch, and what they would run is not run."""

import argparse
import collections
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.torch_file import read_torch_file, write_detectron2

DATA = Path(__file__).parent / "data"
COUNTING = np.arange(24, dtype=np.float32)


def odd_tensors(torch):
    """A checkpoint with every kind of tensor a state dict may hold; `data/` has it, both formats.

    `torch.save(odd_tensors(torch), "zip.pth")`, and with `_use_new_zipfile_serialization=False`.
    """
    base = torch.arange(24, dtype=torch.float32)
    state = collections.OrderedDict(
        whole=base,
        transposed=base.reshape(4, 6).T,
        strided=base[3:20:4],
        expanded=base[2:5, None].expand(3, 5),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 7),
        half=base.half() / 8,
        bfloat16=base.bfloat16() * 3,
        double=base.double() / 3,
        long=torch.tensor(2**40),
        bytes=base.byte(),
        truth=base > 11,
        parameter=torch.nn.Parameter(base[:2].clone()),
    )
    state._metadata = {"": {"version": 1}}
    return {
        "state_dict": state,
        "epoch": 3,
        "best": 0.25,
        "name": "größer",
        "optimizers": [
            {"param_groups": [{"betas": (0.9, 0.999), "nesterov": False, "foreach": None}]}
        ],
        "schedulers": [{"milestones": collections.Counter({60: 1})}],
        "shape": torch.Size((3, 4)),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "big": 2**70,
        "some": {1, 2},
        "raw": b"\x00\xff",
    }


@pytest.fixture(params=["zip.pth", "legacy.pth"])
def checkpoint(request):
    return read_torch_file(DATA / request.param)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("whole", COUNTING),
        ("transposed", COUNTING.reshape(4, 6).T),
        ("strided", COUNTING[3:20:4]),
        ("expanded", np.repeat(COUNTING[2:5, None], 5, 1)),
        ("scalar", np.float32(2.5)),
        ("empty", np.zeros((0, 7), np.float32)),
        ("half", COUNTING / 8),
        ("bfloat16", COUNTING * 3),
        ("double", COUNTING.astype(np.float64) / 3),
        ("long", np.int64(2**40)),
        ("bytes", COUNTING.astype(np.uint8)),
        ("truth", COUNTING > 11),
        ("parameter", COUNTING[:2]),
    ],
)
def test_tensors_arrive_as_arrays(checkpoint, name, expected):
    array = checkpoint["state_dict"][name]
    assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(array, expected)


def test_what_else_a_checkpoint_holds_arrives_too(checkpoint):
    rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
    assert rest == {
        "epoch": 3,
        "best": 0.25,
        "name": "größer",
        "optimizers": [
            {"param_groups": [{"betas": (0.9, 0.999), "nesterov": False, "foreach": None}]}
        ],
        "schedulers": [{"milestones": {60: 1}}],
        "shape": (3, 4),
        "device": "cpu",
        "dtype": "float32",
        "big": 2**70,
        "some": {1, 2},
        "raw": b"\x00\xff",
    }


@pytest.mark.pytorch
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_read_is_what_pytorch_reads(tmp_path, zipped):
    import torch

    path = tmp_path / "file.pth"
    torch.save(odd_tensors(torch), path, _use_new_zipfile_serialization=zipped)
    theirs = torch.load(path, weights_only=True)["state_dict"]
    ours = read_torch_file(path)["state_dict"]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        expected = (tensor.float() if half else tensor).detach().numpy()
        assert ours[name].dtype == expected.dtype
        np.testing.assert_array_equal(ours[name], expected)


class AttributeDict(dict):
    """As PyTorch Lightning's, which holds a run's hyper-parameters."""


@pytest.mark.parametrize("zipped", [True, False])
def test_settings_beside_the_weights_are_left_out(tmp_path, zipped):
    """As in checkpoints of DINO, MAE and timm (argparse's) and of PyTorch Lightning."""
    content = {
        "args": argparse.Namespace(arch="vit_small", betas=[0.9, 0.999]),
        "hyper_parameters": AttributeDict(width=64),
        "best": np.float64(0.5),
        "state_dict": {"scale": 2},
        "epoch": 3,
    }
    pickled = pickle.dumps(content, 2).replace(
        __name__.encode(), b"lightning_fabric.utilities.data"
    )
    (as_zip if zipped else as_legacy)(pickled, tmp_path / "file.pth")
    read = read_torch_file(tmp_path / "file.pth")
    assert read == content | {"args": {}, "hyper_parameters": {}, "best": {}}


class Runs:
    """Unpickling it makes a file: with a function of `os`, or by way of a builtin."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def payloads(sentinel):
    touch = f"touch {sentinel}"
    return {
        "posix.system": Runs(os.system, touch),
        "builtins.eval": Runs(eval, f"open({str(sentinel)!r}, 'w')"),
        "builtins.exec": Runs(exec, f"open({str(sentinel)!r}, 'w')"),
        "io.open": Runs(io.open, str(sentinel), "w"),
        "builtins.getattr": Runs(getattr, collections.OrderedDict, "fromkeys"),
    }


def as_plain(pickled, path):
    path.write_bytes(pickled)


def as_zip(pickled, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


def as_legacy(pickled, path):
    magic, version = 0x1950A86A20F9469CFC6C, 1001
    system = {"little_endian": True}
    start = b"".join(pickle.dumps(each, 2) for each in (magic, version, system))
    path.write_bytes(start + pickled + pickle.dumps([], 2))


@pytest.fixture
def sentinel(tmp_path):
    """A path at which nothing may appear."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("write", [as_plain, as_zip, as_legacy])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", payloads(""))
def test_a_program_in_a_pickle_is_refused_by_name(tmp_path, sentinel, name, protocol, write):
    content = {"state_dict": {"conv1.weight": payloads(sentinel)[name]}}
    write(pickle.dumps(content, protocol), tmp_path / "file.pth")
    with pytest.raises(WeightsError, match="which is not run") as raised:
        read_torch_file(tmp_path / "file.pth")
    if protocol == 4:  # older protocols use Python 2's names
        assert name in str(raised.value)


class Pickler(pickle.Pickler):
    """Writes `Runs` into the identifiers of storages."""

    def persistent_id(self, value):
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None


@pytest.mark.parametrize("position", range(1, 5))
def test_a_program_in_a_storages_identifier_is_refused(tmp_path, sentinel, position):
    identifier = ["storage", "FloatStorage", "0", "cpu", 4]
    identifier[position] = Runs(os.system, f"touch {sentinel}")
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"state_dict": [tuple(identifier)]})
    as_zip(buffer.getvalue(), tmp_path / "file.pth")
    with pytest.raises(WeightsError, match=r"posix\.system"):
        read_torch_file(tmp_path / "file.pth")


@pytest.mark.parametrize(
    "pickled",
    [
        # set an attribute of the class, through BUILD's second state
        b"\x80\x02ccollections\nOrderedDict\nN}U\x06updateK\x01s\x86b.",
        # … and of a function that rebuilds tensors
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x08__name__K\x01s\x86b.",
        # reach for an attribute of what is known
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        # the same with a plain state, of a function, of a type and of a dict
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x04evilK\x01sb.",
        b"\x80\x02cbuiltins\nset\n}U\x04evilK\x01sb.",
        b"\x80\x02ccollections\nOrderedDict\n)R}U\x05itemsK\x01sb.",
        # make an object of a class by name alone
        b"\x80\x02ctypes\nSimpleNamespace\n)\x81.",
    ],
)
def test_nothing_known_can_be_changed_or_taken_apart(tmp_path, pickled):
    before = dict(vars(collections.OrderedDict))
    as_zip(pickled, tmp_path / "file.pth")
    with pytest.raises(WeightsError):
        read_torch_file(tmp_path / "file.pth")
    assert dict(vars(collections.OrderedDict)) == before


def test_tensors_cannot_reach_beyond_their_storage(tmp_path):
    """A header that claims 1000 numbers of a storage of 24, or a storage of another size."""
    data = (DATA / "zip.pth").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = {name: archive.read(name) for name in archive.namelist()}
    key = next(name for name in names if name.endswith("/data/0"))
    for size in (4, 4096):
        with zipfile.ZipFile(tmp_path / "file.pth", "w") as archive:
            for name, content in names.items():
                archive.writestr(name, bytes(size) if name == key else content)
        with pytest.raises(WeightsError, match="not as long as its tensors say"):
            read_torch_file(tmp_path / "file.pth")

    wild = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((U\x07storageU\x0cFloatStorageU\x010U\x03cpuK\x18t"
        b"QK\x00M\xe8\x03\x85K\x01\x85\x89N}tR."
    )
    with zipfile.ZipFile(tmp_path / "file.pth", "w") as archive:
        archive.writestr("archive/data.pkl", wild)
        archive.writestr("archive/data/0", bytes(96))
    with pytest.raises(WeightsError, match="leaves, or repeats"):
        read_torch_file(tmp_path / "file.pth")


def opcodes(value):
    """A value's pickle, without its beginning and end."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(length, offset, shape, strides, kind="FloatStorage", view=(), others=b""):
    """The pickle of a tensor in a storage of some length, called 0; `others` are opcodes."""
    identifier = b"".join(opcodes(each) for each in ("storage", kind, "0", "cpu", length, *view))
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((%btQ" % identifier
        + b"".join(opcodes(each) for each in (offset, shape, strides))
        + b"\x89N%btR." % others
    )


def write_zip(path, pickled, storage=bytes(96), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", storage)


def test_a_view_that_changes_signs_is_refused(tmp_path):
    """The storage of `torch.conj(x).imag` has the numbers of x's, with the other sign."""
    file = tmp_path / "file.pth"
    write_zip(file, tensor(24, 0, (24,), (1,), others=opcodes({})))
    np.testing.assert_array_equal(read_torch_file(file), np.zeros(24))
    write_zip(file, tensor(24, 0, (24,), (1,), others=opcodes({"conj": False, "neg": True})))
    with pytest.raises(WeightsError, match="it has a negated or conjugated view of a tensor"):
        read_torch_file(file)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (-1,), (-1,)),  # numpy would find the length, of a storage that it walks backwards
        (0, (5,), (2**60,)),  # times four bytes it wraps to 0
        (0, (2, 5), (1024, 2**60 - 256)),
        (0, (10**6, 10**6), (0, 0)),  # four terabytes of one number
        (20, (5,), (1,)),
        (-1, (5,), (1,)),
    ],
)
def test_a_place_outside_its_storage_is_refused(tmp_path, offset, shape, strides):
    write_zip(tmp_path / "file.pth", tensor(24, offset, shape, strides))
    with pytest.raises(WeightsError, match="leaves, or repeats"):
        read_torch_file(tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor(24, 0, (2.0,), (1,)), "whose place in its storage is not in integers"),
        (tensor(24, True, (2,), (1,)), "whose place in its storage is not in integers"),
        (b"\x80\x02(U\x06moduleU\x01ctQ.", "holds a whole module, not a state dict"),
        (b"\x80\x02]U\x01aNs.", "puts items into a list"),
        (b"\x80\x02cnumpy\nndarray\nK\x03\x85K\x04C\x00\x87R.", "whose dtype is a int"),
    ],
)
def test_what_no_state_dict_holds_is_named(tmp_path, pickled, message):
    write_zip(tmp_path / "file.pth", pickled)
    with pytest.raises(WeightsError, match=message):
        read_torch_file(tmp_path / "file.pth")


def test_a_view_of_a_storage_begins_where_it_says(tmp_path):
    """As PyTorch wrote them before its version 0.4: a tensor counts from its view's beginning."""
    pickled = tensor(24, 2, (3,), (1,), view=(("view", 5, 8),))
    write_zip(tmp_path / "file.pth", pickled, COUNTING.tobytes())
    np.testing.assert_array_equal(read_torch_file(tmp_path / "file.pth"), COUNTING[7:10])


def test_an_older_file_of_a_big_endian_machine_is_refused(tmp_path):
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}, {}, [])
    (tmp_path / "file.pth").write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    with pytest.raises(WeightsError, match="written on a big-endian machine"):
        read_torch_file(tmp_path / "file.pth")


@pytest.mark.exhaustive
def test_no_place_that_is_read_leaves_its_storage(tmp_path):
    random = np.random.default_rng(0)
    numbers = [0, 1, 2, 3, 5, 23, 24, -1, -2, 2**31, 2**32, 2**60, 2**62, 2**63, 2**64, -(2**62)]
    read = 0
    for _ in range(1500):
        axes = random.integers(4)
        shape, strides = (
            tuple(
                numbers[random.choice([random.integers(5), random.integers(16)])]
                for _ in range(axes)
            )
            for _ in range(2)
        )
        offset = numbers[random.integers(8)]
        write_zip(tmp_path / "file.pth", tensor(24, offset, shape, strides), COUNTING.tobytes())
        try:
            array = read_torch_file(tmp_path / "file.pth")
        except WeightsError:
            continue
        if array.size:
            places = (np.dot(index, strides) for index in np.ndindex(array.shape))
            np.testing.assert_array_equal(array.ravel(), [offset + place for place in places])
            read += 1
    assert read > 100


def deep_tuple():
    return b")" + b"\x85" * 1_000_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # a memo of 4 billion entries
        (b"\x80\x02Nr\xff\xff\xff\xff.", None),
        # a bytearray of 64 GiB
        (b"\x80\x05\x96" + (2**36).to_bytes(8, "little") + b".", "damaged"),
        (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "latin1"),
        # a hash deeper than the stack: of a key, a member, or an argument
        (b"\x80\x02}" + deep_tuple() + b"Ns.", "tuple where a name"),
        (b"\x80\x02}(" + deep_tuple() + b"Nu.", "tuple where a name"),
        (b"\x80\x02(" + deep_tuple() + b"Nd.", "damaged"),
        (b"\x80\x04\x8f(" + deep_tuple() + b"\x90.", "damaged"),
        (b"\x80\x02cbuiltins\nset\n](" + deep_tuple() + b"e\x85R.", "tuple where a name"),
        (
            b"\x80\x02ccollections\nOrderedDict\n]]" + deep_tuple() + b"aNaa\x85R.",
            "tuple where a name",
        ),
        (b"\x80\x02(U\x07storageU\x0cFloatStorage" + deep_tuple() + b"NK\x00tQ.", "tuple where"),
    ],
)
def test_a_small_file_cannot_exhaust_the_reader(tmp_path, content, message):
    """In a process of its own, with 4 GiB: the C unpickler would take more, or crash."""
    (tmp_path / "file.pth").write_bytes(content)
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "from cassle_jax.interop.torch_file import read_torch_file\n"
        "print(read_torch_file(sys.argv[1]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "file.pth"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == (0 if message is None else 1), ended.stderr
    assert message is None or ("WeightsError" in ended.stderr and message in ended.stderr)


@pytest.mark.parametrize("length", [2**33, 2**50])
def test_a_storage_larger_than_its_file_is_refused_before_it_is_made(tmp_path, length):
    write_zip(tmp_path / "file.pth", tensor(length, 0, (4,), (1,)))
    with pytest.raises(WeightsError, match="larger than the file"):
        read_torch_file(tmp_path / "file.pth")


def test_copies_of_one_list_are_no_larger_than_the_file(tmp_path):
    """A file of 8n bytes claims n copies of a list of n entries."""
    n = 20_000
    copies = b"ctorch\nSize\nq\x020" + b"h\x02h\x01\x85R" * n
    (tmp_path / "file.pth").write_bytes(b"\x80\x02](" + b"N" * n + b"eq\x01" + copies + b".")
    with pytest.raises(WeightsError, match="larger than the file"):
        read_torch_file(tmp_path / "file.pth")


def test_a_compressed_archive_is_refused(tmp_path):
    """A zip file of a thousandth of its content's size; PyTorch does not compress."""
    write_zip(
        tmp_path / "file.pth", tensor(2**20, 0, (4,), (1,)), bytes(2**22), zipfile.ZIP_DEFLATED
    )
    with pytest.raises(WeightsError, match=r"data\.pkl is compressed"):
        read_torch_file(tmp_path / "file.pth")
    data = (DATA / "zip.pth").read_bytes()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as archive,
        zipfile.ZipFile(tmp_path / "file.pth", "w") as other,
    ):
        for name in archive.namelist():
            deflated = zipfile.ZIP_DEFLATED if name.endswith("data/0") else zipfile.ZIP_STORED
            other.writestr(name, archive.read(name), deflated)
    with pytest.raises(WeightsError, match="data/0 is compressed"):
        read_torch_file(tmp_path / "file.pth")


def test_a_file_without_checksums_says_how_to_save_it(tmp_path):
    data = bytearray((DATA / "zip.pth").read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry = next(each for each in archive.infolist() if each.filename.endswith("data/0"))
    (tmp_path / "file.pth").write_bytes(data.replace(entry.CRC.to_bytes(4, "little"), bytes(4)))
    with pytest.raises(WeightsError, match=r"data/0 has another checksum .*set_crc32_options"):
        read_torch_file(tmp_path / "file.pth")
    data[entry.header_offset] = 0  # PyTorch cannot read this either
    (tmp_path / "file.pth").write_bytes(data)
    with pytest.raises(WeightsError, match=r"is damaged or no PyTorch file \(BadZipFile\)"):
        read_torch_file(tmp_path / "file.pth")


def test_a_storage_that_an_older_file_does_not_list_is_missed(tmp_path):
    as_legacy(tensor(4, 0, (4,), (1,)), tmp_path / "file.pth")
    with pytest.raises(WeightsError, match="tensors, and no numbers for them"):
        read_torch_file(tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"archive/constants.pkl": b""}, "TorchScript.*torch.jit.load"),
        ({"archive/byteorder": b"big"}, "big-endian"),
        ({"other/data.pkl": b""}, r"one data\.pkl; save the arrays of others, such as NumPy's"),
    ],
)
def test_other_archives_are_recognised(tmp_path, extra, message):
    with zipfile.ZipFile(tmp_path / "file.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        for name, content in extra.items():
            archive.writestr(name, content)
    with pytest.raises(WeightsError, match=message):
        read_torch_file(tmp_path / "file.pth")


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"\x80\x02}", b"PK\x03\x04torn", b"<!DOCTYPE html>"]
)
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, content):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"file\.pth is damaged or no PyTorch file") as raised:
        read_torch_file(tmp_path / "file.pth")
    assert "\n" not in str(raised.value)
    assert repr(content[:32]) in str(raised.value)


def test_what_a_large_file_holds_is_not_all_said(tmp_path):
    (tmp_path / "file.pth").write_bytes(b"I" + b"x" * 100_000)  # an integer, in a pickle's words
    with pytest.raises(WeightsError, match="it begins with b'Ixxx") as raised:
        read_torch_file(tmp_path / "file.pth")
    assert len(str(raised.value)) < 200 + len(str(tmp_path))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"none\.pth cannot be read: No such file"):
        read_torch_file(tmp_path / "none.pth")


@pytest.mark.pytorch
def test_a_whole_model_is_refused(tmp_path):
    import torch

    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"names torch\.nn\.modules\.linear\.Linear"):
        read_torch_file(tmp_path / "model.pth")


def test_detectron2s_pickle_is_read_by_pickle_as_detectron2_does(tmp_path):
    arrays = {"stem.conv1.weight": COUNTING.reshape(2, 3, 2, 2), "res2.0.conv1.weight": COUNTING}
    write_detectron2(tmp_path / "file.pkl", arrays, "us")
    with (tmp_path / "file.pkl").open("rb") as file:
        theirs = pickle.load(file, encoding="latin1")
    assert (theirs["__author__"], theirs["matching_heuristics"]) == ("us", True)
    for content in (theirs, read_torch_file(tmp_path / "file.pkl")):
        assert content["model"].keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(content["model"][name], array)
    assert all(array.flags.writeable for array in theirs["model"].values())
