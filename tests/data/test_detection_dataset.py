import itertools
import json
import pickle
import random
import re
import time

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from detection_data import OBJECTS, SIZES, write_coco, write_image_folder, write_picture
from PIL import Image
from torch.utils.data import DataLoader

from hf_querydet.data import (
    BadExampleError,
    DetectionAugmentation,
    DetectionCollator,
    IterableDetectionDataset,
    LabelTable,
    load_detection_dataset,
)
from hf_querydet.data.reading import RowReader
from hf_querydet.image_processing_utils import DetectionImageProcessor

NAMES = ["ant", "cat", "dog"]


def change_row(folder, number, **values):
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **values})
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def store_tiff(folder, values):
    """Put an array in place of the first picture."""
    Image.fromarray(values).save(folder / "0.tiff")
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("0.png", "0.tiff"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.fixture
def folder_with_bad_rows(image_folder):
    """Row 0 has a truncated picture, row 3 an impossible box; rows 1 and 2 are good."""
    truncate(image_folder / "0.png")
    change_row(image_folder, 3, objects={"bbox": [[1.0, 2.0, -3.0, 4.0]], "category": ["ant"]})
    return image_folder


def test_items_are_what_the_processor_makes_of_each_picture(image_folder, processor):
    dataset = load_detection_dataset(image_folder, split="train").with_processor(processor)

    item = dataset[0]

    # 61x43 (width x height) with the shorter side 32: int(32 * 61 / 43) = 45.
    assert item["pixel_values"].shape == (3, 32, 45)
    assert item["pixel_values"].dtype == torch.float32
    labels = item["labels"]
    assert labels["orig_size"].tolist() == [43, 61]
    assert labels["size"].tolist() == [32, 45]
    assert labels["image_id"].tolist() == [10]
    assert labels["class_labels"].tolist() == [1, 2]
    # bbox [5, 4, 20, 11] and [30, 20, 9, 15] as centre and size, relative to 61x43.
    expected = [[15 / 61, 9.5 / 43, 20 / 61, 11 / 43], [34.5 / 61, 27.5 / 43, 9 / 61, 15 / 43]]
    torch.testing.assert_close(labels["boxes"], torch.tensor(expected))


def test_a_picture_without_objects_gives_empty_labels(image_folder, processor):
    dataset = load_detection_dataset(image_folder, split="train").with_processor(processor)

    labels = dataset[1]["labels"]

    assert labels["boxes"].shape == (0, 4)
    assert labels["class_labels"].shape == (0,)


def test_labels_of_a_model_replace_those_of_the_dataset(image_folder, processor):
    dataset = load_detection_dataset(image_folder, split="train").with_processor(processor)

    renumbered = dataset.with_labels({0: "N/A", 1: "dog", 2: "cat", 3: "N/A", 4: "ant"})

    assert renumbered[0]["labels"]["class_labels"].tolist() == [2, 1]
    assert dataset[0]["labels"]["class_labels"].tolist() == [1, 2]
    assert renumbered.label_to_category == {1: "dog", 2: "cat", 4: "ant"}


def test_select_keeps_the_number_of_each_row(image_folder):
    dataset = load_detection_dataset(image_folder, split="train").select([2, 0])

    assert [item["annotations"]["image_id"] for item in dataset] == [16, 10]


def test_workers_give_the_same_batches(image_folder, processor):
    dataset = load_detection_dataset(image_folder, split="train").with_processor(processor)
    options = {"batch_size": 3, "collate_fn": DetectionCollator(processor)}

    alone = list(DataLoader(dataset, **options))
    workers = DataLoader(dataset, num_workers=2, **options)

    for batch, expected in zip(workers, alone, strict=True):
        torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"])
        for labels, expected_labels in zip(batch["labels"], expected["labels"], strict=True):
            torch.testing.assert_close(labels, expected_labels)


def test_augmentation_follows_the_seed_also_in_workers(image_folder, processor):
    dataset = load_detection_dataset(image_folder, split="train").with_processor(
        processor, DetectionAugmentation(processor)
    )

    def epoch(seed, num_workers):
        loader = DataLoader(
            dataset,
            num_workers=num_workers,
            collate_fn=DetectionCollator(processor),
            generator=torch.Generator().manual_seed(seed),
        )
        torch.manual_seed(seed)
        return [batch["pixel_values"] for batch in loader]

    for num_workers in (0, 2):
        first, again = epoch(5, num_workers), epoch(5, num_workers)
        other = epoch(6, num_workers)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True)
        )


def test_seeded_transforms_depend_on_seed_epoch_and_row_alone(image_folder, processor):
    plain = load_detection_dataset(image_folder, split="train")
    record = []

    def drawing(picture, target):
        numbers = random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002
        record.append(numbers)
        return picture, target

    def drawn(index, seed=5, epoch=0):
        dataset = plain.with_processor(processor, drawing, seed=seed)
        dataset.set_epoch(epoch)
        dataset[index]
        return record[-1]

    first = drawn(2)
    before = random.getstate(), torch.get_rng_state()
    drawn(0)
    assert drawn(2) == first
    # The states of the process are as if nothing had been drawn.
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    others = {first, drawn(0), drawn(2, seed=6), drawn(2, epoch=1)}
    assert all(len({numbers[i] for numbers in others}) == 4 for i in range(3))


def test_sample_is_drawn_by_its_seed(image_folder):
    dataset = load_detection_dataset(image_folder, split="train")

    def ids(count, seed):
        sample = dataset.sample(count, seed=seed)
        return [item["annotations"]["image_id"] for item in sample]

    assert ids(2, seed=1) == ids(2, seed=1)
    assert len({tuple(ids(2, seed)) for seed in range(60)}) == 6  # all pairs of four
    assert ids(9, seed=0) == [10, 13, 16, 19]


def test_a_part_that_is_held_out_is_drawn_by_its_seed(image_folder):
    dataset = load_detection_dataset(image_folder, split="train")

    def ids(seed):
        return [
            [item["annotations"]["image_id"] for item in part]
            for part in dataset.hold_out(0.26, seed=seed)
        ]

    assert [len(part) for part in ids(0)] == [3, 1]
    assert ids(1) == ids(1)
    assert {held_out for seed in range(60) for held_out in ids(seed)[1]} == {10, 13, 16, 19}
    for seed in range(5):
        rest, held_out = ids(seed)
        assert rest == sorted(rest)
        assert sorted(rest + held_out) == [10, 13, 16, 19]


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 0), (0.9, 4)])
def test_no_part_that_is_held_out_or_left_is_empty(image_folder, fraction, count):
    dataset = load_detection_dataset(image_folder, split="train")
    with pytest.raises(ValueError, match=f"fraction {fraction} of 4 pictures is {count} of them"):
        dataset.hold_out(fraction, seed=0)


@pytest.mark.parametrize(("mode", "num_channels"), [("RGBA", 4), ("L", 1)])
def test_transforms_get_the_channels_that_the_processor_keeps(tmp_path, mode, num_channels):
    folder = write_image_folder(tmp_path / "pets", OBJECTS[:1])
    Image.open(folder / "0.png").convert(mode).save(folder / "0.png")
    processor = DetectionImageProcessor(do_convert_rgb=False, do_normalize=False)
    dataset = load_detection_dataset(folder, split="train")
    seen = []

    item = dataset.with_processor(processor, lambda *both: seen.append(both[0]) or both)[0]

    assert (seen[0].shape, seen[0].dtype) == ((num_channels, 43, 61), torch.uint8)
    assert len(item["pixel_values"]) == num_channels


@pytest.mark.parametrize("value", [70000, -1, float("nan")])
@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_on_no_scale_are_a_bad_picture(tmp_path, processor, value, streaming):
    folder = write_image_folder(tmp_path / "pets")
    dtype = np.float32 if value != value else np.int32
    store_tiff(folder, np.full((43, 61), value, dtype))
    options = {"split": "train", "streaming": streaming, "label_names": NAMES}

    dataset = load_detection_dataset(folder, skip_bad_images=True, **options)
    items = list(dataset.with_processor(processor))

    assert [item["labels"]["image_id"].item() for item in items] == [13, 16, 19]
    (message,) = dataset.skipped
    assert "0.tiff): " in message
    assert "pictures must hold values from 0 to" in message
    dataset = load_detection_dataset(folder, **options).with_processor(processor)
    with pytest.raises(BadExampleError, match=r"row 0 \(image_id 10, file .*0\.tiff\)"):
        next(iter(dataset))


def test_floats_on_their_own_scale_are_no_bad_picture(tmp_path):
    folder = write_image_folder(tmp_path / "pets", OBJECTS[:1])
    values = np.linspace(-2, 2, 43 * 61, dtype=np.float32).reshape(43, 61)
    store_tiff(folder, values)
    processor = DetectionImageProcessor(do_rescale=False, do_normalize=False, do_resize=False)

    item = load_detection_dataset(folder, split="train").with_processor(processor)[0]

    assert torch.equal(item["pixel_values"], torch.from_numpy(values).expand(3, -1, -1))


def test_transforms_get_floats_of_a_file_as_whole_numbers(tmp_path, processor):
    folder = write_image_folder(tmp_path / "pets", OBJECTS[:1])
    values = torch.linspace(0, 200, 43 * 61).reshape(43, 61)
    store_tiff(folder, values.numpy())
    dataset = load_detection_dataset(folder, split="train")
    seen = []

    dataset.with_processor(processor, lambda *both: seen.append(both[0]) or both)[0]

    assert seen[0].dtype == torch.uint8
    assert (seen[0] - values).abs().max() <= 0.5


def test_the_processor_does_not_resize_what_transforms_have_resized(image_folder, processor):
    plain = load_detection_dataset(image_folder, split="train")

    def doubled(picture, target):
        return torch.nn.functional.pad(picture, (0, 7, 0, 5)), target

    assert plain.with_processor(processor, doubled)[0]["pixel_values"].shape[1] == 32
    doubled.resizes = True
    assert plain.with_processor(processor, doubled)[0]["pixel_values"].shape == (3, 48, 68)
    again = plain.with_processor(processor, doubled, do_resize=True)
    assert again[0]["pixel_values"].shape[1] == 32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: truncate(folder / "2.png"), "the picture cannot be read: OSError"),
        (lambda folder: (folder / "2.png").write_text("text"), "the picture cannot be read"),
        (
            lambda folder: change_row(
                folder, 2, objects={"bbox": [[1.0, 2.0, 3.0]], "category": ["dog"]}
            ),
            "bbox",
        ),
        (
            lambda folder: change_row(
                folder, 2, objects={"bbox": [[1.0, 2.0, 3.0, -4.0]], "category": ["dog"]}
            ),
            "bbox",
        ),
        (
            lambda folder: change_row(
                folder, 2, objects={"bbox": [[76.0, 2.0, 3.0, 4.0]], "category": ["dog"]}
            ),
            "bbox",
        ),
        (
            lambda folder: change_row(
                folder, 2, objects={"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": []}
            ),
            "1 values of bbox but 0 of category",
        ),
    ],
    ids=["truncated", "no-picture", "short", "negative", "outside", "counts"],
)
def test_a_row_that_cannot_be_used_is_named(image_folder, processor, damage, message):
    table = load_detection_dataset(image_folder, split="train").label_table
    damage(image_folder)
    dataset = load_detection_dataset(image_folder, split="train", label_table=table)
    dataset = dataset.with_processor(processor)

    with pytest.raises(BadExampleError, match=rf"row 2 \(image_id 16, file .*2\.png\).*{message}"):
        dataset[2]
    assert dataset[1]["labels"]["image_id"] == 13


def test_a_category_that_the_table_lacks_is_named_when_the_data_are_loaded(image_folder):
    table = load_detection_dataset(image_folder, split="train").label_table
    objects = {"bbox": [[1.0, 2.0, 3.0, 4.0]] * 2, "category": ["dog", "owl"]}
    change_row(image_folder, 2, objects=objects)

    with pytest.raises(BadExampleError, match=r"row 2 \(image_id 16, .*'owl' is not among"):
        load_detection_dataset(image_folder, split="train", label_table=table)
    dataset = load_detection_dataset(
        image_folder, split="train", label_table=table, skip_bad_images=True
    )
    assert len(dataset) == 3


def test_lists_of_unlike_length_are_named(image_folder):
    objects = {"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": ["dog"], "area": [1.0, 2.0]}
    write_image_folder(image_folder, [objects])

    with pytest.raises(BadExampleError, match=r"row 0 .* 1 values of bbox but 2 of area"):
        load_detection_dataset(image_folder, split="train")[0]


def test_a_picture_that_disappeared_is_named(image_folder):
    dataset = load_detection_dataset(image_folder, split="train")
    (image_folder / "1.png").unlink()

    with pytest.raises(BadExampleError, match=r"row 1 \(image_id 13, .*FileNotFoundError"):
        dataset[1]


def test_the_message_comes_out_of_a_worker(folder_with_bad_rows, processor):
    dataset = load_detection_dataset(folder_with_bad_rows, split="train").with_processor(processor)
    loader = DataLoader(dataset, num_workers=2, collate_fn=DetectionCollator(processor))
    batches = iter(loader)

    with pytest.raises(BadExampleError, match=r"row 0 \(image_id 10, file .*0\.png\)"):
        next(batches)
    # Read to the end: torch waits ten seconds for workers that are left in the middle.
    assert [int(next(batches)["labels"][0]["image_id"]) for _ in range(2)] == [13, 16]
    with pytest.raises(BadExampleError, match="row 3"):
        next(batches)
    assert next(batches, None) is None


def test_what_fails_after_reading_says_at_which_row(image_folder, processor):
    def failing(picture, target):
        raise RuntimeError("no luck")

    dataset = load_detection_dataset(image_folder, split="train")

    with pytest.raises(RuntimeError, match="no luck") as caught:
        dataset.with_processor(processor, failing)[3]
    assert "row 3 (image_id 19" in caught.value.__notes__[0]


def test_bad_rows_are_left_out_counted_and_listed(folder_with_bad_rows, processor):
    dataset = load_detection_dataset(folder_with_bad_rows, split="train", skip_bad_images=True)

    assert len(dataset) == 2
    assert [message.split(",")[0] for message in dataset.skipped] == [
        "row 0 (image_id 10",
        "row 3 (image_id 19",
    ]
    loader = DataLoader(
        dataset.with_processor(processor), num_workers=2, collate_fn=DetectionCollator(processor)
    )
    assert [int(batch["labels"][0]["image_id"]) for batch in loader] == [13, 16]


def test_a_dataset_without_a_good_row_is_an_error(folder_with_bad_rows):
    dataset = load_detection_dataset(folder_with_bad_rows, split="train").select([0, 3])

    with pytest.raises(BadExampleError, match=r"None of the 2 rows can be used; .* row 0"):
        dataset.without_bad_images()


def stream_that_skips(folder):
    options = {"streaming": True, "label_names": NAMES, "skip_bad_images": True}
    return load_detection_dataset(folder, split="train", **options)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_lists_the_rows_it_left_out_whichever_worker_did(
    folder_with_bad_rows, processor, num_workers
):
    stream = stream_that_skips(folder_with_bad_rows).with_processor(processor)
    loader = DataLoader(
        stream,
        batch_size=2,
        num_workers=num_workers,
        collate_fn=DetectionCollator(processor),
    )

    batches = list(loader)

    assert [len(batch["labels"]) for batch in batches] == [2]
    assert [message.split(",")[0] for message in stream.skipped] == [
        "row 0 (image_id 10",
        "row 3 (image_id 19",
    ]


def test_a_picture_that_a_stream_leaves_out_in_every_epoch_is_listed_once(folder_with_bad_rows):
    stream = stream_that_skips(folder_with_bad_rows).shuffle(seed=0)
    places = set()
    for epoch in range(4):
        stream.set_epoch(epoch)
        list(stream)
        places.add(tuple(stream.skipped))

    assert len(places) == 1
    assert sorted(message.split("(")[1].split(",")[0] for message in stream.skipped) == [
        "image_id 10",
        "image_id 19",
    ]


def test_a_stream_raises_if_it_may_not_skip(folder_with_bad_rows):
    stream = load_detection_dataset(
        folder_with_bad_rows, split="train", streaming=True, label_names=NAMES
    )

    with pytest.raises(BadExampleError, match="row 0"):
        list(stream)


@pytest.fixture
def stream_without_ids(tmp_path):
    """Seven rows in two shards, no image ids."""
    rows = []
    for number in range(7):
        write_picture(tmp_path / f"{number}.png", (20 + number, 30), seed=number)
        image = {"path": str(tmp_path / f"{number}.png"), "bytes": None}
        objects = {"bbox": [[1.0, 1.0, 5.0, 6.0]], "category": [0]}
        rows.append({"image": image, "objects": objects})
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    table = LabelTable({0: "thing"}, {0: 0})
    return IterableDetectionDataset(stream, RowReader(table, "category", has_image_ids=False))


def test_workers_share_a_stream_without_repeating_rows_or_ids(stream_without_ids):
    items = list(DataLoader(stream_without_ids, num_workers=2, batch_size=None))

    assert sorted(item["image"].width for item in items) == list(range(20, 27))
    ids = [item["annotations"]["image_id"] for item in items]
    assert len(set(ids)) == 7


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_deferred_stream_is_prepared_in_the_share_of_each_process(
    stream_without_ids, processor, num_workers, tmp_path
):
    def note(picture, target):
        with (tmp_path / "prepared").open("a") as file:
            file.write(f"{picture.shape[-1]} ")
        return picture, target

    def run(dataset, process_index):
        (tmp_path / "prepared").write_text("")
        shard = IterableDatasetShard(
            dataset, batch_size=2, num_processes=2, process_index=process_index, drop_last=True
        )
        collator = DetectionCollator(processor)
        batches = list(DataLoader(shard, 2, num_workers=num_workers, collate_fn=collator))
        return batches, sorted((tmp_path / "prepared").read_text().split())

    stream = stream_without_ids.with_processor(processor, note)
    for process_index in range(2):
        expected, all_widths = run(stream, process_index)
        batches, widths = run(stream.deferred(), process_index)
        assert batches
        assert len(widths) == sum(len(batch["labels"]) for batch in batches) < len(all_widths)
        for batch, other in zip(batches, expected, strict=True):
            assert torch.equal(batch["pixel_values"], other["pixel_values"])


def test_a_stream_that_skips_cannot_be_deferred(folder_with_bad_rows):
    stream = stream_that_skips(folder_with_bad_rows)
    with pytest.raises(ValueError, match="deferred and skip_bad_images=True exclude each other"):
        stream.deferred()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_share_the_batches_of_a_stream(stream_without_ids, num_workers):
    def batches(dataset):
        options = {"num_workers": num_workers, "batch_size": 2, "collate_fn": list}
        return [
            [(item["image"].width, item["annotations"]["image_id"]) for item in batch]
            for batch in DataLoader(dataset, **options)
        ]

    alone = batches(stream_without_ids)
    shares = [
        batches(stream_without_ids.split_by_process(rank, 3, batch_size=2)) for rank in range(3)
    ]

    assert sorted(itertools.chain.from_iterable(shares)) == sorted(alone)


def test_processes_share_the_batches_of_a_dataset(image_folder):
    dataset = load_detection_dataset(image_folder, split="train")

    shares = [dataset.split_by_process(rank, 2, batch_size=1) for rank in range(2)]
    pairs = [dataset.split_by_process(rank, 2, batch_size=3) for rank in range(2)]

    assert [[item["image"].size for item in share] for share in shares] == [SIZES[::2], SIZES[1::2]]
    assert [[item["image"].size for item in share] for share in pairs] == [SIZES[:3], SIZES[3:]]


def test_own_id_of_a_picture_is_what_its_column_says(tmp_path):
    folder = write_image_folder(tmp_path / "pictures")
    numbered = load_detection_dataset(folder, split="train")
    assert numbered.own_image_id(13) == 13

    file = folder / "metadata.jsonl"
    text = file.read_text()
    file.write_text(re.sub(r'"image_id": (\d+)', r'"image_id": "no \1"', text))
    named = load_detection_dataset(folder, split="train")
    assert named[1]["annotations"]["image_id"] == 1
    assert named.own_image_id(1) == "no 13"

    file.write_text(re.sub(r'"image_id": \d+, ', "", text))
    assert load_detection_dataset(folder, split="train").own_image_id(2) == 2


def test_a_shuffled_stream_has_a_new_order_each_epoch(stream_without_ids):
    stream = stream_without_ids.shuffle(seed=3, buffer_size=7)

    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([item["image"].width for item in stream])

    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(20, 27))
    assert [item["image"].width for item in stream_without_ids.take(2)] == [20, 21]
    assert [item["image"].width for item in stream_without_ids.sample(2, seed=0)] == [20, 21]


def test_datasets_survive_pickling(image_folder, processor):
    dataset = load_detection_dataset(image_folder, split="train").with_processor(
        processor, DetectionAugmentation(processor)
    )

    copy = pickle.loads(pickle.dumps(dataset))

    torch.manual_seed(1)
    expected = dataset[2]["pixel_values"]
    torch.manual_seed(1)
    assert torch.equal(copy[2]["pixel_values"], expected)


def turn_by_exif(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to see it upright"
    with Image.open(path) as image:
        image.copy().save(path, exif=exif)


def test_rotated_photos_are_read_upright(tmp_path):
    folder = write_image_folder(tmp_path / "photos", OBJECTS[:1])
    turn_by_exif(folder / "0.png")

    image = load_detection_dataset(folder, split="train")[0]["image"]

    assert image.size == SIZES[0][::-1]


def rotated_coco(folder, size):
    """A COCO json that states this size of its one photo, stored 61x43, upright 43x61."""
    objects = [[{"bbox": [1.0, 2.0, 20.0, 11.0], "category_id": 0}]]
    json_file = write_coco(folder / "a.json", folder, [{"id": 0, "name": "cat"}], objects)
    content = json.loads(json_file.read_text())
    content["images"][0].update(zip(("width", "height"), size, strict=True))
    json_file.write_text(json.dumps(content))
    turn_by_exif(folder / content["images"][0]["file_name"])
    return json_file


def test_boxes_of_a_picture_before_it_was_turned_are_refused(tmp_path):
    json_file = rotated_coco(tmp_path, (61, 43))

    message = r"say 61x43, but by its EXIF orientation the picture is 43x61.*exiftool"
    with pytest.raises(BadExampleError, match=message):
        load_detection_dataset(json_file, split="train")[0]


def test_boxes_of_a_picture_of_another_size_are_refused(tmp_path):
    json_file = rotated_coco(tmp_path, (86, 122))

    message = r"width and height say 86x122, but the picture is 43x61; bring the boxes"
    with pytest.raises(BadExampleError, match=message):
        load_detection_dataset(json_file, split="train")[0]


@pytest.mark.parametrize("size", [(43, 61), (None, None), (0, 0)], ids=["right", "none", "zero"])
def test_boxes_of_the_upright_picture_are_read(tmp_path, size):
    json_file = rotated_coco(tmp_path, size)

    assert load_detection_dataset(json_file, split="train")[0]["image"].size == (43, 61)


def test_columns_width_and_height_may_say_something_else_unless_exif_turns_the_picture(tmp_path):
    folder = write_image_folder(tmp_path / "photos", OBJECTS[:1])
    change_row(folder, 0, width=122, height=86)  # as if pictures had been shrunk afterwards
    assert load_detection_dataset(folder, split="train")[0]["image"].size == (61, 43)

    change_row(folder, 0, width=61, height=43)
    turn_by_exif(folder / "0.png")
    with pytest.raises(BadExampleError, match=r"by its EXIF orientation the picture is 43x61"):
        load_detection_dataset(folder, split="train")[0]


def test_a_photo_with_broken_exif_data_is_read(tmp_path):
    folder = write_image_folder(tmp_path / "photos", OBJECTS[:1])
    with Image.open(folder / "0.png") as image:
        image.copy().save(folder / "0.png", exif=b"Exif\0\0XX*\0garbage")

    image = load_detection_dataset(folder, split="train")[0]["image"]

    assert image.size == SIZES[0]


def test_ten_thousand_objects_are_read_in_a_moment(tmp_path, processor):
    objects = {"bbox": [[1.0, 2.0, 5.0, 6.0]] * 10_000, "category": ["ant"] * 10_000}
    folder = write_image_folder(tmp_path / "crowd", [objects])
    dataset = load_detection_dataset(folder, split="train").with_processor(
        processor, DetectionAugmentation(processor)
    )

    start = time.perf_counter()
    item = dataset[0]

    assert time.perf_counter() - start < 5  # takes a tenth of a second; a loop of tensors, minutes
    assert item["labels"]["boxes"].shape[1] == 4
