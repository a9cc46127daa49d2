"""Sparse R-CNN against its authors' numbers, against oracles, and what only this paper claims."""

import math

import oracles
import pytest
import sparse_rcnn_golden
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import save_file
from tiny import TINY_BACKBONE, in_one_graph, perturb, tiny_batch, tiny_config, tiny_labels

from hf_querydet import (
    VARIANTS,
    SparseRCNNConfig,
    SparseRCNNForObjectDetection,
)
from hf_querydet.checkpoint_mapping_utils import renamed
from hf_querydet.layers.feature_levels import flatten_levels
from hf_querydet.models.sparse_rcnn import modeling_sparse_rcnn
from hf_querydet.models.sparse_rcnn.checkpoint_mapping import AUTHORS_NAMES
from hf_querydet.models.sparse_rcnn.modeling_sparse_rcnn import DynamicInstanceInteractiveHead
from hf_querydet.training import parameter_groups

WHOLE_PICTURE = [0.5, 0.5, 1.0, 1.0]


def build(**changes):
    return SparseRCNNForObjectDetection(tiny_config(VARIANTS, "sparse_rcnn", **changes))


def forward(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs)


# The authors' numbers


def test_stages_agree_with_the_authors_modules():
    config = SparseRCNNConfig(
        num_labels=sparse_rcnn_golden.NUM_CLASSES,
        decoder_layers=sparse_rcnn_golden.NUM_STAGES,
        attn_implementation="sdpa",
    )
    # Through the table that conversion renames by.
    weights = {}
    for name, value in sparse_rcnn_golden.head_tensors().items():
        places = renamed(f"head.{name}", AUTHORS_NAMES)
        weights.update(zip(places, value.chunk(len(places)), strict=True))
    levels, boxes, features = sparse_rcnn_golden.inputs()
    all_boxes = []
    for index in range(config.decoder_layers):
        start = f"model.stages.{index}."
        stage = DynamicInstanceInteractiveHead(config, finest_level=2).eval()
        stage.load_state_dict(
            {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        )
        with torch.no_grad():
            features, boxes, _ = stage(features, boxes, *flatten_levels(levels))
            logits = stage.classify(features)
        all_boxes.append(boxes)

    sparse_rcnn_golden.assert_golden(logits, all_boxes)


# Stages


def test_stages_without_deltas_keep_the_learned_boxes():
    model = perturb(build(decoder_layers=3))
    learned = torch.tensor([[0.3, 0.6, 0.2, 0.5]]).repeat(5, 1) + torch.rand(5, 4) * 0.1
    with torch.no_grad():
        model.model.proposal_boxes.weight.copy_(learned)
        for stage in model.model.stages:
            stage.box_head.weight.zero_()
            stage.box_head.bias.zero_()

    boxes = forward(model, **tiny_batch()).intermediate_boxes

    torch.testing.assert_close(boxes, learned.expand(3, 2, 5, 4))


def test_each_stage_pools_from_the_boxes_of_the_one_before(monkeypatch):
    model = perturb(build(decoder_layers=3))
    pooled_from = []

    def pool(tokens, spatial_shapes, boxes, **options):
        pooled_from.append(boxes)
        return pool_regions(tokens, spatial_shapes, boxes, **options)

    pool_regions = modeling_sparse_rcnn.pool_regions
    monkeypatch.setattr(modeling_sparse_rcnn, "pool_regions", pool)
    boxes = forward(model, **tiny_batch()).intermediate_boxes

    sizes = torch.tensor([[64.0, 70, 64, 70], [101, 45, 101, 45]])[:, None]
    for predicted, pixels in zip(boxes, pooled_from[1:], strict=False):
        cx, cy, width, height = (predicted * sizes).unbind(-1)
        corners = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
        torch.testing.assert_close(pixels, torch.stack(corners, -1), rtol=1e-4, atol=1e-3)


def test_first_boxes_are_whole_pictures_without_their_padding(monkeypatch):
    first = []

    def pool(tokens, spatial_shapes, boxes, **options):
        first.append(boxes)
        return torch.zeros(2, 5, 9, 32)

    monkeypatch.setattr(modeling_sparse_rcnn, "pool_regions", pool)
    forward(build(), **tiny_batch())

    expected = torch.tensor([[0.0, 0, 64, 70], [0, 0, 101, 45]])
    torch.testing.assert_close(first[0], expected[:, None].expand(-1, 5, -1))


def test_boxes_of_a_stage_do_not_train_the_stages_before():
    model = build(decoder_layers=3)
    boxes = model(**tiny_batch()).intermediate_boxes
    boxes[-1].sum().backward()

    assert not model.model.proposal_boxes.weight.grad.any()
    assert not any(stage.box_head.weight.grad.any() for stage in model.model.stages[:-1])
    assert model.model.stages[-1].box_head.weight.grad.any()
    # Features are not detached.
    assert model.model.proposal_features.weight.grad.any()
    assert model.model.stages[0].dynamic_convolution.filter_generator.weight.grad.any()


def test_boxes_of_the_first_stage_train_the_learned_boxes():
    model = build()
    outputs = model(**tiny_batch())
    outputs.intermediate_boxes[0].sum().backward()
    assert model.model.proposal_boxes.weight.grad.any()


def test_permuted_proposals_permute_predictions():
    model = perturb(build())
    expected = forward(model, **tiny_batch_of_seed(1))
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for table in (model.model.proposal_boxes, model.model.proposal_features):
            table.weight.copy_(table.weight[order])

    actual = forward(model, **tiny_batch_of_seed(1))

    torch.testing.assert_close(actual.logits, expected.logits[:, order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        actual.pred_boxes, expected.pred_boxes[:, order], rtol=1e-4, atol=1e-4
    )


def tiny_batch_of_seed(seed):
    torch.manual_seed(seed)
    return tiny_batch()


# Canvas


def test_picture_has_the_same_boxes_alone_on_the_canvas_of_its_batch():
    model = perturb(build())
    batch = tiny_batch()
    together = forward(model, **batch)
    for index in range(2):
        alone = forward(model, **{name: value[index : index + 1] for name, value in batch.items()})
        torch.testing.assert_close(
            alone.pred_boxes[0], together.pred_boxes[index], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=1e-4, atol=1e-4)


def test_canvas_is_padded_to_a_multiple_of_32():
    model = perturb(build())
    batch = tiny_batch()
    padded = {
        "pixel_values": torch.nn.functional.pad(batch["pixel_values"], (0, 27, 0, 26)),
        "pixel_mask": torch.nn.functional.pad(batch["pixel_mask"], (0, 27, 0, 26)),
    }
    assert padded["pixel_values"].shape[-2:] == (96, 128)
    actual, expected = forward(model, **batch), forward(model, **padded)
    torch.testing.assert_close(actual.pred_boxes, expected.pred_boxes, rtol=0, atol=0)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=0)


def test_canvas_without_a_mask_is_the_picture_before_it_is_padded():
    model = perturb(build())
    pixel_values = torch.randn(2, 3, 70, 101)
    full = torch.ones(2, 70, 101, dtype=torch.int64)
    actual = forward(model, pixel_values=pixel_values)
    expected = forward(model, pixel_values=pixel_values, pixel_mask=full)
    torch.testing.assert_close(actual.pred_boxes, expected.pred_boxes, rtol=0, atol=0)


@pytest.mark.parametrize(("stages", "finest_level"), [([1, 2, 3, 4], 2), ([3, 4], 4)])
def test_levels_end_at_stride_32(stages, finest_level):
    model = build(backbone_config={**TINY_BACKBONE, "out_indices": stages})
    assert {stage.finest_level for stage in model.model.stages} == {finest_level}
    channels = model.model.backbone.channels
    sides = []
    model.model.feature_pyramid.register_forward_hook(
        lambda module, inputs, levels: sides.extend(level.shape[-1] for level in levels)
    )
    forward(model, pixel_values=torch.randn(1, 3, 64, 128))
    assert sides == [128 // 2 ** (finest_level + i) for i in range(len(channels))]


@pytest.mark.parametrize("stages", [[1, 2, 3], [1, 3, 4]], ids=["too fine", "with a gap"])
def test_stages_of_other_strides_are_an_error(stages):
    model = build(backbone_config={**TINY_BACKBONE, "out_indices": stages})
    message = r"must give maps of strides \[8, 16, 32\], got .*\(64, 128\) pixels; set out_indices"
    with pytest.raises(ValueError, match=message):
        forward(model, pixel_values=torch.randn(1, 3, 64, 128))


# Loss


@pytest.mark.parametrize("use_focal", [True, False])
def test_loss_is_that_of_the_definition_with_corners(use_focal):
    model = perturb(build(use_focal=use_focal, eos_coefficient=0.3, focal_alpha=0.4)).eval()
    outputs = model(**tiny_batch(), labels=tiny_labels())
    logits = torch.cat([outputs.auxiliary_outputs.logits, outputs.logits[None]])
    boxes = torch.cat([outputs.auxiliary_outputs.pred_boxes, outputs.pred_boxes[None]])
    expected, total = {}, 0.0
    for stage, suffix in enumerate(["_0", ""]):
        terms = oracles.set_loss(
            logits[stage].detach().double(),
            boxes[stage].detach().double(),
            tiny_labels(),
            class_cost=2.0,
            bbox_cost=5.0,
            giou_cost=2.0,
            no_object_weight=None if use_focal else 0.3,
            alpha=0.4,
            distance=oracles.corner_l1,
        )
        expected |= {name + suffix: value for name, value in terms.items()}
        total += 2 * terms["loss_ce"] + 5 * terms["loss_bbox"] + 2 * terms["loss_giou"]

    actual = {name: value.item() for name, value in outputs.loss_dict.items()}
    assert actual == pytest.approx(expected, rel=1e-4)
    assert outputs.loss.item() == pytest.approx(total, rel=1e-4)
    assert logits.shape[-1] == (3 if use_focal else 4)


def test_more_objects_than_proposals_can_be_trained():
    model = build(num_queries=1)
    outputs = model(**tiny_batch(), labels=tiny_labels())
    outputs.loss.backward()
    assert outputs.loss.isfinite()


# First values


def fresh(folder, **changes):
    """A model built on the meta device of which the file holds the backbone only."""
    model = build(**changes)
    model.config.save_pretrained(folder)
    weights = {name: v for name, v in model.state_dict().items() if ".backbone." in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return SparseRCNNForObjectDetection.from_pretrained(folder)


# As many labels as a box has coordinates, as a dynamic filter has channels, as a token has.
@pytest.mark.parametrize("num_labels", [4, 8, 32])
def test_focal_prior_reaches_the_class_heads_alone(num_labels, tmp_path):
    for model in (build(num_labels=num_labels), fresh(tmp_path, num_labels=num_labels)):
        prior = -math.log(99)
        hit = {
            name
            for name, parameter in model.named_parameters()
            if torch.allclose(parameter, torch.tensor(prior))
        }
        assert hit == {f"model.stages.{stage}.class_head.bias" for stage in range(2)}


def test_softmax_class_heads_have_no_prior():
    for stage in build(use_focal=False).model.stages:
        assert stage.class_head.bias.abs().max() <= 32**-0.5


def test_proposals_start_as_whole_pictures_with_normal_features(tmp_path):
    for model in (build(num_queries=60), fresh(tmp_path, num_queries=60)):
        boxes = model.model.proposal_boxes.weight
        assert torch.equal(boxes, torch.tensor(WHOLE_PICTURE).expand(60, 4))
        assert model.model.proposal_features.weight.std().item() == pytest.approx(1, abs=0.05)


def test_matrices_of_a_stage_are_xavier_uniform(tmp_path):
    for model in (build(), fresh(tmp_path)):
        stage = model.model.stages[1]
        matrices = [
            stage.dynamic_convolution.filter_generator,
            stage.dynamic_convolution.output_projection,
            *stage.class_tower.layers,
            *stage.box_tower.layers,
            stage.class_head,
            stage.box_head,
            stage.feed_forward.expand,
        ]
        for layer in matrices:
            bound = (6 / sum(layer.weight.shape)) ** 0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound


def test_pyramid_starts_with_variance_one_over_fan_in(tmp_path):
    for model in (build(), fresh(tmp_path)):
        pyramid = model.model.feature_pyramid
        for layer in (*pyramid.lateral_projections, *pyramid.output_convolutions):
            bound = (3 / layer.weight[0].numel()) ** 0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert not layer.bias.any()


# Configuration and recipe


def test_proposals_are_another_name_of_queries():
    config = SparseRCNNConfig(num_proposals=17)
    assert config.num_queries == config.num_proposals == 17
    assert config.to_dict()["num_queries"] == 17


def test_named_configurations_have_80_labels():
    config = SparseRCNNConfig.from_name("r101-300")
    assert (config.num_labels, config.num_queries) == (80, 300)
    assert config.backbone_config.backbone == "resnet101.tv_in1k"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_layers": 2}, "encoder_layers must be 0, .* got 2"),
        ({"decoder_attention_heads": 5}, "multiple of decoder_attention_heads, got 256 and 5"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ({"pooling_size": 0}, "pooling_size must be at least 1, got 0"),
        ({"pooling_sampling_ratio": 0}, "pooling_sampling_ratio must be at least 1, got 0"),
        ({"dynamic_dim": 0}, "dynamic_dim must be at least 1, got 0"),
        ({"class_tower_layers": -1}, "class_tower_layers must be at least 0, got -1"),
        ({"box_tower_layers": -1}, "box_tower_layers must be at least 0, got -1"),
        ({"dilation": True}, "last stage has stride 16 .*set dilation=False"),
    ],
)
def test_fields_that_do_not_fit_are_an_error(options, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        SparseRCNNConfig(**options)


def test_backbone_learns_as_fast_as_the_rest():
    groups = parameter_groups(build(), VARIANTS["sparse_rcnn"].recipe)
    assert {group["name"]: group["lr"] for group in groups} == {"main": 2.5e-5, "backbone": 2.5e-5}


# Graphs


def test_exported_program_takes_every_size_beyond_one_coarsest_cell():
    model = perturb(build()).eval()
    batch = torch.export.Dim("batch")
    height, width = (torch.export.Dim(axis, min=33) for axis in ("height", "width"))
    program = torch.export.export(
        model,
        (),
        {
            "pixel_values": torch.randn(2, 3, 130, 165),
            "pixel_mask": torch.ones(2, 130, 165, dtype=torch.int64),
        },
        dynamic_shapes={
            "pixel_values": {0: batch, 2: height, 3: width},
            "pixel_mask": {0: batch, 1: height, 2: width},
        },
    )
    inputs = tiny_batch()
    actual, expected = program.module()(**inputs), forward(model, **inputs)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.pred_boxes, expected.pred_boxes, rtol=1e-4, atol=1e-4)


def test_model_compiles_for_dynamic_sizes():
    model = perturb(build(decoder_layers=1)).model.eval()
    compiled = in_one_graph(model, dynamic=True)
    pixel_values = torch.randn(2, 3, 70, 101)
    with torch.no_grad():
        actual, expected = (each(pixel_values).intermediate_boxes for each in (compiled, model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_hidden_states_hold_the_pyramid_as_tokens():
    outputs = forward(build(), pixel_values=torch.randn(1, 3, 64, 96), output_hidden_states=True)
    (tokens,) = outputs.encoder_hidden_states
    assert tokens.shape == (1, 16 * 24 + 8 * 12 + 4 * 6 + 2 * 3, 32)
