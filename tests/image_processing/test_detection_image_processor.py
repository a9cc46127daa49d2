from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import BatchFeature, DetrImageProcessor

from hf_querydet.image_processing_utils import DetectionImageProcessor
from hf_querydet.ops.score_decoding import decode_softmax_scores

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
# Sizes that resizing leaves alone keep expectations exact.
AS_IS = {"do_resize": False}
TINY = {"shortest_edge": 20, "longest_edge": 33}


class SoftmaxImageProcessor(DetectionImageProcessor):
    def decode_predictions(self, logits, top_k):
        return decode_softmax_scores(logits, top_k)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photograph(height, width, seed=0):
    """Random colours with soft edges, as pictures have."""
    small = PIL.Image.fromarray(noise(max(2, height // 8), max(2, width // 8), seed))
    return np.array(small.resize((width, height), PIL.Image.Resampling.BICUBIC))


def normalised(array):
    """The definition: colours between 0 and 1, minus mean, by deviation."""
    return (torch.from_numpy(array).permute(2, 0, 1) / 255 - MEAN) / STD


def box(*bbox, category_id=0, **others):
    return {"bbox": list(bbox), "category_id": category_id, **others}


def annotation_set(*annotations, image_id=0):
    return {"image_id": image_id, "annotations": list(annotations)}


# Values ---------------------------------------------------------------------------------------


def test_values_are_normalised_colours():
    array = noise(5, 7)
    inputs = DetectionImageProcessor(**AS_IS)(array, return_tensors="pt")

    # Folding two steps into one moves the last bits of numbers of size 1.
    torch.testing.assert_close(inputs["pixel_values"][0], normalised(array), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (100 / 255 - 0.5) / 0.25),
        ({"do_rescale": False}, (100 - 0.5) / 0.25),
        ({"do_normalize": False}, 100 / 255),
        ({"do_rescale": False, "do_normalize": False}, 100.0),
        ({"rescale_factor": 1 / 100}, (1 - 0.5) / 0.25),
    ],
)
def test_each_step_can_be_left_out(arguments, expected):
    processor = DetectionImageProcessor(image_mean=[0.5] * 3, image_std=0.25, **AS_IS)
    picture = np.full((5, 7, 3), 100, dtype=np.uint8)

    values = processor(picture, return_tensors="pt", **arguments)["pixel_values"]

    torch.testing.assert_close(values, torch.full((1, 3, 5, 7), expected))


def test_floats_between_0_and_1_equal_bytes():
    array = noise(5, 7)
    processor = DetectionImageProcessor(**AS_IS)

    from_floats = processor(array / 255, return_tensors="pt")["pixel_values"]

    torch.testing.assert_close(from_floats[0], normalised(array), atol=1e-6, rtol=0)


def test_prepared_floats_pass_through():
    picture = torch.randn(3, 5, 7)
    processor = DetectionImageProcessor(do_rescale=False, do_normalize=False, **AS_IS)

    torch.testing.assert_close(processor(picture, return_tensors="pt")["pixel_values"][0], picture)


@pytest.mark.parametrize(("height", "width"), [(31, 47), (90, 61), (24, 24)])
def test_resized_values_are_pils(height, width):
    array = noise(height, width)
    processor = DetectionImageProcessor(size=TINY, do_rescale=False, do_normalize=False)
    values = processor(array, return_tensors="pt")["pixel_values"][0]
    new_height, new_width = values.shape[1:]

    pil = PIL.Image.fromarray(array).resize((new_width, new_height), PIL.Image.Resampling.BILINEAR)

    # Both work on bytes; their rounding differs by at most one grey level.
    difference = values - torch.from_numpy(np.array(pil)).permute(2, 0, 1)
    assert difference.abs().max() <= 1


def test_resample_is_honoured():
    array = noise(4, 4)
    processor = DetectionImageProcessor(
        size={"height": 8, "width": 8}, resample=0, do_rescale=False, do_normalize=False
    )
    values = processor(array, return_tensors="pt")["pixel_values"][0]

    nearest = np.repeat(np.repeat(array, 2, axis=0), 2, axis=1)
    assert values.permute(1, 2, 0).tolist() == nearest.tolist()


@pytest.mark.parametrize(("height", "width"), [(480, 640), (333, 500), (640, 360)])
def test_single_picture_equals_transformers(height, width):
    array = photograph(height, width)
    arguments = {"size": {"shortest_edge": 96, "longest_edge": 160}, "return_tensors": "pt"}
    ours = DetectionImageProcessor()(PIL.Image.fromarray(array), **arguments)
    theirs = DetrImageProcessor()(PIL.Image.fromarray(array), **arguments)

    # One grey level is 1 / 255 / 0.224 = 0.018.
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=0.018, rtol=0)
    assert torch.equal(ours["pixel_mask"], theirs["pixel_mask"])


def test_single_labels_equal_transformers():
    array = photograph(480, 640)
    annotations = annotation_set(
        box(10.5, 20.25, 100, 200, category_id=5, area=1234.5, iscrowd=0),
        box(600, 400, 100, 100, category_id=2, area=3200, iscrowd=0),
        box(1, 2, 30, 40, category_id=3, area=1200, iscrowd=1),
        image_id=39,
    )
    arguments = {"annotations": annotations, "size": TINY, "return_tensors": "pt"}
    (ours,) = DetectionImageProcessor()(array, **arguments)["labels"]
    (theirs,) = DetrImageProcessor()(array, **arguments)["labels"]

    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1), (2, 3)])
def test_odd_pictures_are_resized(height, width):
    values = DetectionImageProcessor(size=TINY)(
        np.full((height, width, 3), 100, dtype=np.uint8), return_tensors="pt"
    )["pixel_values"]

    expected = ((100 / 255 - MEAN) / STD).expand(values.shape[1:])
    torch.testing.assert_close(values[0], expected)


def test_integer_size_of_a_call_is_the_short_side():
    values = DetectionImageProcessor()(noise(10, 30), size=20, return_tensors="pt")["pixel_values"]

    assert values.shape == (1, 3, 20, 60)


def test_output_types():
    inputs = DetectionImageProcessor(**AS_IS)(noise(5, 7), return_tensors="pt")

    assert (inputs["pixel_values"].dtype, inputs["pixel_mask"].dtype) == (
        torch.float32,
        torch.int64,
    )


def test_grey_channel_can_stay_alone():
    processor = DetectionImageProcessor(
        do_convert_rgb=False, image_mean=0.5, image_std=0.25, **AS_IS
    )
    values = processor(np.full((5, 7), 100, np.uint8), return_tensors="pt")["pixel_values"]

    torch.testing.assert_close(values, torch.full((1, 1, 5, 7), (100 / 255 - 0.5) / 0.25))


# Batches --------------------------------------------------------------------------------------


def test_pictures_lie_top_left_on_zeros():
    arrays = [noise(5, 7), noise(6, 4, seed=1)]
    values = DetectionImageProcessor(**AS_IS)(arrays, return_tensors="pt")["pixel_values"]

    expected = torch.zeros(2, 3, 6, 7)
    expected[0, :, :5, :7] = normalised(arrays[0])
    expected[1, :, :6, :4] = normalised(arrays[1])
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)
    assert (values[0, :, 5:] == 0).all()
    assert (values[1, :, :, 4:] == 0).all()


def test_mask_is_one_on_the_picture():
    inputs = DetectionImageProcessor(**AS_IS)([noise(1, 3), noise(2, 2)], return_tensors="pt")

    assert inputs["pixel_mask"].tolist() == [[[1, 1, 1], [0, 0, 0]], [[1, 1, 0], [1, 1, 0]]]


def test_pad_size_replaces_the_largest_picture():
    processor = DetectionImageProcessor(pad_size={"height": 9, "width": 11}, **AS_IS)
    inputs = processor(noise(5, 7), return_tensors="pt")

    assert inputs["pixel_values"].shape == (1, 3, 9, 11)
    assert inputs["pixel_mask"].sum() == 5 * 7


def test_unlike_pictures_can_be_stacked_after_pad_size():
    processor = DetectionImageProcessor(size=TINY, pad_size={"height": 20, "width": 33})
    shapes = {
        processor(noise(*size), return_tensors="pt")["pixel_values"].shape
        for size in [(30, 40), (40, 30), (7, 90), (90, 7)]
    }

    assert shapes == {(1, 3, 20, 33)}


def test_picture_larger_than_pad_size_is_an_error():
    processor = DetectionImageProcessor(pad_size={"height": 5, "width": 6}, **AS_IS)

    with pytest.raises(
        ValueError, match=r"Picture 1 has size \(4, 7\).*pad_size \(5, 6\).*enlarge"
    ):
        processor([noise(5, 6), noise(4, 7)], return_tensors="pt")


@pytest.mark.parametrize("disable_grouping", [False, True, None])
def test_batch_equals_its_single_pictures(disable_grouping):
    sizes = [(31, 47), (90, 61), (31, 47), (24, 24), (31, 47)]
    arrays = [noise(*size, seed=seed) for seed, size in enumerate(sizes)]
    processor = DetectionImageProcessor(size=TINY)
    batch = processor(arrays, return_tensors="pt", disable_grouping=disable_grouping)

    for array, values, mask in zip(arrays, batch["pixel_values"], batch["pixel_mask"], strict=True):
        single = processor(array, return_tensors="pt")["pixel_values"][0]
        height, width = single.shape[1:]
        assert torch.equal(values[:, :height, :width], single)
        assert mask.sum() == height * width


def test_pictures_of_one_shape_are_resized_together(monkeypatch):
    shapes = []
    resize = DetectionImageProcessor.resize
    monkeypatch.setattr(
        DetectionImageProcessor,
        "resize",
        lambda self, image, *rest: shapes.append(tuple(image.shape)) or resize(self, image, *rest),
    )
    arrays = [noise(31, 47), noise(90, 61), noise(31, 47)]

    DetectionImageProcessor(size=TINY)(arrays)

    assert shapes == [(2, 3, 31, 47), (1, 3, 90, 61)]


def test_bytes_and_floats_of_one_shape_do_not_mix():
    array = noise(31, 47)
    processor = DetectionImageProcessor(size=TINY)
    batch = processor([array, array / 255], return_tensors="pt")["pixel_values"]

    for values, picture in zip(batch, [array, array / 255], strict=True):
        assert torch.equal(values, processor(picture, return_tensors="pt")["pixel_values"][0])


def test_device_is_honoured():
    inputs = DetectionImageProcessor(size=TINY)(
        torch.zeros(3, 31, 47, dtype=torch.uint8),
        annotations=annotation_set(box(1, 2, 3, 4)),
        device="meta",
        return_tensors="pt",
    )

    tensors = [inputs["pixel_values"], inputs["pixel_mask"], *inputs["labels"][0].values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.cuda
def test_cuda_equals_cpu():
    arrays = [noise(31, 47), noise(90, 61), noise(31, 47, seed=1)]
    processor = DetectionImageProcessor(size=TINY)
    on_cpu = processor(arrays, return_tensors="pt")
    on_gpu = processor(arrays, return_tensors="pt", device="cuda")

    # One grey level: the GPU resizes in floats and rounds.
    torch.testing.assert_close(
        on_gpu["pixel_values"].cpu(), on_cpu["pixel_values"], atol=0.018, rtol=0
    )
    assert torch.equal(on_gpu["pixel_mask"].cpu(), on_cpu["pixel_mask"])


def test_without_padding_equal_pictures_are_stacked():
    processor = DetectionImageProcessor(do_pad=False, **AS_IS)
    inputs = processor([noise(5, 7), noise(5, 7)], return_tensors="pt")

    assert list(inputs) == ["pixel_values"]
    assert inputs["pixel_values"].shape == (2, 3, 5, 7)


def test_without_padding_unlike_pictures_cannot_be_stacked():
    processor = DetectionImageProcessor(do_pad=False, **AS_IS)

    with pytest.raises(ValueError, match=r"sizes \[\(5, 7\), \(6, 4\)\].*set do_pad=True"):
        processor([noise(5, 7), noise(6, 4)], return_tensors="pt")


def test_without_padding_and_tensors_pictures_stay_a_list():
    processor = DetectionImageProcessor(do_pad=False, **AS_IS)
    values = processor([noise(5, 7), noise(6, 4)])["pixel_values"]

    assert [tuple(picture.shape) for picture in values] == [(3, 5, 7), (3, 6, 4)]


def test_numpy_can_be_asked_for():
    inputs = DetectionImageProcessor(**AS_IS)(
        noise(5, 7), annotations=annotation_set(box(1, 2, 3, 3)), return_tensors="np"
    )

    arrays = [inputs["pixel_values"], inputs["pixel_mask"], *inputs["labels"][0].values()]
    assert {type(array) for array in arrays} == {np.ndarray}


# Padding afterwards ---------------------------------------------------------------------------


@pytest.mark.parametrize("pad_size", [None, {"height": 40, "width": 41}])
def test_padding_afterwards_equals_processing_together(pad_size):
    arrays = [noise(31, 47), noise(90, 61), noise(24, 24)]
    processor = DetectionImageProcessor(size=TINY, pad_size=pad_size)
    together = processor(arrays, return_tensors="pt")
    one_by_one = [processor(array, do_pad=False)["pixel_values"][0] for array in arrays]

    batch = processor.pad_batch(one_by_one)

    assert torch.equal(batch["pixel_values"], together["pixel_values"])
    assert torch.equal(batch["pixel_mask"], together["pixel_mask"])


def test_pad_size_of_the_call_wins():
    processor = DetectionImageProcessor(pad_size={"height": 40, "width": 41})

    batch = processor.pad_batch([torch.ones(3, 5, 7)], pad_size={"height": 6, "width": 9})

    assert batch["pixel_values"].shape == (1, 3, 6, 9)


def test_padding_keeps_the_type():
    batch = DetectionImageProcessor().pad_batch([torch.ones(3, 5, 7, dtype=torch.bfloat16)])

    assert batch["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("pictures", "error", "message"),
    [
        ([], ValueError, "pixel_values is empty"),
        ([np.zeros((3, 5, 7))], TypeError, "must be torch tensors, got ndarray"),
        ([torch.zeros(1, 3, 5, 7)], ValueError, r"got \(1, 3, 5, 7\); index the batch first"),
        ([torch.zeros(3, 5, 7), torch.zeros(1, 5, 7)], ValueError, r"channels, got \[1, 3\]"),
        ([torch.zeros(3, 50, 7)], ValueError, r"Picture 0 has size \(50, 7\)"),
    ],
)
def test_what_cannot_be_padded_is_an_error(pictures, error, message):
    with pytest.raises(error, match=message):
        DetectionImageProcessor().pad_batch(pictures, pad_size={"height": 9, "width": 9})


# Labels in batches ----------------------------------------------------------------------------


def test_batches_have_the_layout_that_convolutions_want():
    processor = DetectionImageProcessor(size=TINY)
    pictures = [photograph(30, 40), photograph(50, 31)]
    singles = processor(pictures, do_pad=False)["pixel_values"]

    for batch in (processor(pictures, return_tensors="pt"), processor.pad_batch(singles)):
        assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)


def test_boxes_do_not_depend_on_the_batch():
    annotations = annotation_set(box(50, 25, 100, 50))
    processor = DetectionImageProcessor(size=TINY)
    inputs = processor(
        [noise(100, 200), noise(300, 150)], annotations=[annotations, annotation_set(image_id=1)]
    )

    assert inputs["labels"][0]["boxes"].tolist() == [[0.5, 0.5, 0.5, 0.5]]


def test_size_is_that_of_the_unpadded_picture():
    inputs = DetectionImageProcessor(size=TINY)(
        [noise(100, 200), noise(300, 150)],
        annotations=[annotation_set(), annotation_set(image_id=1)],
    )

    assert [labels["size"].tolist() for labels in inputs["labels"]] == [[16, 32], [32, 16]]


def test_labels_are_batch_features():
    inputs = DetectionImageProcessor(**AS_IS)(noise(5, 7), annotations=annotation_set())

    assert type(inputs["labels"][0]).__name__ == BatchFeature.__name__


def test_unconverted_boxes_are_in_resized_pixels():
    inputs = DetectionImageProcessor(size={"height": 10, "width": 40})(
        noise(5, 8), annotations=annotation_set(box(1, 2, 3, 2)), do_convert_annotations=False
    )

    assert inputs["labels"][0]["boxes"].tolist() == [[5, 4, 20, 8]]


def test_annotations_follow_the_upright_picture():
    picture = PIL.Image.fromarray(noise(5, 7))
    picture.getexif()[0x0112] = 6  # lies on its side: upright it is 7 high and 5 wide
    inputs = DetectionImageProcessor(**AS_IS)(picture, annotations=annotation_set(box(0, 0, 5, 7)))

    assert inputs["labels"][0]["boxes"].tolist() == [[0.5, 0.5, 1.0, 1.0]]
    assert inputs["labels"][0]["orig_size"].tolist() == [7, 5]


@pytest.mark.parametrize("pad_size", [None, {"height": 40, "width": 57}])
def test_labels_as_predictions_give_the_annotations_back(pad_size):
    generator = np.random.default_rng(3)
    sizes = [(480, 641), (333, 250), (97, 500), (700, 701)]
    corners, sets = [], []
    for image_id, (height, width) in enumerate(sizes):
        x, y = generator.uniform(0, 0.6, (2, 5)) * [[width], [height]]
        w, h = generator.uniform(0.05, 0.4, (2, 5)) * [[width], [height]]
        corners.append(torch.from_numpy(np.stack([x, y, x + w, y + h], axis=1)))
        rows = zip(x, y, w, h, strict=True)
        boxes = [box(*row, category_id=index) for index, row in enumerate(rows)]
        sets.append(annotation_set(*boxes, image_id=image_id))
    processor = SoftmaxImageProcessor(size=TINY, pad_size=pad_size)
    labels = processor([noise(*size) for size in sizes], annotations=sets, return_tensors="pt")[
        "labels"
    ]

    # Sure of the right class, in an order of its own: the first box is the surest.
    certainty = torch.linspace(12, 8, 5)[:, None]
    logits = torch.stack([torch.eye(6)[one["class_labels"]] * certainty for one in labels])
    outputs = SimpleNamespace(
        logits=logits, pred_boxes=torch.stack([one["boxes"] for one in labels])
    )
    results = processor.post_process_object_detection(outputs, 0.5, target_sizes=sizes)

    for result, expected in zip(results, corners, strict=True):
        assert result["labels"].tolist() == [0, 1, 2, 3, 4]
        assert (result["boxes"] - expected).abs().max() < 0.5


# Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sizes": 3}, TypeError, "sizes"),
        ({"return_segmentation_masks": True}, ValueError, "Segmentation masks are not supported"),
        ({"masks_path": "masks"}, ValueError, "Segmentation masks are not supported"),
        ({"do_center_crop": True}, ValueError, "do_center_crop is not supported"),
        ({"data_format": "channels_last"}, ValueError, "data_format must be 'channels_first'"),
        ({"image_mean": [0.5, 0.5]}, ValueError, "image_mean must be .* got 2 for 3 channels"),
        ({"image_std": [1.0, 0.0, 1.0]}, ValueError, "image_std must not contain 0"),
        ({"format": "coco_panoptic"}, ValueError, "format must be 'coco_detection'"),
        ({"pad_size": {"shortest_edge": 9}}, ValueError, "pad_size must have the keys height"),
        ({"images": None}, TypeError, "got NoneType"),
        ({"annotations": [annotation_set()] * 2}, ValueError, "got 2 for 1 pictures"),
    ],
)
def test_wrong_argument_is_an_error(arguments, error, message):
    call = {"images": noise(5, 7), "annotations": annotation_set(), **arguments}
    with pytest.raises(error, match=message):
        DetectionImageProcessor(**AS_IS)(**call)


def test_unlike_channel_counts_are_an_error():
    with pytest.raises(ValueError, match=r"one number of channels, got \[1, 3\].*do_convert_rgb"):
        DetectionImageProcessor(do_convert_rgb=False, image_mean=0.5, image_std=0.5, **AS_IS)(
            [noise(5, 7), np.zeros((5, 7), np.uint8)]
        )


def test_wrong_annotation_fails_before_resizing(monkeypatch):
    monkeypatch.setattr(DetectionImageProcessor, "resize", None)

    with pytest.raises(ValueError, match="image_id 0, annotations"):
        DetectionImageProcessor()(noise(5, 7), annotations=annotation_set(box(1, 2, -3, 4)))


def test_input_names_are_those_of_the_models():
    assert DetectionImageProcessor().model_input_names == ["pixel_values", "pixel_mask"]
