"""The batches: their order, their pixels, exact restarts, and what damaged files do to them."""

import json
import os
import threading
import time
from collections import Counter

import numpy as np
import pytest

from cassle_jax.data import (
    DamagedLog,
    DataError,
    Record,
    TooManyDamaged,
    decode,
    evaluation_batches,
    open_source,
    steps_per_epoch,
    training_batches,
)
from cassle_jax.data import pipeline as pipeline_module
from cassle_jax.data.folder import open_folder
from cassle_jax.data.memory import Kept, KeptRecords, what_to_keep
from cassle_jax.data.sources import labels_of, names_of, root_of
from cassle_jax.faults import Outage

PINNED = [31, 21, 40, 12, 49, 47, 9, 27, 10, 41, 46, 20]


class Numbered:
    """Small images that show their index; some can be damaged, and every read is counted."""

    class_names = ("even", "odd")
    name = "numbered"

    def __init__(self, length: int, damaged: tuple[int, ...] = ()):
        self.length = length
        self.damaged = set(damaged)
        self.reads: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        self.reads.append(index)
        if index in self.damaged:
            return Record(b"not an image", index % 2, f"file {index}")
        height, width = 1 + index % 5, 1 + index % 7
        pixels = np.full((height, width, 3), (index % 256, index // 256, 7), np.uint8)
        return Record(pixels, index % 2, f"file {index}")


def lenient(source) -> DamagedLog:
    return DamagedLog(len(source), 1.0)


def training(source, **changed):
    usual = {"batch": 12, "canvas": 8, "seed": 5, "threads": 2, "damaged": lenient(source)}
    return training_batches(source, **{**usual, **changed})


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return [next(iterator) for _ in range(count)]


def assert_same(batches, expected) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


@pytest.fixture(params=[64, 3], ids=["one chunk", "many chunks"])
def chunk(request, monkeypatch):
    """Rows a thread decodes at a time."""
    monkeypatch.setattr(pipeline_module, "_MAX_CHUNK", request.param)


def test_a_batch_holds_the_decoded_images(image_folder, settings):
    root = image_folder({"a": 7, "b": 6})
    source = open_source(settings(source="folder", path=str(root)), "train")
    batch = next(training(source, canvas=20))
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        "image": (np.uint8, (12, 20, 20, 3)),
        "size": (np.int32, (12, 2)),
        "label": (np.int32, (12,)),
        "index": (np.int32, (12,)),
    }
    for row, index in enumerate(batch["index"]):
        record = source[int(index)]
        image = decode(record.image, 20)
        height, width = batch["size"][row]
        assert image.shape == (height, width, 3)
        np.testing.assert_array_equal(batch["image"][row, :height, :width], image)
        assert not batch["image"][row, height:].any()
        assert not batch["image"][row, :, width:].any()
        assert batch["label"][row] == record.label


def test_every_epoch_is_another_permutation(chunk):
    source = Numbered(50)
    batches = take(training(source), 12)
    epochs = [np.concatenate([b["index"] for b in batches[e : e + 4]]) for e in (0, 4, 8)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 48
        assert not np.array_equal(epoch, np.sort(epoch))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


@pytest.mark.exhaustive
def test_the_order_is_uniform():
    """Chi-squared: over 400 epochs, each image comes first, and last, about equally often."""
    source = Numbered(20)
    first, last = np.zeros(20), np.zeros(20)
    for batch in take(training(source, batch=20), 400):
        first[batch["index"][0]] += 1
        last[batch["index"][-1]] += 1
    for counts in (first, last):
        assert ((counts - 20) ** 2 / 20).sum() < 43.8  # 0.1 % of the distribution lies above


def test_the_order_is_pinned():
    """A run continued with a newer version finds the order it began with."""
    assert next(training(Numbered(50)))["index"].tolist() == PINNED


def test_the_seed_changes_the_order():
    first, second = (next(training(Numbered(500), seed=seed))["index"] for seed in (0, 2**62))
    assert not np.array_equal(first, second)


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_order(chunk, count):
    source = Numbered(50, damaged=(3, 4, 20))
    expected = take(training(source), 9)
    parts = [
        take(training(source, process_index=p, process_count=count, threads=1 + p), 9)
        for p in range(count)
    ]
    joined = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in expected[0]}
        for step in range(9)
    ]
    assert_same(joined, expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_do_not_change_the_batches(chunk, threads):
    source = Numbered(50, damaged=(0, 49))
    assert_same(take(training(source, threads=threads), 9), take(training(source), 9))


@pytest.mark.exhaustive
@pytest.mark.parametrize("step", [0, 1, 3, 4, 7, 17])
def test_restart_is_exact(chunk, step):
    source = Numbered(50, damaged=(9,))
    iterator = training(source)
    take(iterator, step)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 6)

    fresh = training(source, threads=1)
    fresh.set_state(state)
    assert_same(take(fresh, 6), expected)
    iterator.set_state(state)
    assert_same(take(iterator, 6), expected)
    assert_same(take(training(source, start_step=step), 6), expected)


def test_a_dataset_that_lost_images_continues_in_the_order_of_a_new_run():
    state = training(Numbered(50)).get_state()
    fewer = training(Numbered(47))
    with pytest.raises(DataError, match=r"length=50, this run 47: .*--accept_changes"):
        fewer.set_state({**state, "step": 9})
    fewer.set_state({**state, "step": 9, "length": 47})
    assert_same(take(fewer, 6), take(training(Numbered(47)), 15)[9:])


def test_restart_with_another_number_of_processes():
    source = Numbered(50)
    half = training(source, process_index=1, process_count=2)
    take(half, 5)
    whole = training(source)
    whole.set_state(half.get_state())
    np.testing.assert_array_equal(next(whole)["index"][6:], next(half)["index"])


def test_restart_reads_nothing_that_came_before():
    source = Numbered(1000)
    iterator = training(source, batch=10)
    iterator.set_state({**iterator.get_state(), "step": 95})
    source.reads.clear()
    batches = take(iterator, 3)
    iterator.close()
    assert len(source.reads) <= 10 * 8
    assert set(batches[0]["index"].tolist()) <= set(source.reads)


def test_restart_refuses_another_order():
    state = training(Numbered(50)).get_state()
    for changed in (training(Numbered(51)), training(Numbered(50), batch=10)):
        with pytest.raises(DataError, match=r"length=50|batch=12"):
            changed.set_state(state)
    with pytest.raises(DataError, match="seed=5"):
        training(Numbered(50), seed=6).set_state(state)


def test_a_source_whose_records_are_kept_has_its_own_properties(image_folder):
    source = open_folder(str(image_folder({"ant": 2, "bee": 1})), "train")
    kept = KeptRecords(source, 2, 10**6)
    assert (root_of(kept), names_of(kept)) == (root_of(source), names_of(source))
    assert labels_of(kept).tolist() == [0, 0, 1] and root_of(kept)


@pytest.mark.parametrize("cache_bytes", [0, 10**6], ids=["read", "kept"])
def test_a_damaged_image_is_replaced_by_the_next_good_one(chunk, cache_bytes):
    damaged = (6, 7, 8, 49)
    source = Numbered(50, damaged)
    whole = Numbered(50)
    expected = {6: 9, 7: 9, 8: 9, 49: 0}
    got = take(training(source, cache_bytes=cache_bytes), 8)
    for batch, clean in zip(got, take(training(whole), 8), strict=True):
        replaced = [expected.get(i, i) for i in clean["index"].tolist()]
        assert batch["index"].tolist() == replaced
        assert batch["label"].tolist() == [i % 2 for i in replaced]
        assert batch["image"][:, 0, 0, 0].tolist() == [i % 256 for i in replaced]


def test_too_many_damaged_stop_the_run_with_their_list():
    source = Numbered(50, damaged=(6, 30, 40))
    iterator = training(source, damaged=DamagedLog(50, 0.04))
    with pytest.raises(TooManyDamaged) as caught:
        take(iterator, 8)
    for number in (6, 30, 40):
        assert f"file {number}" in str(caught.value)
    assert "3 of 50" in str(caught.value)
    assert "data.max_bad_fraction=0.04" in str(caught.value)


@pytest.mark.parametrize("cache_bytes", [0, 10 * 8 * 8 * 3])
def test_nothing_decodable_is_an_error_not_an_endless_search(cache_bytes):
    with pytest.raises(DataError, match="no image of 'numbered'"):
        next(training(Numbered(20, tuple(range(20))), cache_bytes=cache_bytes))


def test_an_unreadable_file_counts_as_damaged(image_folder, settings):
    root = image_folder({"a": 6, "b": 8})
    source = open_source(settings(source="folder", path=str(root)), "train")
    (root / "train" / "a" / "002.png").unlink()
    (root / "train" / "b" / "001.png").write_bytes(b"")
    (pipe := root / "train" / "b" / "003.png").unlink()
    os.mkfifo(pipe)
    damaged = DamagedLog(14, 0.5)
    batch = next(training(source, batch=14, canvas=20, damaged=damaged))
    assert not {2, 7, 9} & set(batch["index"].tolist())
    assert [name.rsplit("/", 2)[1:] for name in damaged.names] == [
        ["a", "002.png"],
        ["b", "001.png"],
        ["b", "003.png"],
    ]


def test_trouble_of_the_machine_is_no_damaged_image_and_reaches_the_consumer_from_its_thread(
    monkeypatch,
):
    monkeypatch.setenv("CASSLE_STORAGE_SECONDS", "0.1")

    class Failing(Numbered):
        broken = True

        def __getitem__(self, index):
            if self.broken and index == 13:
                raise OSError(24, "Too many open files")
            return super().__getitem__(index)

    source = Failing(50)
    iterator = training(source)
    seen = []
    with pytest.raises(Outage, match=r"numbered #13: Too many open files, for 0\.1 s; the same c"):
        for _ in range(8):
            seen.append(next(iterator))
    assert iterator.get_state()["step"] == len(seen)
    source.broken = False
    assert_same([*seen, *take(iterator, 4)], take(training(Numbered(50)), len(seen) + 4))


@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [1, 2])
def test_kept_images_are_read_once_and_the_same(chunk, processes):
    for part in range(processes):
        share = {"process_index": part, "process_count": processes}
        source = Numbered(48)
        kept = training(source, cache_bytes=48 * 8 * 8 * 3, **share)
        assert_same(take(kept, 30), take(training(Numbered(48), **share), 30))
        # Threads may meet at an image, hence not exactly once.
        assert len(source.reads) < 48 * 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_memory_for_a_part_of_the_images_keeps_that_part(share):
    source, canvas_bytes = Numbered(48, damaged=(3, 40)), 8 * 8 * 3
    kept = training(source, cache_bytes=int(48 * share) * canvas_bytes, threads=1)
    assert_same(take(kept, 60), take(training(Numbered(48, damaged=(3, 40))), 60))
    kept.close()
    reads = Counter(source.reads)
    kept_reads = [reads[index] for index in range(int(48 * share))]
    assert max(kept_reads, default=0) <= 3  # once, in the sample, and for a damaged one before it
    assert all(reads[index] >= 4 for index in range(int(48 * share), 48))


def test_one_slow_read_does_not_make_storage_slow():
    class Waits(Numbered):
        def __getitem__(self, index):
            if index == 9 and not self.reads.count(index):
                time.sleep(1)
            return super().__getitem__(index)

    kept = what_to_keep(Waits(48), 8 * 8 * 3, lambda _: time.sleep(0.005), 24 * 8 * 8 * 3)
    assert kept == Kept(decoded=24)


@pytest.mark.exhaustive
def test_slow_storage_has_images_kept_as_they_are_stored():
    class Slow(Numbered):
        """Images of a tenth of the canvas, on storage slower than decoding."""

        def __getitem__(self, index):
            time.sleep(0.01)
            return super().__getitem__(index)

    source = Slow(48)
    settings = {"canvas": 64, "threads": 1}
    kept = training(source, cache_bytes=24 * 64 * 64 * 3, **settings)
    assert_same(take(kept, 60), take(training(Numbered(48), **settings), 60))
    kept.close()
    assert max(Counter(source.reads).values()) <= 2  # once, and in the sample


def test_batches_are_not_shared():
    """What a consumer does to one batch, while it holds it, no other batch sees."""
    iterator = training(Numbered(24), cache_bytes=10**6)
    for batch in take(iterator, 6):
        batch["image"][:] = 0
    assert all(batch["image"].any() for batch in take(iterator, 2))


def test_the_prefetch_is_bounded():
    source = Numbered(10_000)
    iterator = training(source, batch=100, threads=2)
    next(iterator)
    time.sleep(0.2)
    assert len(source.reads) <= 100 * 8
    iterator.close()


def test_closing_stops_the_threads():
    before = set(threading.enumerate())
    iterator = training(Numbered(1000), threads=5)
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(timeout=60)
        assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_steps_per_epoch():
    assert steps_per_epoch(50, 12) == 4
    assert steps_per_epoch(12, 12) == 1
    with pytest.raises(DataError, match=r"batch_size=51.*50 images"):
        steps_per_epoch(50, 51)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch": 51}, "batch_size=51"),
        ({"batch": 0}, "batch_size=0"),
        ({"process_count": 5}, "batch_size=12.*multiple of 5"),
        ({"process_count": 2, "process_index": 2}, "process_index=2"),
        ({"threads": -1}, "data.threads=-1"),
        ({"canvas": 0}, "data.canvas=0"),
    ],
)
def test_wrong_arguments(changed, said):
    with pytest.raises(DataError, match=said):
        training(Numbered(50), **changed)


def evaluation(source, **changed):
    usual = {"batch": 12, "canvas": 8, "threads": 2, "damaged": lenient(source)}
    return evaluation_batches(source, **{**usual, **changed})


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("length", [5, 48, 50])
def test_evaluation_sees_everything_once_in_order(chunk, count, length):
    source = Numbered(length)
    parts = [list(evaluation(source, process_index=p, process_count=count)) for p in range(count)]
    assert {len(part) for part in parts} == {-(-length // 12)}
    indices, masks = (
        np.concatenate([part[step][key] for step in range(len(parts[0])) for part in parts])
        for key in ("index", "mask")
    )
    assert indices[masks].tolist() == list(range(length))
    assert (indices[~masks] == -1).all()
    for part in parts:
        for batch in part:
            blank = ~batch["mask"]
            assert batch["image"].shape == (12 // count, 8, 8, 3)
            assert not batch["image"][blank].any()
            assert (batch["size"][blank] == 1).all()
            assert (batch["label"][blank] == -1).all()


def test_evaluation_leaves_damaged_images_out():
    source = Numbered(20, damaged=(3, 19))
    batches = list(evaluation(source))
    indices = np.concatenate([b["index"][b["mask"]] for b in batches])
    assert indices.tolist() == [i for i in range(20) if i not in (3, 19)]
    with pytest.raises(TooManyDamaged, match="file 3"):
        list(evaluation(source, damaged=DamagedLog(20, 0.05)))


def test_evaluation_limit_is_spread_over_the_classes():
    source = Numbered(1000)
    chosen, again = (
        np.concatenate([b["index"][b["mask"]] for b in evaluation(source, limit=200)])
        for _ in range(2)
    )
    np.testing.assert_array_equal(chosen, again)
    assert len(set(chosen.tolist())) == 200
    in_order_of_classes = np.bincount(chosen // 100, minlength=10)
    np.testing.assert_array_equal(in_order_of_classes, 20)
    interleaved = np.bincount(chosen % 10, minlength=10)
    assert interleaved.min() >= 8
    everything = [b["index"][b["mask"]] for b in evaluation(source, limit=5000)]
    assert len(np.concatenate(everything)) == 1000


def test_evaluation_can_be_continued():
    source = Numbered(50)
    iterator = evaluation(source)
    expected = list(evaluation(source))
    next(iterator)
    state = iterator.get_state()
    fresh = evaluation(source)
    fresh.set_state(state)
    assert_same(list(fresh), expected[1:])


def test_nothing_to_evaluate():
    with pytest.raises(DataError, match="no images"):
        evaluation(Numbered(0))
