"""Images of objects in several views: drawn ones, and a drawn miniature of 3DIEBench."""

import dataclasses
import os
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from cassle_jax.data import DataError, Motifs, Scenes
from cassle_jax.data.datasets import DATASETS, open_dataset
from cassle_jax.data.objects import RenderedObjects
from cassle_jax.data.sources import content_of, has_changed, labels_of, views_of
from cassle_jax.data.splits import cut
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.equivariance import RIGHT, EquivarianceSettings
from cassle_jax.evaluation.findings import Score
from cassle_jax.evaluation.protocols import PROTOCOLS
from cassle_jax.evaluation.store import FeatureStore
from cassle_jax.evaluation.subject import Subject
from cassle_jax.methods import Networks
from tests.evaluation.analysed import JITTERED, PIXELS, PLAIN, SPEC, Colour, devices

TORN = b"\x93NUMPY\x01\x00\x76\x00{".ljust(128)  # a header whose bracket stays open
CLASSES = ("02691156", "03001627")
TRAIN, VAL, VIEWS = 24, 4, 5


def latents(draw):
    angles = draw.uniform(-np.pi / 2, np.pi / 2, 3)
    floor, theta, phi, light = draw.uniform(0, [1, np.pi / 4, 2 * np.pi, 1])
    return np.array([*angles, floor, theta, phi, light])


def write_object(folder, draw):
    """Views whose red is the floor's hue, and whose green and blue are the light's."""
    folder.mkdir(parents=True)
    for view in range(VIEWS):
        numbers = latents(draw)
        colour = np.array([numbers[3], numbers[6], numbers[6]]) * 200 + 20
        pixels = np.full((PIXELS, PIXELS, 3), colour).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"image_{view}.jpg", quality=100, subsampling=0)
        np.save(folder / f"latent_{view}.npy", numbers)


@pytest.fixture
def rendered(tmp_path, monkeypatch):
    """3DIEBench's layout, of two classes."""
    draw = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        # Not in the order of their names.
        objects = [f"/{CLASSES[i % 2]}/{split}{count - i:02}/" for i in range(count)]
        for each in objects:
            write_object(tmp_path / each.strip("/"), draw)
        np.save(tmp_path / f"{split}_images.npy", np.array(objects))
    small = dataclasses.replace(DATASETS["3diebench"], outputs=2)
    monkeypatch.setitem(DATASETS, "3diebench", small)
    return tmp_path


def test_rendered_objects_come_by_class_object_and_view(rendered):
    source = RenderedObjects(str(rendered), "train")
    assert len(source) == TRAIN * VIEWS
    assert (source.class_names, source.views) == (CLASSES, VIEWS)
    names = [source[index].name.removeprefix(f"{rendered}/") for index in range(len(source))]
    in_order = sorted({name.rsplit("/", 1)[0] for name in names})
    assert names == [f"{each}/image_{view}.jpg" for each in in_order for view in range(VIEWS)]
    assert [CLASSES[label] for label in labels_of(source)] == [name.split("/")[0] for name in names]
    assert [source[index].label for index in range(len(source))] == labels_of(source).tolist()
    again = pickle.loads(pickle.dumps(source))
    assert again[7] == source[7]
    assert (again.names, again.content) == (source.names, source.content)
    assert RenderedObjects(str(rendered), "val").names != source.names
    for outside in (-1, TRAIN * VIEWS):
        with pytest.raises(IndexError):
            source[outside]


def test_its_factors_are_those_that_a_view_was_rendered_from(rendered):
    source = RenderedObjects(str(rendered), "val")
    places = np.array([3, 11])
    found = source.factors_of(places)
    assert found.keys() == source.changing.keys()
    for row, place in enumerate(places):
        name = source[int(place)].name
        numbers = np.load(name.replace("image_", "latent_").replace(".jpg", ".npy"))
        np.testing.assert_array_equal(found["rotation"][row], numbers[:3])
        by_name = ("floor hue", "light theta", "light phi", "light hue")
        assert [found[each][row] for each in by_name] == numbers[3:].tolist()


def test_a_pipe_in_the_place_of_an_image_is_refused_and_not_waited_for(rendered):
    objects = RenderedObjects(str(rendered), "train")
    path = pathlib.Path(objects[0].name)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="a pipe or a device"):
        objects[0]


def test_the_views_of_an_object_are_not_cut_apart(rendered):
    data = open_dataset("3diebench", path=str(rendered))
    assert (data.classes, data.task, data.metric) == (2, "classification", "accuracy")
    parts = {"train": data.train, "val": data.val, "test": data.test}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": (TRAIN - 2) * VIEWS,
        "val": 2 * VIEWS,
        "test": VAL * VIEWS,
    }
    seen = [{part[i].name.rsplit("/", 1)[0] for i in range(len(part))} for part in parts.values()]
    assert len(set.union(*seen)) == sum(map(len, seen)) == TRAIN + VAL
    for part in parts.values():
        assert views_of(part) == VIEWS
        place = np.array([len(part) - 1])
        path = part[int(place[0])].name.replace("image_", "latent_").replace(".jpg", ".npy")
        assert part.factors_of(place)["floor hue"][0] == np.load(path)[3]


def test_a_list_of_objects_that_is_replaced_is_noticed(rendered):
    source = RenderedObjects(str(rendered), "train")
    content = content_of(source)
    assert not has_changed(source)
    os.utime(rendered / "train_images.npy", (0, 0))
    assert content_of(source) == content and has_changed(source)


def test_one_object_cannot_be_cut():
    with pytest.raises(DataError, match="has 1 object; cutting off a validation part"):
        cut(Motifs(4, size=8, views=4), 0.1, "motifs/train")


def test_what_its_images_show_is_read_and_followed(rendered):
    data = open_dataset("3diebench", path=str(rendered))
    networks = Networks({"encoder": Colour})
    variables = {"params": {}, "batch_stats": {}}
    subject = Subject("colours", networks, variables, SPEC, PLAIN, (JITTERED, JITTERED))
    bench = Bench(subject, data, FeatureStore(subject, devices(1), batch=20))
    protocol = PROTOCOLS["equivariance"]
    settings = EquivarianceSettings()
    assert protocol.suits(data, requested=False) and protocol.unmet(data, settings) == ""
    found = {
        each.metric: each.value for each in protocol.run(bench, settings) if isinstance(each, Score)
    }
    read = {name: found[f"{name}: R² of the change"] for name in data.test.changing}
    assert min(read["floor hue"], read["light hue"], found["mean, colour: R² of the change"]) > 0.9
    assert max(read["rotation"], read["light phi"]) < 0.5
    # By direction alone, two numbers do not single a view out.
    assert found[f"MRR, {RIGHT}"] > found["MRR, chance"] + 0.15
    assert found["MRR, chance"] == pytest.approx((1 / np.arange(1, VIEWS + 1)).mean())
    few = FeatureStore(subject, devices(1), batch=20, limit=10)
    findings = protocol.run(dataclasses.replace(bench, store=few), settings)
    assert {each.metric for each in findings if isinstance(each, Score)} == found.keys()


def spoilt(file, content):
    def spoil(root):
        np.save(root / file, content)

    return spoil


def removed(file):
    def spoil(root):
        (root / file).rename(root / "elsewhere")

    return spoil


LIST, FIRST = "train_images.npy", f"{CLASSES[0]}/train02"
LATENT = f"{FIRST}/latent_0.npy"
WANTED = "; it should hold the split's objects as '/<class>/<object>/'"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (removed(LIST), ("train_images.npy' cannot be read (", "No such file", WANTED)),
        (spoilt(LIST, np.arange(3)), ("train_images.npy' holds int64 of shape (3,)", WANTED)),
        (spoilt(LIST, np.array(["02691156"])), ("holds <U8 of shape (1,)", WANTED)),
        (lambda root: (root / LIST).write_text("a\nb\n"), ("npy' cannot be read (", WANTED)),
        (removed(CLASSES[1]), ("lacks 1 of the 2 class folders", "the first is '03001627'")),
        (removed(f"{FIRST}/image_1.jpg"), ("train02' has 1 of the images image_0.jpg,",)),
        (removed(LATENT), ("latent_0.npy' cannot be read (",)),
        (lambda root: (root / LATENT).write_bytes(TORN), ("latent_0.npy' cannot be read (",)),
        (spoilt(LATENT, np.zeros(9)), ("holds float64 of shape (9,); a view has 7 finite",)),
        (spoilt(LATENT, np.full(7, np.nan)), ("; a view has 7 finite numbers",)),
    ],
)
def test_missing_and_wrong_files_are_one_line(rendered, spoil, said):
    spoil(rendered)
    with pytest.raises(DataError) as caught:
        open_dataset("3diebench", path=str(rendered))
    message = str(caught.value)
    assert message.startswith("dataset '3diebench': ") and all(each in message for each in said)
    assert "\n" not in message and "data.path" not in message


def test_a_folder_that_is_none_is_refused(rendered):
    with pytest.raises(
        DataError, match=r"path='.*/none' is not a folder; give the root of <class>/"
    ):
        RenderedObjects(str(rendered / "none"), "train")


def test_a_view_without_its_numbers_is_named_when_they_are_read(rendered):
    (rendered / f"{CLASSES[0]}/val04/latent_2.npy").unlink()
    source = RenderedObjects(str(rendered), "val")
    with pytest.raises(DataError, match=r"val04/latent_2.npy' cannot be read"):
        source.factors_of(np.arange(len(source)))


@pytest.mark.parametrize(
    ("family", "content"),
    [(Motifs, {"shape", "texture", "pattern", "count"}), (Scenes, {"shape", "texture"})],
)
def test_drawn_views_differ_in_all_but_their_content(family, content):
    plain = family(12, size=16, seed=3)
    seen = plain.in_views(12, 4)
    assert (len(seen), views_of(seen), views_of(plain)) == (12, 4, 1)
    factors = {name: values.reshape(3, 4) for name, values in seen.factors.items()}
    assert factors.keys() - seen.changing.keys() == content
    for name, values in factors.items():
        same = (values == values[:, :1]).all()
        assert same == (name in content), name
    for place in (0, 4, 8):
        np.testing.assert_array_equal(seen[place].image, plain[place].image)
    some = seen.factors_of(np.array([5, 2]))
    assert some["hue"].tolist() == seen.factors["hue"][[5, 2]].tolist()
    again = pickle.loads(pickle.dumps(seen))
    np.testing.assert_array_equal(again[6].image, seen[6].image)
    assert seen.content != plain.content and seen.name != plain.name


def test_a_drawn_view_is_the_image_of_its_factors():
    seen = Motifs(6, size=16, views=3)
    for place in range(6):
        factors = {name: values[place].item() for name, values in seen.factors.items()}
        np.testing.assert_array_equal(seen[place].image, Motifs.draw(factors, np.zeros(0), 16))
