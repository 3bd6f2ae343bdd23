"""Image folders as they come: the published layouts, images without labels, what is left out."""

import logging
import os
import pathlib
import sys
from types import SimpleNamespace

import pytest

from cassle_jax.data import DataError, listing, open_source
from cassle_jax.data.datasets import open_dataset
from cassle_jax.data.folder import open_folder
from cassle_jax.data.landmarks import LandmarkFolder
from cassle_jax.data.objects import RenderedObjects
from cassle_jax.data.sources import content_of, content_of_files
from cassle_jax.data.tar import open_tars


@pytest.fixture
def tree(tmp_path):
    """Writes files, given by their paths; their content is their path."""

    def make(*paths: str) -> pathlib.Path:
        root = tmp_path / "images"
        for path in paths:
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(path)
        return root

    return make


def read(source) -> list[tuple[str, str | None]]:
    """What every record holds, with the name of its class."""
    names = source.class_names
    records = [source[index] for index in range(len(source))]
    assert [record.label for record in records] == source.labels.tolist()
    return [(r.image.decode(), names[r.label] if r.label >= 0 else None) for r in records]


def refuse_folders(monkeypatch, ending):
    """Listing a folder whose path ends so is not permitted."""
    scandir = os.scandir

    def refuse(path):
        if os.fsdecode(path).endswith(ending):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_tiny_imagenet_as_it_is_published(tree):
    images = ["n1/images/n1_0.JPEG", "n1/images/n1_1.JPEG", "n2/images/n2_0.JPEG"]
    root = tree(
        *(f"train/{image}" for image in images),
        "train/n1/n1_boxes.txt",
        "train/n2/n2_boxes.txt",
        "val/images/val_0.JPEG",
        "val/images/val_1.JPEG",
        "val/images/val_2.JPEG",
        "test/images/test_0.JPEG",
        "wnids.txt",
    )
    lines = [
        "val_0.JPEG\tn2\t0\t0\t9\t9",
        "val_1.JPEG\tn1\t0\t0\t9\t9",
        "val_2.JPEG\tn2\t0\t0\t9\t9",
    ]
    # Some editors begin a file of text with a byte order mark, which is no part of the first name.
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines), encoding="utf-8-sig")
    train = open_folder(str(root), "train")
    assert train.class_names == ("n1", "n2")
    assert read(train) == [(f"train/{image}", image[:2]) for image in images]
    val = open_folder(str(root), "val")
    assert val.class_names == train.class_names
    assert read(val) == [
        ("val/images/val_1.JPEG", "n1"),
        ("val/images/val_0.JPEG", "n2"),
        ("val/images/val_2.JPEG", "n2"),
    ]
    for data in (open_dataset(f"folder:{root}"), open_dataset("tiny_imagenet", path=str(root))):
        assert data.task == "classification"
        assert read(data.test) == read(val)
        assert len(data.train) + len(data.val) == 3
    (root / "val" / "images" / "val_3.JPEG").write_text("nobody knows")
    assert len(open_folder(str(root), "val")) == 3


def test_other_labels_of_the_same_images_are_other_content(tree):
    root = tree(*(f"val/images/{number}.png" for number in range(3)))

    def opened(*labels):
        lines = [f"{number}.png\t{label}\n" for number, label in enumerate(labels)]
        (root / "val" / "val_annotations.txt").write_text("".join(lines))
        source = open_folder(str(root), "val")
        return source.class_names, [path for path, _ in read(source)], content_of(source)

    (*before, content), (*after, other) = opened("a", "a", "b"), opened("a", "b", "b")
    assert before == after and content != other


def test_a_folder_is_looked_through_once_for_what_it_holds(tree, monkeypatch):
    source = open_folder(str(tree("train/a/1.png", "train/b/2.png")), "train")
    content = content_of(source)
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "stat", None)
        assert content_of(source) == content


@pytest.mark.parametrize("val", ["val/n1/b.JPEG val/n2/c.JPEG", "val/b.JPEG val/c.JPEG"])
def test_imagenet_as_it_is_published(tree, val, caplog):
    caplog.set_level(logging.INFO)
    files = val.split()
    root = tree("train/n1/a.JPEG", "train/n1/b.JPEG", "train/n2/a.JPEG", *files, "test/t.JPEG")
    assert open_folder(str(root), "train").labels.tolist() == [0, 0, 1]
    labels = ["n1", "n2"] if "n1" in val else [None, None]
    assert read(open_folder(str(root), "val")) == list(zip(files, labels, strict=True))
    data = open_dataset(f"folder:{root}")
    assert len(data.test) == 2
    assert (data.task, data.classes) == (
        ("classification", 2) if "n1" in val else ("unlabelled", 0)
    )
    assert ("leaving out the tasks that need them" in caplog.text) == ("n1" not in val)


UNLABELLED = {
    "directly in the path": ("", ["a.jpg", "b.png"]),
    "directly in the split": ("train/", ["a.jpg", "b.png"]),
    "of several depths, without splits": (
        "",
        ["2019/05/a.jpg", "2019/b.jpg", "c.jpg", "x/y/z/d.JPG"],
    ),
    "most of them beside folders": ("train/", ["a.jpg", "b.jpg", "c.jpg", "more/d.jpg"]),
}


@pytest.mark.parametrize(("inside", "files"), UNLABELLED.values(), ids=UNLABELLED)
def test_a_folder_without_labels_is_read_at_any_depth(tree, settings, inside, files, caplog):
    caplog.set_level(logging.INFO)
    root = tree(*(inside + file for file in files), inside + "README.txt")
    source = open_source(settings(source="folder", path=str(root)), "train")
    assert source.class_names == ()
    assert read(source) == [(inside + file, None) for file in files]
    assert f"{len(files)} images without labels" in caplog.text
    with pytest.raises(DataError, match=r"data\.classes='imagenet100' needs labels"):
        open_source(settings(source="folder", path=str(root), classes="imagenet100"), "train")
    data = open_dataset(f"folder:{root}") if not inside else None
    assert data is None or (data.task, data.classes) == ("unlabelled", 0)


def test_a_root_that_holds_datasets_is_no_folder_of_images(tree):
    root = tree("pets/train/cat/a.jpg", "birds/train/owl/a.jpg")
    with pytest.raises(DataError, match=f"did you mean data.path='{root}/(pets|birds)'"):
        open_folder(str(root), "train")
    assert len(open_folder(str(root), "")) == 2


def test_a_folder_without_test_is_tested_on_its_validation_part(tree, settings):
    files = [f"{name}/{number}.jpg" for name in "ab" for number in "12"]
    root = tree(*(f"{split}/{file}" for split in ("train", "val") for file in files))
    held_out = [(f"val/{file}", file[0]) for file in files]
    assert read(open_source(settings(source="folder", path=str(root)), "test")) == held_out
    data = open_dataset(f"folder:{root}")
    assert read(data.test) == held_out
    assert len(data.train) + len(data.val) == 4


def test_what_is_skipped_is_counted_by_kind(tree, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    root = tree("train/a/1.jpg", "train/a/2.PNG", "train/b/1.webp", "train/stray.jpg")
    split = root / "train"
    for number in range(16):
        (split / "a" / f"gone{number:02d}.jpg").symlink_to(root / "nowhere" / f"{number}.jpg")
    (split / "a" / "self.jpg").symlink_to(split / "a" / "self.jpg")
    (split / "b" / "up").symlink_to(split)
    (split / "b" / "top").symlink_to(root)
    (root / "val").mkdir()
    (root / "val" / "5.jpg").write_bytes((split / "a" / "1.jpg").read_bytes())
    (split / "b" / "also.jpg").symlink_to(split / "a" / "1.jpg")
    (split / "a" / ".DS_Store").write_text("hidden")
    for number in range(3):
        (split / "b" / f"{number}_boxes.txt").write_text("text")
    (split / "b" / "locked").mkdir()
    os.mkfifo(split / "b" / "pipe.jpg")
    refuse_folders(monkeypatch, "locked")
    source = open_folder(str(root), "train")
    assert [name for _, name in read(source)] == ["a", "a", "b", "b"]
    for count, kind, example in (
        (16, "a dangling link", "a/gone"),
        (3, "a link in a circle", ""),
        (1, "unreadable", "b/locked"),
        (1, "hidden", "a/.DS_Store"),
        (3, "not an image by its extension", "_boxes.txt"),
        (1, "neither file nor folder", "b/pipe.jpg"),
        (1, "beside the class folders", "stray.jpg"),
    ):
        (line,) = [each for each in caplog.messages if f": {kind}," in each]
        assert f"skipped {count}: " in line
        assert example in line


def test_folders_that_systems_make_among_images_hold_no_images(tree):
    """A disk station keeps thumbnails beside each image; a disk and an archive add folders."""
    own = ("train/@eaDir/x/1.jpg", "train/a/@eaDir/1.jpg/THUMB_M.jpg", "train/__MACOSX/a/1.jpg")
    root = tree("train/a/1.jpg", "train/b/1.jpg", *own)
    (root / "train" / "lost+found").mkdir()
    source = open_folder(str(root), "train")
    assert [name for _, name in read(source)] == ["a", "b"]
    assert source.class_names == ("a", "b")


def test_folders_may_be_nested_deeply(tmp_path, image_bytes):
    folders = [tmp_path]
    for _ in range(sys.getrecursionlimit() + 10):
        folders.append(folders[-1] / "d")
        folders[-1].mkdir()
    image = folders[-1] / "0.png"
    image.write_bytes(image_bytes(1))
    try:
        assert len(open_folder(str(tmp_path), "")) == 1
    finally:  # pytest cannot remove them
        image.unlink()
        for folder in reversed(folders[1:]):
            folder.rmdir()


def test_a_bucket_is_queried_for_its_folder(monkeypatch):
    there = SimpleNamespace(
        Path=lambda path: SimpleNamespace(is_dir=lambda: path == "gs://b/there")
    )
    monkeypatch.setattr(listing, "epath", there)
    assert listing.is_folder("gs://b/there") and not listing.is_folder("gs://b/gone")


@pytest.mark.parametrize(
    "opens",
    [
        lambda path: open_folder(path, "train"),
        lambda path: open_tars(path, "train"),
        lambda path: LandmarkFolder(path, "train", 2),
        lambda path: RenderedObjects(path, "train"),
    ],
)
def test_a_bucket_is_to_be_mounted_and_no_path_is_refused(opens):
    with pytest.raises(DataError, match=r"^data\.path='gs://b/c' is on an object store; mount it,"):
        opens("gs://b/c")
    with pytest.raises(DataError, match=r"^data\.path='' is not a folder; give the "):
        opens("")


def test_labels_that_are_no_text_are_one_line(tree):
    root = tree("val/images/0.png")
    (root / "val" / "val_annotations.txt").write_bytes(b"0.png\t\xff\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt' cannot be read: .*0xff") as caught:
        open_folder(str(root), "val")
    assert "\n" not in str(caught.value)


def test_labels_of_no_image_are_refused(tree):
    root = tree("val/images/0.png", "val/images/1.png")
    annotations = root / "val" / "val_annotations.txt"
    for written in ("0.png n1\n1.png n2\n", "images/0.png\tn1\nimages/1.png\tn2\n", ""):
        annotations.write_text(written)
        with pytest.raises(DataError, match=r"_annotations\.txt' names none .* and its class$"):
            open_folder(str(root), "val")


def test_two_classes_of_an_image_are_refused_and_lines_without_an_image_are_counted(tree, caplog):
    root = tree("val/images/0.png", "val/images/1.png")
    annotations = root / "val" / "val_annotations.txt"
    lines = "0.png\tn1\n1.png\tn2\n1.png\tn2\n"
    annotations.write_text(lines + "2.png\tn2\n3.png\tn3\n")
    source = open_folder(str(root), "val")
    assert len(source) == 2 and source.class_names == ("n1", "n2")
    assert "skipped 2: a line of the annotations without its image, such as '2.png'" in caplog.text
    annotations.write_text(lines + "1.png\tn1\n")
    with pytest.raises(DataError, match=r"_annotations\.txt' gives '1\.png' two classes, 'n2' a"):
        open_folder(str(root), "val")


def test_a_file_that_has_gone_is_other_content(tree):
    root = tree("train/a/1.png", "train/b/2.png")
    paths = [root / "train" / "a" / "1.png", root / "train" / "b" / "2.png"]
    before = content_of_files(paths)
    paths[1].unlink()
    assert content_of_files(paths) != before


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_that_cannot_be_read_is_reported_in_one_line(tree, split, monkeypatch):
    root = tree("train/a/1.jpg", "train/b/1.jpg")
    (root / "test").symlink_to(root / "test")
    refuse_folders(monkeypatch, "train")
    said = "cannot be listed: Permission denied" if split == "train" else "no split 'test'"
    with pytest.raises(DataError, match=said) as caught:
        open_folder(str(root), split)
    assert "\n" not in str(caught.value)


def test_a_folder_whose_files_are_no_images_says_what_they_are(tree):
    root = tree("train/a/1.npy", "train/b/2.npy")
    with pytest.raises(DataError, match=r"no images .*2: not an image by its extension, such as"):
        open_folder(str(root), "train")
