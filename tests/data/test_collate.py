import pickle

import pytest
import torch

from hf_querydet.data import DetectionCollator
from hf_querydet.image_processing_utils import DetectionImageProcessor


def item(height, width, image_id=0):
    return {
        "pixel_values": torch.randn(3, height, width),
        "labels": {"image_id": torch.tensor([image_id]), "boxes": torch.rand(image_id, 4)},
    }


def test_pictures_are_padded_to_the_largest_of_the_batch(processor):
    items = [item(5, 9, 0), item(7, 4, 2), item(6, 6, 1)]

    batch = DetectionCollator(processor)(items)

    assert sorted(batch) == ["labels", "pixel_mask", "pixel_values"]
    assert batch["pixel_values"].shape == (3, 3, 7, 9)
    assert batch["pixel_mask"].dtype == torch.int64
    for number, each in enumerate(items):
        _, height, width = each["pixel_values"].shape
        inside = torch.zeros(7, 9, dtype=torch.bool)
        inside[:height, :width] = True
        assert torch.equal(batch["pixel_mask"][number].bool(), inside)
        picture = batch["pixel_values"][number]
        assert torch.equal(picture[:, :height, :width], each["pixel_values"])
        assert not picture[:, ~inside].any()
    assert batch["labels"] == [each["labels"] for each in items]


def test_pad_size_of_the_processor_is_honoured():
    processor = DetectionImageProcessor(pad_size={"height": 11, "width": 13})

    batch = DetectionCollator(processor)([item(5, 9), item(7, 4)])

    assert batch["pixel_values"].shape == (2, 3, 11, 13)
    assert batch["pixel_mask"].sum(dim=(1, 2)).tolist() == [45, 28]


def test_items_without_labels_make_a_batch_for_prediction(processor):
    batch = DetectionCollator(processor)([{"pixel_values": torch.zeros(3, 2, 3)}])

    assert sorted(batch) == ["pixel_mask", "pixel_values"]


def test_the_collator_can_be_pickled(processor):
    collator = pickle.loads(pickle.dumps(DetectionCollator(processor)))

    assert collator([item(2, 3), item(3, 2)])["pixel_values"].shape == (2, 3, 3, 3)


def test_items_that_never_met_the_processor_are_an_error(processor):
    with pytest.raises(ValueError, match=r"items must have pixel_values, got \['annotations'"):
        DetectionCollator(processor)([{"image": None, "annotations": {}}])
