"""Explanations in pixels of the original picture."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY_CONFIGS, perturb, picture, tiny_config
from torch.nn import functional as F
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
from transformers.image_utils import SizeDict

from hf_querydet import VARIANTS
from hf_querydet.visualization import explain, record

SIZE = {"shortest_edge": 64, "longest_edge": 100}
ID2LABEL = {0: "cat", 1: "dog", 2: "owl"}


def detector(name, **changes):
    model = VARIANTS[name].detector(tiny_config(VARIANTS, name, id2label=ID2LABEL, **changes))
    return perturb(model).eval(), VARIANTS[name].image_processor(size=SIZE)


@pytest.fixture(scope="module")
def detr():
    torch.manual_seed(0)
    return detector("detr")


def marked_picture(width, height):
    """A picture whose red says how far right a place is, and whose green how far down."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.stack([(x + 0.5) / width, (y + 0.5) / height, np.zeros_like(x)], axis=-1)


# Of unlike sizes and shapes, one of them enlarged and the others shrunk on their way to the model.
MARKED = [marked_picture(400, 250), marked_picture(60, 90), marked_picture(300, 310)]


def canvas_of(processor):
    """Red and green of the batch of marked pictures, as the model would see them."""
    inputs = processor(MARKED, do_normalize=False, return_tensors="pt")
    return inputs["pixel_values"][:, :2], inputs["pixel_mask"]


def test_sampled_points_lie_where_the_marked_picture_says():
    model, processor = detector("deformable_detr")
    canvas, _ = canvas_of(processor)
    num_compared = 0
    for index, recorded in enumerate(record(model, processor, MARKED)):
        locations = recorded._recording.layers[1].evidence.locations[index]
        size = torch.tensor(recorded.picture.size, dtype=torch.float32)
        for query in range(5):
            points = recorded.explain(query).layers[1].evidence.points.view(1, -1, 2)
            grid = 2 * locations[query].view(1, 1, -1, 2) - 1
            marks = F.grid_sample(canvas[index, None], grid, align_corners=False)[0, :, 0].T * size
            # Away from the border, where colours mix with what is beyond it.
            inside = ((points[0] > 0.1 * size) & (points[0] < 0.9 * size)).all(-1)
            num_compared += inside.sum()
            # A pixel of the model's is up to 4 of the original.
            torch.testing.assert_close(points[0][inside], marks[inside], rtol=0, atol=0.5)
    assert num_compared > 50


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "anchor_detr"])
def test_cells_lie_where_the_marked_picture_says(name):
    model, processor = detector(name)
    canvas, mask = canvas_of(processor)
    for index, recorded in enumerate(record(model, processor, MARKED)):
        evidence = recorded.explain(1).layers[0].evidence
        rows, columns = evidence.maps["total"].shape[-2:]
        height, width = (-(-side // 32) for side in canvas.shape[-2:])
        marks = F.interpolate(canvas, size=(height, width), mode="area")[index]
        filled = F.interpolate(mask[:, None].float(), size=(height, width), mode="area")[index, 0]
        whole = (filled == 1).nonzero().tolist()
        assert len(whole) >= 2
        for row, column in whole:
            x = (column + 0.5) * evidence.extent[0] / columns / recorded.picture.width
            y = (row + 0.5) * evidence.extent[1] / rows / recorded.picture.height
            # Cells of whole pixels are a little smaller or larger than their share.
            torch.testing.assert_close(
                marks[:, row, column], torch.tensor([x, y]), rtol=0, atol=0.02
            )
        # All cells that show something of the picture are there, and no others.
        assert rows == (filled[:, 0] > 0).sum()
        assert columns == (filled[0] > 0).sum()


@pytest.mark.parametrize("name", list(TINY_CONFIGS))
def test_last_layer_is_the_detection_of_the_query(name):
    model, processor = detector(name)
    pictures = [picture(90, 60), picture(50, 140, seed=1)]
    for image, recorded in zip(pictures, record(model, processor, pictures), strict=True):
        assert recorded.picture.tobytes() == image.tobytes()
        with torch.no_grad():
            together = processor(pictures, return_tensors="pt")
            outputs = model(**together)
        expected = processor.post_process_object_detection(
            outputs, 0.0, [each.size[::-1] for each in pictures]
        )[pictures.index(image)]
        for key in ("scores", "boxes"):
            torch.testing.assert_close(recorded.detections[key], expected[key])
        explanation = recorded.explain()
        last = explanation.layers[-1]
        assert len(explanation.layers) == model.config.decoder_layers
        assert explanation.query == expected["queries"][0]
        torch.testing.assert_close(last.box, expected["boxes"][0])
        torch.testing.assert_close(torch.tensor(last.score), expected["scores"][0])
        assert last.label == ID2LABEL[expected["labels"][0].item()]


def test_references_are_in_pixels_too():
    model, processor = detector("conditional_detr")
    explanation = explain(model, processor, picture(90, 60), query=3)
    with torch.no_grad():
        points = model(torch.zeros(1, 3, 64, 64)).reference_points
    for layer in explanation.layers:
        torch.testing.assert_close(layer.reference_point, points[0, 3] * torch.tensor([90.0, 60.0]))
        assert layer.reference_box is None

    model, processor = detector("sparse_rcnn")
    layers = explain(model, processor, picture(90, 60), query=3).layers
    for before, layer in pairwise(layers):
        torch.testing.assert_close(layer.reference_box, before.box, rtol=1e-4, atol=1e-3)
        assert torch.equal(layer.reference_box, layer.evidence.box)


def test_pictures_of_a_batch_are_explained_as_alone(detr):
    model, processor = detr
    processor = type(processor)(size=SIZE, pad_size={"height": 100, "width": 100})
    pictures = [picture(90, 60), picture(50, 140, seed=1)]
    together = record(model, processor, pictures)
    for image, recorded in zip(pictures, together, strict=True):
        alone, beside = explain(model, processor, image, 2), recorded.explain(2)
        for one, other in zip(alone.layers, beside.layers, strict=True):
            torch.testing.assert_close(one.box, other.box, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(one.evidence.maps["total"], other.evidence.maps["total"])


def test_pictures_of_unlike_sizes_are_padded_whatever_the_processor_says(detr):
    model, processor = detr
    pictures = [picture(90, 60), picture(50, 140, seed=1)]
    assert len(record(model, type(processor)(size=SIZE, do_pad=False), pictures)) == 2


def test_picture_that_fills_the_canvas_has_its_extent(detr):
    explanation = explain(*detr, picture(96, 64))
    assert explanation.layers[0].evidence.extent == (96.0, 64.0)


def test_upright_picture_is_what_is_explained(detr, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(90, 60).save(tmp_path / "turned.jpg", exif=exif)
    assert explain(*detr, tmp_path / "turned.jpg").picture.size == (60, 90)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_is_explained_in_float32(dtype):
    for name in ("detr", "deformable_detr", "sparse_rcnn"):
        model, processor = detector(name)
        layer = explain(model.to(dtype), processor, picture(90, 60)).layers[-1]
        fields = [field for field in vars(layer.evidence).values() if torch.is_tensor(field)]
        assert all(each.dtype == torch.float32 for each in [layer.box, *fields])


def test_query_without_a_token_is_an_error():
    model, processor = detector("efficient_detr", num_queries=300)
    # More queries than there are tokens; those of the padding cannot be used.
    processor.pad_size = SizeDict(height=100, width=100)
    recorded = record(model, processor, picture(64, 64))[0]
    usable = recorded._recording.is_usable[0]
    query = int((~usable).nonzero()[0])
    with pytest.raises(ValueError, match=rf"query {query} is none of this picture: it has only "):
        recorded.explain(query)


@pytest.mark.parametrize("query", [torch.tensor(3), np.int64(3)])
def test_query_may_be_a_number_of_torch_or_numpy(detr, query):
    explanation = explain(*detr, picture(90, 60), query=query)
    assert type(explanation.query) is int
    assert explanation.query == 3


@pytest.mark.parametrize("query", [5, -1, 1.0, "worst", True, torch.tensor([1, 2])])
def test_query_that_there_is_not_is_an_error(detr, query):
    with pytest.raises(ValueError, match="query must be 'best' or a whole number from 0 to 4"):
        explain(*detr, picture(90, 60), query=query)


def test_training_mode_is_an_error(detr):
    model, processor = detr
    model.train()
    with pytest.raises(ValueError, match=r"model is in training mode.*model\.eval\(\)"):
        explain(model, processor, picture(90, 60))
    model.eval()


def test_foreign_model_and_processor_are_errors(detr):
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8],
        depths=[1],
        layer_type="basic",
        out_features=["stage1"],
    )
    foreign = DetrForObjectDetection(
        DetrConfig(backbone_config=backbone, use_timm_backbone=False, d_model=8, decoder_layers=1)
    )
    with pytest.raises(TypeError, match="model must be a detector of this library, got DetrForO"):
        explain(foreign, detr[1], picture(90, 60))
    with pytest.raises(TypeError, match="processor must be an image processor of this library"):
        explain(detr[0], object(), picture(90, 60))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([picture(9, 6), picture(9, 6)], ValueError, "image must be one picture, got 2"),
        (5, TypeError, "images must be PIL pictures, .* got int"),
        (np.zeros((6, 9, 7)), ValueError, "must have 1 to 4 channels"),
    ],
)
def test_what_is_not_one_picture_is_an_error(detr, image, error, message):
    with pytest.raises(error, match=message):
        explain(*detr, image)


def test_file_that_is_no_picture_is_named(detr, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    with pytest.raises(ValueError, match=r"The picture .*notes\.png cannot be read"):
        explain(*detr, path)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_explanation_is_drawn_in_mixed_precision(name, tmp_path):
    model, processor = detector(name)
    with torch.autocast("cpu", torch.bfloat16):
        explain(model, processor, MARKED[0], query=1).save(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.width > 100
