"""What every variant records of its decoder."""

import math
from itertools import product

import pytest
import torch
from tiny import TINY_CONFIGS, perturb, tiny_batch, tiny_config, tiny_labels

from hf_querydet import VARIANTS, AnchorDETRConfig, AnchorDETRForObjectDetection
from hf_querydet.layers.roi_pooling import level_strides
from hf_querydet.recording import CellAttention, PictureFrame, Region, SampledPoints

# The pictures of tiny_batch: width and height in pixels, on a canvas of 101 x 70.
FRAMES = [
    PictureFrame(size=(640.0, 700.0), canvas_share=(64 / 101, 1.0)),
    PictureFrame(size=(505.0, 225.0), canvas_share=(1.0, 45 / 70)),
]
EVIDENCE = {
    "detr": CellAttention,
    "conditional_detr": CellAttention,
    "anchor_detr": CellAttention,
    "deformable_detr": SampledPoints,
    "efficient_detr": SampledPoints,
    "sparse_rcnn": Region,
    "dynamic_detr": Region,
}
TWO_STAGE = {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 5}
# Beside the name of a variant, options that make it look in another way.
CASES = [
    *((name, {}) for name in TINY_CONFIGS),
    ("anchor_detr", {"attention_type": "full"}),
    ("deformable_detr", TWO_STAGE),
    ("efficient_detr", {"reference_point_init": "learnable", "decoder_layers": 2}),
]
every_case = pytest.mark.parametrize(
    ("name", "changes"), CASES, ids=lambda case: "-".join(case) if isinstance(case, dict) else case
)


def build(name, changes):
    return perturb(VARIANTS[name].detector(tiny_config(VARIANTS, name, **changes))).eval()


@torch.no_grad()
def record(model, batch=None, **options):
    return model(**(batch or tiny_batch()), output_recording=True, **options).recording


@every_case
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_recording_changes_no_output(name, changes, attention):
    model = build(name, changes)
    model.set_attn_implementation(attention)
    batch, labels = tiny_batch(), tiny_labels()
    options = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        without = model(**batch, labels=labels, **options)
        recorded = model(**batch, labels=labels, **options, output_recording=True)

    assert "recording" not in without
    assert set(recorded) == {*without, "recording"}
    for name, expected in without.items():
        torch.testing.assert_close(recorded[name], expected, rtol=0, atol=0)


def test_recording_draws_no_dropout_of_its_own():
    model = build("anchor_detr", {"attention_dropout": 0.5}).train()
    outputs = []
    for recorded in (False, True):
        torch.manual_seed(0)
        outputs.append(model(**tiny_batch(), output_recording=recorded))
    assert torch.equal(outputs[0].logits, outputs[1].logits)


@every_case
def test_recorded_predictions_are_those_of_every_layer(name, changes):
    model, batch = build(name, changes), tiny_batch()
    with torch.no_grad():
        outputs = model(**batch, labels=tiny_labels(), output_recording=True)
    recording = outputs.recording
    assert len(recording.layers) == model.config.decoder_layers
    for field in ("logits", "pred_boxes"):
        expected = torch.cat([outputs.auxiliary_outputs[field], outputs[field][None]])
        torch.testing.assert_close(getattr(recording, field), expected)


@every_case
def test_each_layer_has_evidence_of_its_kind_and_at_most_one_reference(name, changes):
    recording = record(build(name, changes))
    num_queries = recording.logits.shape[2]
    for layer in recording.layers:
        assert layer.reference_points is None or layer.reference_boxes is None
        for reference, size in ((layer.reference_points, 2), (layer.reference_boxes, 4)):
            assert reference is None or reference.shape == (2, num_queries, size)
        for picture, frame in enumerate(FRAMES):
            evidence = layer.evidence.of_query(picture, num_queries - 1, frame)
            assert isinstance(evidence, EVIDENCE[name])


@every_case
def test_nothing_recorded_keeps_a_graph(name, changes):
    model = build(name, changes)
    recording = model(**tiny_batch(), output_recording=True).recording
    tensors = [recording.logits, recording.pred_boxes, recording.canvas_shares]
    for layer in recording.layers:
        fields = (*vars(layer).values(), *vars(layer.evidence).values())
        tensors += [field for field in fields if isinstance(field, torch.Tensor)]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_canvas_shares_are_the_sizes_of_the_pictures():
    shares = record(build("detr", {})).canvas_shares
    torch.testing.assert_close(shares, torch.tensor([[64 / 101, 1.0], [1.0, 45 / 70]]))


# Attention to cells

CELL_CASES = [
    ("detr", {}),
    ("conditional_detr", {}),
    ("anchor_detr", {}),
    ("anchor_detr", {"attention_type": "full"}),
]


@pytest.mark.parametrize(("name", "changes"), CELL_CASES)
def test_cell_weights_equal_the_returned_attentions_cut_to_the_picture(name, changes):
    model = build(name, changes)
    batch = tiny_batch()
    recording = record(model, batch)  # with sdpa, which has no weights
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).cross_attentions
    # Of 70 x 101 pixels by a stride of 32: 3 x 4 cells; the pictures fill 3 x 3 and 2 x 4 of them.
    for (rows, columns), (picture, frame) in zip([(3, 3), (2, 4)], enumerate(FRAMES), strict=True):
        for layer, weights in zip(recording.layers, attentions, strict=True):
            maps = layer.evidence.of_query(picture, 2, frame).maps
            expected = weights[picture, :, 2].view(2, 1, 3, 4)[..., :rows, :columns]
            torch.testing.assert_close(maps["total"], expected)


@pytest.mark.parametrize(("name", "changes"), CELL_CASES)
def test_every_map_sums_to_one_over_the_cells_of_the_picture(name, changes):
    for layer in record(build(name, changes)).layers:
        for picture, frame in enumerate(FRAMES):
            maps = layer.evidence.of_query(picture, 1, frame).maps
            assert next(iter(maps)) == "total"
            for each in maps.values():
                torch.testing.assert_close(each.sum((1, 2, 3)), torch.ones(2))


def test_maps_span_whole_cells_of_the_canvas():
    layer = record(build("detr", {})).layers[0]
    # In pixels of the canvas a cell is 101 / 4 wide and 70 / 3 high; in those of the original
    # pictures 10 and 5 times as much.
    extents = [layer.evidence.of_query(i, 0, frame).extent for i, frame in enumerate(FRAMES)]
    expected = [(10 * 3 * 101 / 4, 10 * 70), (5 * 101, 5 * 2 * 70 / 3)]
    torch.testing.assert_close(torch.tensor(extents), torch.tensor(expected))


def test_conditional_parts_multiply_to_the_total():
    for layer in record(build("conditional_detr", {})).layers:
        maps = layer.evidence.of_query(0, 3, FRAMES[0]).maps
        assert list(maps) == ["total", "content", "spatial"]
        both = maps["content"] * maps["spatial"]
        torch.testing.assert_close(both / both.sum((1, 2, 3), keepdim=True), maps["total"])


def test_spatial_part_of_the_first_conditional_layer_knows_nothing_of_the_picture():
    model = build("conditional_detr", {})
    maps = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        layer = record(model, {"pixel_values": torch.randn(1, 3, 96, 64)}).layers[0]
        maps.append(layer.evidence.of_query(0, 0, PictureFrame((64, 96), (1.0, 1.0))).maps)
    torch.testing.assert_close(maps[0]["spatial"], maps[1]["spatial"])
    assert not torch.allclose(maps[0]["content"], maps[1]["content"])


def test_anchor_total_is_the_product_of_row_and_column():
    maps = record(build("anchor_detr", {})).layers[1].evidence.of_query(1, 4, FRAMES[1]).maps
    assert maps["row"].shape == (2, 1, 1, 4)
    assert maps["column"].shape == (2, 1, 2, 1)
    torch.testing.assert_close(maps["total"], maps["row"] * maps["column"])


def test_levels_of_anchor_detr_are_kept_apart():
    # Three levels need a dilated backbone, whose last stage is as large as the one before.
    config = AnchorDETRConfig(
        backbone="test_resnet",
        dilation=True,
        num_feature_levels=3,
        num_labels=3,
        **TINY_CONFIGS["anchor_detr"],
    )
    model = perturb(AnchorDETRForObjectDetection(config)).eval()
    evidence = record(model).layers[0].evidence.of_query(0, 0, FRAMES[0])
    assert evidence.maps["total"].shape[1] == 3
    for each in evidence.maps.values():
        torch.testing.assert_close(each.sum((2, 3)), torch.ones(2, 3))


# Sampled points


@pytest.mark.parametrize(
    ("name", "changes"),
    [("deformable_detr", {}), ("deformable_detr", TWO_STAGE), ("efficient_detr", {})],
)
def test_sampled_points_are_those_computed_by_hand_from_the_offsets(name, changes):
    model = build(name, changes)
    calls = []
    for layer in model.model.decoder_layers:
        layer.cross_attention.register_forward_hook(
            lambda module, inputs, options, _: calls.append((module, inputs, options)),
            with_kwargs=True,
        )
    recording = record(model)
    picture, query, frame = 1, 3, FRAMES[1]
    for layer, (attention, (queries, _, shapes), options) in zip(
        recording.layers, calls, strict=True
    ):
        evidence = layer.evidence.of_query(picture, query, frame)
        offsets = attention.sampling_offsets(queries[picture, query]).tolist()
        logits = attention.attention_weights(queries[picture, query]).tolist()
        per_head = len(logits) // attention.num_heads
        for head, level, point in product(range(2), range(4), range(2)):
            index = (head * 4 + level) * 2 + point
            if options["reference_points"] is not None:
                center = options["reference_points"][picture, query, level].tolist()
                height, width = shapes[level]
                unit = (1 / width, 1 / height)
            else:
                *center, width, height = options["reference_boxes"][picture, query, level].tolist()
                unit = (width / 2 / 2, height / 2 / 2)  # half the box, 2 points
            # Relative to the canvas, which this picture fills with 101 of 101 and 45 of 70 pixels.
            x = (center[0] + offsets[2 * index] * unit[0]) * 505
            y = (center[1] + offsets[2 * index + 1] * unit[1]) / (45 / 70) * 225
            torch.testing.assert_close(
                evidence.points[head, level, point], torch.tensor([x, y]), rtol=1e-4, atol=1e-3
            )
            exponentials = [math.exp(z) for z in logits[head * per_head : (head + 1) * per_head]]
            weight = math.exp(logits[index]) / sum(exponentials)
            assert evidence.weights[head, level, point].item() == pytest.approx(weight, rel=1e-4)


def test_each_layer_starts_where_the_one_before_ended():
    recording = record(build("deformable_detr", TWO_STAGE))
    for before, layer in zip(recording.pred_boxes, recording.layers[1:], strict=False):
        assert torch.equal(layer.reference_boxes, before)
    changes = {"reference_point_init": "learnable", "decoder_layers": 2}
    first, second = record(build("efficient_detr", changes)).layers
    assert first.reference_boxes is None
    assert second.reference_points is None
    plain = record(build("deformable_detr", {})).layers
    assert all(torch.equal(each.reference_points, plain[0].reference_points) for each in plain)


# Regions


@pytest.mark.parametrize("name", ["sparse_rcnn", "dynamic_detr"])
def test_regions_are_the_boxes_before_each_stage(name):
    model = build(name, {})
    learned = model.model.proposal_boxes if name == "sparse_rcnn" else model.model.query_boxes
    recording = record(model)
    expected = [learned.weight.detach().expand(2, -1, -1), *recording.pred_boxes[:-1]]
    for layer, boxes in zip(recording.layers, expected, strict=True):
        torch.testing.assert_close(layer.evidence.boxes, boxes)
        assert layer.reference_boxes is layer.evidence.boxes
    region = recording.layers[0].evidence.of_query(1, 2, FRAMES[1])
    x, y, width, height = learned.weight[2].tolist()
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    in_pixels = [side * size for side, size in zip(corners, (505, 225, 505, 225), strict=True)]
    torch.testing.assert_close(region.box, torch.tensor(in_pixels))


def test_region_without_area_has_no_stride():
    boxes = torch.tensor([[0.0, 0.0, 224.0, 224.0], [0.0, 0.0, 60.0, 60.0], [9.0, 9.0, 5.0, 20.0]])
    assert level_strides(boxes, finest_level=2, num_levels=4).tolist() == [16, 4, 0]
