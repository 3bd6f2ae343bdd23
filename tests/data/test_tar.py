"""Images in WebDataset's tar files."""

import contextlib
import errno
import io
import json
import logging
import os
import subprocess
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from cassle_jax import faults
from cassle_jax.command import EXIT_WRONG_SETTING, code_of
from cassle_jax.data import DamagedLog, DataError, decode, open_source
from cassle_jax.data import tar as tar_module
from cassle_jax.data.pipeline import training_batches
from cassle_jax.data.reading import RecordReader, UnreadableRecord
from cassle_jax.data.sources import content_of, has_changed


def write_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path, image_bytes):
    for shard in range(2):
        members = {}
        for number in range(3):
            key = f"s{shard}/{number}.v1"  # the first dot of the last part ends the key
            members[f"s{shard}/{number}.jpg"] = image_bytes(10 * shard + number, form="JPEG")
            members[f"s{shard}/{number}.cls"] = str(number).encode()
            members[f"s{shard}/{number}.txt"] = key.encode()
        write_tar(tmp_path / "train" / f"{shard}.tar", members)
    return tmp_path


def test_images_are_read_in_the_order_of_the_files(tars, settings, image_bytes):
    source = open_source(settings(source="webdataset", path=str(tars)), "train")
    assert len(source) == 6 and source.class_names == ("0", "1", "2")
    np.testing.assert_array_equal(source.labels, [0, 1, 2, 0, 1, 2])
    for index in (0, 4):
        record = source[index]
        assert record.image == image_bytes(10 * (index // 3) + index % 3, form="JPEG")
        assert record.label == index % 3
        assert record.name.endswith(f"train/{index // 3}.tar/s{index // 3}/{index % 3}.jpg")
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            source[outside]


def test_names_are_those_of_the_images_and_content_is_that_of_the_files(tars, settings):
    def opened():
        source = open_source(settings(source="webdataset", path=str(tars)), "train")
        return source.names, content_of(source)

    names, content = opened()
    assert opened() == (names, content)
    os.utime(tars / "train" / "1.tar", (0, 0))
    assert opened()[0] == names and opened()[1] != content
    (tars / "train" / "1.tar").rename(tars / "train" / "2.tar")
    assert opened()[0] != names


def test_tars_that_are_replaced_are_noticed(tars, settings):
    source = open_source(settings(source="webdataset", path=str(tars)), "train")
    content = content_of(source)
    assert not has_changed(source)
    os.utime(tars / "train" / "1.tar", (0, 0))
    assert content_of(source) == content and has_changed(source)


def test_files_of_a_split_may_lie_side_by_side(tmp_path, settings, image_bytes):
    for split in ("train", "val"):
        note = json.dumps({"label": 7, "caption": "x"}).encode()
        members = {"a.png": image_bytes(1), "a.json": note}
        write_tar(tmp_path / f"imagenet1k-{split}-0000.tar", members)
    source = open_source(settings(source="webdataset", path=str(tmp_path)), "val")
    assert len(source) == 1 and source[0].label == 7 and len(source.class_names) == 8


def test_images_without_classes_are_unlabelled(tmp_path, settings, image_bytes):
    write_tar(tmp_path / "train.tar", {"a.png": image_bytes(1), "b.webp": image_bytes(2)})
    source = open_source(settings(source="webdataset", path=str(tmp_path)), "train")
    assert source.class_names == () and source.labels.tolist() == [-1, -1]


@pytest.mark.parametrize("note", [b"{}", b"[[1, 2, 30, 40]]", b"null", b'{"label": null}'])
def test_a_note_without_a_class_is_none(tmp_path, settings, image_bytes, note):
    write_tar(tmp_path / "train.tar", {"a.png": image_bytes(1), "a.json": note})
    source = open_source(settings(source="webdataset", path=str(tmp_path)), "train")
    assert source.class_names == () and source.labels.tolist() == [-1]


@pytest.mark.parametrize(
    ("members", "mode", "message"),
    [
        ({"a.png": b"x"}, "w:gz", "has no tar files of split|uncompressed"),
        ({"a.v1.png": b"x"}, "w", "hold no images.*begins at the first dot"),
        ({"a.png": b"x", "a.cls": b"cat"}, "w", "has the class b'cat'; use 0, 1, 2"),
        ({"a.png": b"x", "a.cls": b"[1]"}, "w", r"has the class b'\[1\]'"),
        ({"a.png": b"x", "a.json": b"[1"}, "w", r"has the class b'\[1'"),
        ({"a.png": b"x", "a.cls": b"1", "b.png": b"x"}, "w", "1 of the 2 images .* no class"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, settings, members, mode, message):
    write_tar(tmp_path / "train.tar", members, mode)
    with pytest.raises(DataError, match=message):
        open_source(settings(source="webdataset", path=str(tmp_path)), "train")


def test_a_tar_that_was_cut_short_is_refused(tars, settings):
    path = tars / "train" / "1.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"1\.tar cannot be read .*whole, uncompressed"):
        open_source(settings(source="webdataset", path=str(tars)), "train")


def _with_the_second_header_damaged(whole):
    return whole[:1024] + b"\xff" + whole[1025:]


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(lambda whole: whole[:1100], id="cut within a header"),
        pytest.param(lambda whole: whole[:1024], id="cut between two members"),
        pytest.param(_with_the_second_header_damaged, id="a damaged header"),
        pytest.param(lambda whole: whole + whole, id="two archives in one file"),
        pytest.param(lambda whole: whole[:1024] + bytes(5 << 20), id="zeros for what follows"),
    ],
)
def test_no_image_is_left_out_where_a_tar_is_not_whole(tmp_path, settings, image_bytes, damaged):
    image = image_bytes(1, form="PNG")[:500]  # one block
    write_tar(tmp_path / "train.tar", {"a.png": image, "b.png": image, "c.png": image})
    whole = (tmp_path / "train.tar").read_bytes()
    (tmp_path / "train.tar").write_bytes(damaged(whole))
    with pytest.raises(DataError, match=r"train\.tar cannot be read \(.*\d+.*must be a whole"):
        open_source(settings(source="webdataset", path=str(tmp_path)), "train")


def write_links(path, members):
    """Writes a tar of files, as bytes, and of links, as their kind and target."""
    with tarfile.open(path, "w") as file:
        for name, what in members:
            member = tarfile.TarInfo(name)
            if isinstance(what, bytes):
                member.size = len(what)
                file.addfile(member, io.BytesIO(what))
            else:
                member.type, member.linkname = what
                file.addfile(member)


@pytest.mark.parametrize("folder", ["", "./", "d/"])
def test_links_in_a_tar_are_followed(tmp_path, settings, image_bytes, caplog, folder):
    content, soft, hard = image_bytes(1), tarfile.SYMTYPE, tarfile.LNKTYPE
    members = [
        ("0.png", content),
        ("1.png", (soft, "0.png")),
        ("2.png", (hard, f"{folder}0.png")),
        ("3.png", (soft, "2.png")),  # a link to a link
        ("4.png", (hard, f"{folder}3.png")),
        ("0.png", (hard, f"{folder}0.png")),  # tar was given the file twice
        ("5.png", (soft, "nowhere.png")),
        ("6.png", (soft, "5.png")),
        ("7.png", (soft, "8.png")),
        ("8.png", (soft, "7.png")),
        ("9.png", (tarfile.FIFOTYPE, "")),
        ("readme", (soft, "nowhere")),  # of no interest
    ]
    write_links(tmp_path / "train.tar", [(folder + name, what) for name, what in members])
    source = open_source(settings(source="webdataset", path=str(tmp_path)), "train")
    assert [source[index].image for index in range(len(source))] == [content] * 5
    names = [source[index].name.rpartition("/")[2] for index in range(len(source))]
    assert names == [f"{number}.png" for number in range(5)]  # so each counts, if it is damaged
    for left_out in (
        f"skipped 2: a dangling link, such as '{tmp_path}/train.tar/{folder}5.png'",
        f"skipped 2: a link in a circle, such as '{tmp_path}/train.tar/{folder}7.png'",
        f"skipped 1: neither file nor folder, such as '{tmp_path}/train.tar/{folder}9.png'",
    ):
        assert left_out in caplog.text


def test_a_sparse_member_is_left_out_and_named(tmp_path, settings, image_bytes, caplog):
    """The bytes at its offset are those of its blocks, one after the other, without the holes."""
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[200:] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    whole = buffer.getvalue()
    with (tmp_path / "a.bmp").open("wb") as file:
        for start in range(0, len(whole), 4096):
            file.seek(start)
            file.write(whole[start : start + 4096].rstrip(b"\0"))
        file.truncate(len(whole))
    (tmp_path / "b.bmp").write_bytes(whole)
    for form in ("gnu", "pax"):
        tar = tmp_path / form / "train.tar"
        tar.parent.mkdir()
        members = ["-C", tmp_path, "a.bmp", "b.bmp"]
        subprocess.run(["tar", "--sparse", f"--format={form}", "-cf", tar, *members], check=True)
        if tar.stat().st_size > 1.9 * len(whole):
            pytest.skip("this file system keeps no holes")
        caplog.clear()
        source = open_source(settings(source="webdataset", path=str(tar.parent)), "train")
        assert [record.name for record in source] == [f"{tar}/b.bmp"]
        np.testing.assert_array_equal(decode(source[0].image, 256), pixels)
        (line,) = [each.getMessage() for each in caplog.records]
        assert "skipped 1: stored without its holes" in line and line.endswith(f"'{tar}/a.bmp'")


def test_images_with_a_dot_in_their_name_are_named_where_they_are_left_out(
    tmp_path, settings, image_bytes, caplog
):
    image = image_bytes(1)
    names = ("0.png", "0.seg.png", "v1.0/1.png", "IMG.2021.png", "IMG.2022.PNG", "IMG.txt")
    hidden = ("._0.png", "d/._1.png")  # as macOS adds them
    write_tar(tmp_path / "train.tar", dict.fromkeys(names + hidden, image))
    source = open_source(settings(source="webdataset", path=str(tmp_path)), "train")
    assert [record.name.rpartition(".tar/")[2] for record in source] == ["0.png", "v1.0/1.png"]
    (line,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "skipped 2: an image with another dot in its name" in line
    assert line.endswith("train.tar/IMG.2021.png'")


def test_an_image_that_another_of_its_name_replaces_is_named(
    tmp_path, settings, image_bytes, caplog
):
    """As where each class numbers its images from 0, or masks lie beside photographs."""
    tar = tmp_path / "train.tar"
    photograph = image_bytes(2, form="JPEG")
    write_tar(tar, {"0.png": image_bytes(1), "1.jpg": photograph, "1.png": b"a mask"})
    write_tar(tar, {"0.png": image_bytes(3), "0.txt": b"a"}, mode="a")
    write_tar(tar, {"0.txt": b"b"}, mode="a")
    source = open_source(settings(source="webdataset", path=str(tmp_path)), "train")
    assert [record.image for record in source] == [image_bytes(3), photograph]
    (line,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "skipped 2: an image that another of the same name replaces" in line
    assert line.endswith("train.tar/0.png'")


def test_a_path_may_be_written_in_two_ways(tmp_path, settings, image_bytes):
    write_tar(tmp_path / "train.tar", {"./a/0.png": image_bytes(1), "a/0.cls": b"3"})
    source = open_source(settings(source="webdataset", path=str(tmp_path)), "train")
    assert source.labels.tolist() == [3]


@pytest.mark.parametrize(
    ("split", "read", "other"),
    [
        ("train", ["trainset-train-0.tar"], "trainset-val-0.tar"),
        ("val", ["trainset-val-0.tar", "val_1.tar"], "voc-trainval.tar"),
        ("trainval", ["voc-trainval.tar"], None),
        ("valid", ["voc-validation.tar"], None),  # nothing has it as a word
        ("", None, None),
    ],
)
def test_a_split_is_a_word_of_the_names_where_any_has_it_so(
    tmp_path, settings, image_bytes, caplog, split, read, other
):
    caplog.set_level(logging.INFO)
    names = ("trainset-train-0", "trainset-val-0", "val_1", "voc-trainval", "voc-validation")
    for name in names:
        write_tar(tmp_path / f"{name}.tar", {"0.png": image_bytes(1)})
    source = open_source(settings(source="webdataset", path=str(tmp_path)), split)
    tars = [record.name.split("/")[-2] for record in source]
    others = [each.getMessage() for each in caplog.records if "not reading" in each.getMessage()]
    assert others == (
        [f"split {split!r}: not reading the tar files of another one, such as {other!r}"]
        if other
        else []
    )
    assert tars == (read or [f"{name}.tar" for name in names])
    warning = "split 'valid' is only part of a word in 'voc-validation.tar'; rename the tar files"
    assert (warning in caplog.text) == ("part of a word" in caplog.text) == (split == "valid")


def test_links_to_nowhere_are_named_where_there_are_no_images(tmp_path, settings):
    write_links(tmp_path / "train.tar", [("0.png", (tarfile.SYMTYPE, "../elsewhere/0.png"))])
    with pytest.raises(DataError, match=r"hold no images.* \(skipped: 1: a dangling link, such as"):
        open_source(settings(source="webdataset", path=str(tmp_path)), "train")


def test_what_macos_leaves_beside_a_tar_is_no_tar(tars, settings):
    (tars / "train" / "._0.tar").write_bytes(b"of the Finder")
    assert len(open_source(settings(source="webdataset", path=str(tars)), "train")) == 6


def test_classes_and_a_missing_split_are_refused(tars, settings):
    with pytest.raises(DataError, match="has no tar files of split 'val'"):
        open_source(settings(source="webdataset", path=str(tars)), "val")
    with pytest.raises(
        DataError, match=r"data\.path='.*/none' is not a folder; give the folder of"
    ):
        open_source(settings(source="webdataset", path=str(tars / "none")), "train")
    with pytest.raises(DataError, match=r"data\.classes='0' chooses classes by name"):
        open_source(settings(source="webdataset", path=str(tars), classes="0"), "train")


def test_a_tar_that_is_written_anew_meanwhile_gives_no_image_another_label(
    tmp_path, settings, image_bytes
):
    images = [image_bytes(number, form="BMP") for number in range(3)]  # all of the same size
    path = tmp_path / "train.tar"

    def written(*order):
        members = {}
        for number in order:
            members |= {f"{number}.bmp": images[number], f"{number}.cls": str(number).encode()}
        write_tar(path, members)
        os.utime(path, ns=(len(order), 10**9 + order[0]))

    written(0, 1, 2)
    source = open_source(settings(source="webdataset", path=str(tmp_path)), "train")
    content = content_of(source)
    assert [source[index].image for index in range(3)] == images
    path.touch()  # the same images
    assert [source[index].image for index in range(3)] == images
    written(2, 1, 0)
    for index in range(3):
        with pytest.raises(DataError, match=r"train\.tar was rewritten .* the same command"):
            source[index]
    assert content_of(source) == content  # so no cache takes its features for the new images'
    written(0, 1, 2)
    assert [source[index].image for index in range(3)] == images


def test_a_tar_is_waited_for_while_it_is_being_written_anew(tmp_path, settings, image_bytes):
    path, image = tmp_path / "train.tar", image_bytes(1)
    write_tar(path, {"1.jpg": image, "1.cls": b"0"})
    source = open_source(settings(source="webdataset", path=str(tmp_path)), "train")
    whole = path.read_bytes()
    path.write_bytes(whole[:600])
    threading.Timer(0.3, path.write_bytes, [whole]).start()
    assert source[0].image == image


def test_a_tar_that_stays_cut_short_is_waited_for_no_longer(
    tmp_path, settings, image_bytes, monkeypatch
):
    path = tmp_path / "train.tar"
    write_tar(path, {"1.jpg": image_bytes(1), "1.cls": b"0"})
    source = open_source(settings(source="webdataset", path=str(tmp_path)), "train")
    path.write_bytes(path.read_bytes()[:600])
    monkeypatch.setattr(tar_module, "_PAUSES", (0.0, 0.0))
    with pytest.raises(DataError, match=r"train\.tar cannot be read .*whole, uncompressed"):
        source[0]


LOST = {
    "deleted": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a circle of links": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(tar_module, "_PAUSES", (0.01,))
    monkeypatch.setenv(faults.SECONDS, "0.3")


@pytest.mark.parametrize("lost", LOST)
def test_a_tar_that_is_lost_meanwhile_is_not_one_damaged_image(tars, settings, hasty, lost):
    source = open_source(settings(source="webdataset", path=str(tars)), "train")
    damaged = DamagedLog(len(source), max_fraction=0.9)
    batches = training_batches(source, batch=6, canvas=16, seed=0, threads=2, damaged=damaged)
    with contextlib.closing(batches):
        next(batches)
        LOST[lost](tars / "train" / "1.tar")
        said = rf"^the file {tars}/train/1\.tar of .* cannot be read \(.*\); repair or replace it"
        with pytest.raises(DataError, match=said) as raised:
            for _ in range(20):  # some were read ahead
                next(batches)
    assert code_of(raised.value) == EXIT_WRONG_SETTING and not len(damaged)


def test_a_tar_out_of_reach_is_waited_for_and_an_outage(tars, settings, hasty, monkeypatch):
    source = open_source(settings(source="webdataset", path=str(tars)), "train")
    opens, opened = tar_module.open_to_read, []

    def failing(path):
        opened.append(path)
        if path.endswith("1.tar") and len(opened) < failures:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return opens(path)

    monkeypatch.setattr(tar_module, "open_to_read", failing)
    read = RecordReader(source, lambda name: False)
    failures = 2
    assert read(4, bytes)[0].label == 1
    failures = 10**6
    with pytest.raises(faults.Outage, match=r"Input/output error, for 0\.3 s; the same command"):
        read(4, bytes)


def test_a_part_of_a_tar_that_cannot_be_read_is_one_image_of_its_own(tars, settings, monkeypatch):
    source = open_source(settings(source="webdataset", path=str(tars)), "train")

    class Torn(io.FileIO):
        def read(self, *size):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(tar_module, "open_to_read", Torn)
    read, names = RecordReader(source, lambda name: True), []  # which waits for none
    for index in (3, 4):
        with pytest.raises(UnreadableRecord) as raised:
            read(index, bytes)
        names.append(raised.value.name)
    assert names == [f"{tars}/train/1.tar/s1/{number}.jpg" for number in (0, 1)]


def test_a_member_larger_than_any_image_is_damaged_and_not_read(
    tmp_path, settings, image_bytes, monkeypatch
):
    path = tmp_path / "train.tar"
    write_tar(path, {"0.jpg": image_bytes(0), "0.cls": b"0", "1.cls": b"0"})
    with tarfile.open(path, "a") as file:
        member = tarfile.TarInfo("1.jpg")
        member.size = 2**27  # as sparse as the file
        file.fileobj.seek(file.offset)
        file.fileobj.write(member.tobuf())
    os.truncate(path, path.stat().st_size // 512 * 512 + 2**27 + 1024)
    source = open_source(settings(source="webdataset", path=str(tmp_path)), "train")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    read = RecordReader(source, lambda name: False)
    assert read(0, bytes)[1] == image_bytes(0)
    with pytest.raises(UnreadableRecord, match=r"train\.tar/1\.jpg: it has 134,217,728 bytes"):
        read(1, bytes)
