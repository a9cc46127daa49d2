import numpy as np
import pytest
import torch
from PIL import Image
from saved_detector import ID2LABEL, build_detector, save_detector
from tiny import picture
from transformers import pipeline

from hf_querydet.inference import autocast, detect, load_for_inference, predict

THRESHOLD = 0.57  # of some detections the score is above, of some below
SIZES = [(61, 43), (38, 57), (75, 31), (52, 49), (33, 80)]


@pytest.fixture(scope="module")
def detector():
    return build_detector()


@pytest.fixture(scope="module")
def pictures():
    return [picture(*size, seed=number) for number, size in enumerate(SIZES)]


def assert_same(results, expected, **tolerance):
    assert len(results) == len(expected)
    for found, wanted in zip(results, expected, strict=True):
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], **tolerance)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pictures_of_a_batch_go_through_processor_model_and_post_processing(
    detector, pictures, num_workers
):
    model, processor = detector
    expected = []
    for batch in (pictures[:2], pictures[2:4], pictures[4:]):
        with torch.no_grad():
            outputs = model(**processor(batch, return_tensors="pt"))
        sizes = [each.size[::-1] for each in batch]
        expected += processor.post_process_object_detection(outputs, THRESHOLD, sizes)

    results = detect(
        *detector, pictures, batch_size=2, threshold=THRESHOLD, num_workers=num_workers
    )

    assert 0 < sum(len(each["scores"]) for each in expected) < 5 * len(pictures)
    assert_same(list(results), expected, rtol=0, atol=0)


def test_detections_are_those_of_a_pipeline(tmp_path, pictures):
    save_detector(tmp_path)
    expected = pipeline("object-detection", model=str(tmp_path))(pictures, threshold=THRESHOLD)

    for found, wanted in zip(
        detect(
            *load_for_inference(tmp_path, device="cpu"), pictures, batch_size=1, threshold=THRESHOLD
        ),
        expected,
        strict=True,
    ):
        assert [ID2LABEL[label] for label in found["labels"].tolist()] == [
            each["label"] for each in wanted
        ]
        assert found["scores"].tolist() == pytest.approx([each["score"] for each in wanted])
        assert [[int(side) for side in box] for box in found["boxes"].tolist()] == [
            list(each["box"].values()) for each in wanted
        ]


def test_file_on_its_side_is_turned_upright(tmp_path, detector, pictures):
    upright = pictures[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)

    results = detect(*detector, [tmp_path / "turned.png"], threshold=0.0)

    assert_same(list(results), list(detect(*detector, [upright], threshold=0.0)))


def test_no_more_pictures_are_opened_than_a_batch_holds(detector):
    opened = []

    def names():
        for number in range(10_000):
            opened.append(number)
            yield picture(20, 30, seed=number)

    results = detect(*detector, names(), batch_size=4, threshold=0.0)

    assert not opened
    for _ in range(6):
        next(results)
    assert len(opened) == 8


def test_model_of_fewer_bits_gets_pictures_of_fewer_bits(detector, pictures):
    model, processor = build_detector()
    half = list(detect(model.to(torch.bfloat16), processor, pictures, threshold=0.0))

    full = list(detect(*detector, pictures, threshold=0.0))
    # bfloat16 has 8 bits of precision; errors grow over the layers.
    torch.testing.assert_close(half[0]["scores"], full[0]["scores"], rtol=0, atol=0.1)


def test_top_k_keeps_the_best(detector, pictures):
    results = detect(*detector, pictures[:1], threshold=0.0, top_k=2)
    everything = detect(*detector, pictures[:1], threshold=0.0)

    expected = {name: values[:2] for name, values in next(everything).items()}
    assert_same(list(results), [expected])


def test_dark_picture_of_floats_is_read_once(detector):
    model, processor = detector
    # At most 1 of 255: read a second time, it would pass for a picture from 0 to 1.
    dark = (np.random.default_rng(0).integers(0, 2, (40, 60, 3)) / 255).astype(np.float32)
    inputs = processor((dark * 255).astype(np.uint8), return_tensors="pt")
    expected = predict(model, processor, inputs, [(40, 60)], threshold=0.0)

    assert_same(list(detect(model, processor, [dark], threshold=0.0)), expected)


def test_what_is_no_picture_is_named(detector):
    row = {"image": Image.new("RGB", (8, 8))}
    with pytest.raises(TypeError, match=r"got dict; pass its picture, row\['image'\]"):
        list(detect(*detector, [row]))
    with pytest.raises(TypeError, match=r"images must be PIL pictures.* got list"):
        list(detect(*detector, [[row["image"]]]))


def test_array_of_several_pictures_is_several(detector):
    pictures = np.zeros((2, 24, 32, 3), dtype=np.uint8)
    assert len(list(detect(*detector, pictures))) == 2


@pytest.mark.parametrize(
    "one",
    [
        "a.png",
        Image.new("RGB", (8, 8)),
        np.zeros((8, 8, 3), dtype=np.uint8),
        torch.zeros(3, 8, 8),
        torch.zeros(8, 8),
    ],
)
def test_one_picture_is_not_several(detector, one):
    with pytest.raises(TypeError, match=r"pictures must be several, got one .*; pass \[picture\]"):
        detect(*detector, one)


def test_file_that_cannot_be_read_is_named(tmp_path, detector):
    (tmp_path / "bad.png").write_bytes(b"no picture")

    with pytest.raises(ValueError, match=r"bad\.png cannot be read"):
        next(detect(*detector, [tmp_path / "bad.png"]))


def test_loaded_detector_is_ready_for_use(tmp_path):
    save_detector(tmp_path)

    model, processor = load_for_inference(tmp_path, device="cpu")

    assert not any(module.training for module in model.modules())
    assert model.device.type == "cpu"
    assert processor.size.shortest_edge == 48


def test_precision_holds_inside_the_block_only():
    weight = torch.ones(2, 2)
    with autocast(weight.device, "bf16"):
        assert (weight @ weight).dtype == torch.bfloat16
    with autocast(weight.device, "no"):
        assert (weight @ weight).dtype == torch.float32


def test_unknown_precision_is_named():
    with pytest.raises(ValueError, match="mixed_precision must be one of no, fp16, bf16, got 'i8'"):
        autocast(torch.device("cpu"), "i8")
