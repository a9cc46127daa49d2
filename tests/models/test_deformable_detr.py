"""Deformable DETR against transformers', against the paper, and what only this paper claims."""

import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from scipy.stats import kstest, uniform
from tiny import (
    NUM_LABELS,
    TINY_BACKBONE,
    in_one_graph,
    no_objects,
    perturb,
    tiny_batch,
    tiny_labels,
)
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss
from transformers import (
    AutoModelForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
)

from hf_querydet import (
    VARIANTS,
    DeformableDETRConfig,
    DeformableDETRForObjectDetection,
    DeformableDETRModel,
    load_detector,
)
from hf_querydet.checkpoint_mapping_utils import weight_renamings
from hf_querydet.models.deformable_detr.checkpoint_mapping import TRANSFORMERS_NAMES

THREE_STAGES = {"backbone_config": {**TINY_BACKBONE, "out_indices": [2, 3, 4]}}
SMALL = {
    "num_labels": NUM_LABELS,
    "num_queries": 7,
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "encoder_n_points": 3,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "decoder_n_points": 2,
    "two_stage_num_proposals": 7,
}
KINDS = {
    "plain": {},
    "refine": {"with_box_refine": True},
    "two-stage": {"with_box_refine": True, "two_stage": True},
}
TIMM = {"model_type": "timm_backbone", "backbone": "test_resnet"}
PEERS = {
    **{kind: {**THREE_STAGES, **options} for kind, options in KINDS.items()},
    "five levels": {**THREE_STAGES, "num_feature_levels": 5},
    "single scale": {"backbone_config": TINY_BACKBONE, "num_feature_levels": 1},
    "timm": {"backbone_config": {**TIMM, "out_indices": [2, 3, 4]}},
    "timm DC5": {
        "backbone_config": {**TIMM, "out_indices": [4], "output_stride": 16},
        "num_feature_levels": 1,
        "dilation": True,
    },
    "learned": {**THREE_STAGES, "position_embedding_type": "learned"},
}
PRIOR_BIAS = -math.log(99)


def build(kind="plain", **changes):
    fields = {**SMALL, **KINDS[kind], "backbone_config": dict(THREE_STAGES["backbone_config"])}
    return DeformableDETRForObjectDetection(DeformableDETRConfig(**fields | changes))


def forward(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs)


def peer(kind):
    """A perturbed detector of transformers."""
    config = DeformableDetrConfig(**{**SMALL, **PEERS[kind]}, auxiliary_loss=False)
    return perturb(DeformableDetrForObjectDetection(config), scale=0.1).eval()


def assert_equal_detections(model, expected_model, **inputs):
    actual, expected = forward(model, **inputs), forward(expected_model, **inputs)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-5)
    # The comparison means something only where queries differ.
    assert expected.pred_boxes.std(1).mean() > 1e-3
    assert expected.logits.std(1).mean() > 1e-3


# ---- the same as transformers --------------------------------------------------------------------


@pytest.mark.parametrize("kind", PEERS)
def test_same_weights_give_the_detections_of_transformers(kind, tmp_path):
    expected = peer(kind)
    expected.save_pretrained(tmp_path)

    model, info = DeformableDETRForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True
    )

    assert not any(info.values())
    assert_equal_detections(model, expected, **tiny_batch())


def test_extra_level_takes_its_padding_from_the_full_mask(tmp_path):
    expected = peer("plain")
    expected.save_pretrained(tmp_path)
    model = DeformableDETRForObjectDetection.from_pretrained(tmp_path)
    # Three rows of cells sample pixel rows 0, 23, 46, two sample 0 and 35: picture or padding.
    pixel_mask = torch.ones(2, 70, 101, dtype=torch.int64)
    pixel_mask[1, 30:] = 0
    batch = {"pixel_values": torch.randn(2, 3, 70, 101), "pixel_mask": pixel_mask}

    assert_equal_detections(model, expected, **batch)


def test_shared_class_head_of_a_refined_file_goes_to_every_layer_silently(tmp_path, caplog):
    peer("refine").save_pretrained(tmp_path)
    caplog.clear()
    assert "class_embed.1.weight" not in load_file(tmp_path / "model.safetensors")

    heads = DeformableDETRForObjectDetection.from_pretrained(tmp_path).model.heads

    assert not caplog.records
    for head in heads[1:]:
        assert torch.equal(head.class_head.weight, heads[0].class_head.weight)
        assert head.class_head.weight is not heads[0].class_head.weight


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_said_about_files_that_are_complete(kind, tmp_path, caplog):
    build(kind).save_pretrained(tmp_path)
    DeformableDETRForObjectDetection.from_pretrained(tmp_path)
    assert not caplog.records


def test_separate_class_heads_of_a_refined_file_stay_separate(tmp_path):
    expected = peer("refine")
    for head in expected.class_embed[1:]:
        for parameter in ("weight", "bias"):
            value = torch.randn_like(getattr(head, parameter)) * 0.1
            setattr(head, parameter, torch.nn.Parameter(value))
    expected.save_pretrained(tmp_path)
    assert "class_embed.2.weight" in load_file(tmp_path / "model.safetensors")

    model = DeformableDETRForObjectDetection.from_pretrained(tmp_path)

    assert_equal_detections(model, expected, **tiny_batch())


@pytest.mark.parametrize("kind", KINDS)
def test_file_of_the_older_layout_loads_completely(kind, tmp_path):
    expected = peer(kind)
    expected.save_pretrained(tmp_path)
    old = {}
    for name, value in expected.state_dict().items():
        # Every copy of a head, under all of its names.
        name = name.replace("backbone.model.", "backbone.conv_encoder.model.")
        name = name.replace(".o_proj.", ".out_proj.").replace(".mlp.fc", ".fc")
        old[name] = value.clone()
    assert "class_embed.2.weight" in old
    assert ("model.decoder.bbox_embed.2.layers.0.weight" in old) == (kind != "plain")
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})

    model, info = DeformableDETRForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True
    )

    assert not any(info.values())
    assert_equal_detections(model, expected, **tiny_batch())


def test_one_head_is_found_under_any_layers_name(tmp_path, caplog):
    expected = peer("plain")
    expected.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    moved = {
        name.replace("class_embed.0.", "class_embed.2.").replace(
            "bbox_embed.0.", "bbox_embed.1."
        ): v
        for name, v in load_file(path).items()
    }
    assert set(moved) != set(load_file(path))
    save_file(moved, path, metadata={"format": "pt"})
    caplog.clear()

    model, info = DeformableDETRForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True
    )

    assert not caplog.records
    assert not any(info.values())
    assert_equal_detections(model, expected, **tiny_batch())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_repository_becomes_one_of_ours_when_saved(kind, tmp_path):
    expected = peer(kind)
    expected.save_pretrained(tmp_path / "theirs")
    VARIANTS["deformable_detr"].image_processor().save_pretrained(tmp_path / "theirs")
    model, _ = load_detector(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")

    reloaded, info = DeformableDETRForObjectDetection.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )

    assert not any(info.values())
    assert reloaded.config.model_type == "querydet_deformable_detr"
    assert_equal_detections(reloaded, expected, **tiny_batch())


def test_model_without_loss_loads_the_same_file(tmp_path):
    peer("two-stage").save_pretrained(tmp_path)
    batch = tiny_batch()

    base, info = DeformableDETRModel.from_pretrained(tmp_path, output_loading_info=True)

    assert not any(info.values())
    expected = forward(DeformableDETRForObjectDetection.from_pretrained(tmp_path), **batch)
    actual = forward(base, **batch)
    torch.testing.assert_close(actual.intermediate_boxes[-1], expected.pred_boxes)


@pytest.mark.parametrize("kind", KINDS)
def test_own_names_are_renamed_by_no_expression(kind):
    names = list(build(kind).state_dict())
    names += build(kind, backbone_config={**TIMM, "out_indices": [2, 3, 4]}).state_dict()
    for renaming in weight_renamings(TRANSFORMERS_NAMES):
        for name in names:
            assert renaming.rename_source_key(name)[0] == name


# ---- the authors, where transformers differs -----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "num_parameters"),
    [
        ({}, 40_069_665),
        (KINDS["refine"], 40_849_660),
        (KINDS["two-stage"], 41_181_529),
        ({"num_feature_levels": 1}, 34_066_593),
        ({"num_feature_levels": 1, "dilation": True}, 34_066_593),
    ],
    ids=["base", "refine", "two-stage", "single-scale", "single-scale-dc5"],
)
def test_number_of_parameters_is_that_of_the_released_models(options, num_parameters):
    config = DeformableDETRConfig(
        num_labels=91, backbone_norm="frozen", frozen_backbone_stages=2, **options
    )
    with torch.device("meta"):
        model = DeformableDETRForObjectDetection(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen == 222_400  # the stem and the first stage


def test_weights_of_matching_and_loss_are_2_5_and_2():
    config = DeformableDETRConfig()
    assert (config.class_cost, config.bbox_cost, config.giou_cost) == (2, 5, 2)
    coefficients = (
        config.cls_loss_coefficient,
        config.bbox_loss_coefficient,
        config.giou_loss_coefficient,
    )
    assert coefficients == (2, 5, 2)
    criterion = build(class_cost=3.0, cls_loss_coefficient=7.0).criterion
    assert (criterion.class_cost, criterion.coefficients["loss_ce"]) == (3.0, 7.0)


def test_class_cost_of_transformers_default_is_not_taken_for_a_choice(tmp_path):
    DeformableDetrConfig(**{**SMALL, **PEERS["plain"]}).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["class_cost"] == 1

    assert DeformableDETRConfig.from_pretrained(tmp_path).class_cost == 2
    assert DeformableDETRConfig.from_pretrained(tmp_path, class_cost=1).class_cost == 1
    DeformableDETRConfig(class_cost=1).save_pretrained(tmp_path)
    assert DeformableDETRConfig.from_pretrained(tmp_path).class_cost == 1


def test_class_heads_of_a_refined_detector_are_not_tied(tmp_path):
    model = build("refine")
    weights = [head.class_head.weight for head in model.model.heads]
    assert len(weights) == 3
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


def test_without_refinement_one_head_serves_all_layers():
    model = perturb(build("plain"))
    outputs = forward(model, **tiny_batch(), labels=tiny_labels())
    assert len(model.model.heads) == 1
    states = outputs.intermediate_hidden_states[:-1]
    expected = model.model.heads[0].class_head(states)
    torch.testing.assert_close(outputs.auxiliary_outputs.logits, expected)


def test_encoder_input_has_no_dropout():
    model = build(dropout=0.9, backbone_norm="frozen")
    batch = tiny_batch()
    expected = forward(model, **batch, output_hidden_states=True).encoder_hidden_states
    actual = model.train()(**batch, output_hidden_states=True).encoder_hidden_states
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)
    assert not torch.allclose(actual[1], expected[1])


def test_states_of_the_layers_come_layer_first():
    outputs = forward(build(), **tiny_batch())
    assert outputs.intermediate_hidden_states.shape == (3, 2, 7, 64)
    assert outputs.intermediate_boxes.shape == (3, 2, 7, 4)


def test_encoder_loss_is_that_of_one_class_of_objects():
    model = perturb(build("two-stage")).double().eval()
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    labels = [tiny_labels()[1], no_objects()]

    outputs = model(**batch, labels=labels)

    # One object, of class 1: the cheapest token is found by trying each, with torchvision's losses.
    logits = outputs.encoder_predictions.logits[0].float()
    boxes = outputs.encoder_predictions.pred_boxes[0, 0].float()
    wanted = labels[0]["boxes"]
    distance = (boxes - wanted).abs().sum(-1)
    giou = generalized_box_iou(
        box_convert(boxes, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy")
    )[:, 0]
    score = logits[0, :, 0]
    positive = sigmoid_focal_loss(score, torch.ones_like(score), alpha=0.25)
    negative = sigmoid_focal_loss(score, torch.zeros_like(score), alpha=0.25)
    best = (2 * (positive - negative) + 5 * distance - 2 * giou).argmin()
    targets = torch.zeros_like(logits)
    targets[0, best, 0] = 1
    expected = {
        "loss_ce_enc": sigmoid_focal_loss(logits, targets, alpha=0.25, reduction="sum"),
        "loss_bbox_enc": distance[best],
        "loss_giou_enc": 1 - giou[best],
    }
    for name, value in expected.items():
        torch.testing.assert_close(outputs.loss_dict[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("auxiliary_loss", [False, True])
def test_loss_is_the_weighted_sum_of_all_terms(auxiliary_loss):
    model = build("two-stage", auxiliary_loss=auxiliary_loss)
    outputs = model(**tiny_batch(), labels=tiny_labels())
    suffixes = ["", "_enc", *(["_0", "_1"] if auxiliary_loss else [])]
    names = {f"loss_{term}{suffix}" for term in ("ce", "bbox", "giou") for suffix in suffixes}
    assert set(outputs.loss_dict) == names
    weights = {"ce": 2, "bbox": 5, "giou": 2}
    expected = sum(weights[name.split("_")[1]] * value for name, value in outputs.loss_dict.items())
    torch.testing.assert_close(outputs.loss, expected)


def test_focal_alpha_enters_the_loss():
    losses = {}
    for alpha in (0.25, 0.5):
        torch.manual_seed(0)
        model = build(focal_alpha=alpha).eval()
        torch.manual_seed(1)
        losses[alpha] = model(**tiny_batch(), labels=tiny_labels()).loss_dict["loss_ce"]
    assert losses[0.25] != losses[0.5]


# ---- first values --------------------------------------------------------------------------------


@pytest.fixture(params=["constructed", "loaded"])
def load(request, tmp_path):
    """Builds a model; or loads it from a file that holds the backbone only."""

    def load(kind):
        model = build(kind)
        if request.param == "constructed":
            return model
        model.config.save_pretrained(tmp_path)
        weights = {name: v for name, v in model.state_dict().items() if ".backbone." in name}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return DeformableDETRForObjectDetection.from_pretrained(tmp_path)

    return load


def assert_uniform(values, bound):
    values = values.detach().flatten().numpy() / bound
    assert abs(values).max() <= 1
    assert kstest(values, uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("kind", "size_biases"),
    [("plain", [-2]), ("refine", [-2, 0, 0]), ("two-stage", [0, 0, 0, 0])],
)
def test_first_values_of_the_heads(kind, size_biases, load):
    heads = load(kind).model.heads
    assert len(heads) == len(size_biases)
    for head, size_bias in zip(heads, size_biases, strict=True):
        torch.testing.assert_close(head.class_head.bias, torch.full((NUM_LABELS,), PRIOR_BIAS))
        assert_uniform(head.class_head.weight, 64**-0.5)
        last = head.box_head.layers[-1]
        assert not last.weight.any()
        assert last.bias.tolist() == [0, 0, size_bias, size_bias]
        assert_uniform(head.box_head.layers[0].weight, 64**-0.5)


def test_first_values_of_projections(load):
    model = load("plain").model
    for (convolution, norm), size_in in zip(
        model.input_projection.levels, (12, 16, 24, 24 * 9), strict=True
    ):
        size_out = 64 * (convolution.kernel_size[0] ** 2)
        assert_uniform(convolution.weight, (6 / (size_in + size_out)) ** 0.5)
        assert not convolution.bias.any()
        assert (norm.weight == 1).all()
        assert not norm.bias.any()
    assert_uniform(model.reference_point_head.weight, (6 / 66) ** 0.5)
    assert not model.reference_point_head.bias.any()


def test_first_values_of_two_stage_projections(load):
    model = load("two-stage").model
    assert_uniform(model.memory_projection.weight, (6 / 128) ** 0.5)
    assert_uniform(model.query_projection.weight, (6 / 256) ** 0.5)


def test_first_values_of_embeddings_and_attention(load):
    model = load("plain").model
    for embeddings in (model.level_embeddings, model.query_embeddings):
        assert 0.8 < embeddings.weight.std() < 1.2
    for layer, name in (
        (model.encoder_layers[1], "self_attention"),
        (model.decoder_layers[2], "cross_attention"),
    ):
        attention = getattr(layer, name)
        assert not attention.sampling_offsets.weight.any()
        assert attention.sampling_offsets.bias.abs().max() == attention.num_points
        assert not attention.attention_weights.weight.any()
        assert_uniform(attention.value_projection.weight, (6 / 128) ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_new_labels_start_with_the_prior_and_keep_objectness(kind, tmp_path):
    model = perturb(build(kind))
    model.save_pretrained(tmp_path)
    id2label = dict(enumerate(["cat", "dog", "owl", "yak", "eel"]))
    ways = (
        DeformableDETRForObjectDetection.from_pretrained(tmp_path, id2label=id2label),
        AutoModelForObjectDetection.from_pretrained(tmp_path, num_labels=5),
    )
    for loaded in ways:
        assert loaded.config.num_labels == 5
        for index, (new, old) in enumerate(zip(loaded.model.heads, model.model.heads, strict=True)):
            new, old = new.class_head, old.class_head
            expected_bias = torch.full((5,), PRIOR_BIAS)
            is_encoder = kind == "two-stage" and index == 3
            if is_encoder:
                expected_bias[0] = old.bias[0]
            torch.testing.assert_close(new.bias, expected_bias)
            assert torch.equal(new.weight[0], old.weight[0]) == is_encoder


def test_objectness_of_a_transformers_file_is_kept(tmp_path):
    theirs = peer("two-stage")
    theirs.save_pretrained(tmp_path)
    loaded, info = DeformableDETRForObjectDetection.from_pretrained(
        tmp_path, num_labels=2, output_loading_info=True
    )
    assert len(info["mismatched_keys"]) == 8
    expected = theirs.class_embed[-1]
    assert torch.equal(loaded.model.heads[-1].class_head.weight[0], expected.weight[0])
    assert torch.equal(loaded.model.heads[-1].class_head.bias[0], expected.bias[0])


# ---- what the paper claims -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "refine"])
def test_permuting_object_queries_permutes_predictions(kind):
    model = perturb(build(kind)).eval()
    batch, order = tiny_batch(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    with torch.no_grad():
        expected = model(**batch)
        embeddings = model.model.query_embeddings.weight
        embeddings.copy_(embeddings[order])
        permuted = model(**batch)
    torch.testing.assert_close(permuted.logits, expected.logits[:, order])
    torch.testing.assert_close(permuted.pred_boxes, expected.pred_boxes[:, order])


def test_with_zero_deltas_refinement_keeps_the_boxes():
    # The first values of the box heads: the first layer places a box, all others leave it there.
    model = build("refine")
    boxes = forward(model, **tiny_batch()).intermediate_boxes
    base = model.model
    positions = base.query_embeddings.weight[:, :64]
    points = base.reference_point_head(positions).sigmoid().expand(2, -1, -1)
    size = torch.full((2, 7, 2), 1 / (1 + math.exp(2)))
    for layer in boxes:
        torch.testing.assert_close(layer, torch.cat([points, size], -1))


def test_with_zero_deltas_two_stage_keeps_its_best_proposals():
    model = build("two-stage")
    outputs = forward(model, pixel_values=torch.randn(1, 3, 64, 96))
    scores = outputs.encoder_predictions.logits[0, 0, :, 0]
    proposals = outputs.encoder_predictions.pred_boxes[0, 0]
    best = sorted(range(len(scores)), key=lambda token: -scores[token])[:7]
    for layer in outputs.intermediate_boxes:
        torch.testing.assert_close(layer[0], proposals[best])


def test_two_stage_ranks_tokens_by_class_0_alone():
    model = perturb(build("two-stage"))
    batch = tiny_batch()
    expected = forward(model, **batch)
    with torch.no_grad():
        model.model.heads[-1].class_head.bias[1:] += 100
    torch.testing.assert_close(forward(model, **batch).pred_boxes, expected.pred_boxes)


def test_references_of_the_next_layer_are_detached():
    model = perturb(build("refine"))
    outputs = model(**tiny_batch())
    outputs.intermediate_boxes[1].sum().backward()
    heads = model.model.heads
    # No "look forward twice": a layer's box trains its own head only.
    assert heads[1].box_head.layers[-1].weight.grad.any()
    assert not heads[0].box_head.layers[-1].weight.grad.any()


def test_proposals_are_detached():
    model = perturb(build("two-stage"))
    outputs = model(**tiny_batch())
    outputs.intermediate_boxes.sum().backward()
    # The encoder's head learns from its own loss only.
    assert model.model.heads[0].box_head.layers[-1].weight.grad.any()
    assert model.model.heads[-1].box_head.layers[-1].weight.grad is None


def test_padding_of_the_levels_does_not_reach_predictions(monkeypatch):
    model = perturb(build("plain")).eval()
    sizes, canvas_sizes = [(5, 3), (3, 2), (2, 1), (1, 1)], [(6, 7), (4, 4), (2, 3), (1, 2)]
    alone, beside, masks = [], [], []
    for (height, width), canvas_size in zip(sizes, canvas_sizes, strict=True):
        alone.append(torch.randn(1, 64, height, width))
        canvas = torch.randn(2, 64, *canvas_size)
        canvas[0, :, :height, :width] = alone[-1][0]
        mask = torch.zeros(2, *canvas_size, dtype=torch.bool)
        mask[0, height:] = mask[0, :, width:] = True
        beside.append(canvas)
        masks.append(mask)

    def run(levels, masks):
        # Below the projections, whose normalisation takes its statistics from padding too.
        monkeypatch.setattr(model.model.input_projection, "forward", lambda _: levels)
        stages = [(None, mask) for mask in masks]
        monkeypatch.setattr(model.model.backbone, "forward", lambda *_: stages)
        return forward(model, pixel_values=torch.zeros(len(levels[0]), 3, 8, 8))

    expected, actual = run(alone, [None] * 4), run(beside, masks)
    torch.testing.assert_close(actual.logits[:1], expected.logits)
    torch.testing.assert_close(actual.pred_boxes[:1], expected.pred_boxes)


def test_attentions_say_where_the_queries_look():
    model = perturb(build("refine"))
    outputs = forward(model, **tiny_batch(), output_attentions=True)
    assert len(outputs.cross_sampling_locations) == 3
    for weights, locations in zip(
        outputs.cross_attentions, outputs.cross_sampling_locations, strict=True
    ):
        assert weights.shape == (2, 2, 7, 4 * 2)
        assert locations.shape == (2, 2, 7, 4 * 2, 2)
    for weights in outputs.encoder_attentions:
        assert weights.shape == (2, 4, 9 * 13 + 5 * 7 + 3 * 4 + 2 * 2, 4 * 3)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


# ---- all three kinds train and run ---------------------------------------------------------------


@pytest.mark.parametrize("decoder_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_finite_gradient(kind, decoder_layers):
    model = build(kind, decoder_layers=decoder_layers).train()
    outputs = model(**tiny_batch(), labels=tiny_labels())
    outputs.loss.backward()
    assert len(outputs.auxiliary_outputs.logits) == decoder_layers - 1
    wrong = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert wrong == []


@pytest.mark.parametrize("kind", ["refine", "two-stage"])
def test_auxiliary_loss_never_changes_the_forward(kind):
    model = perturb(build(kind)).eval()
    batch = tiny_batch()
    expected = model(**batch)
    for auxiliary_loss in (True, False):
        model.config.auxiliary_loss = auxiliary_loss
        actual = model(**batch, labels=tiny_labels())
        torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(actual.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["refine", "two-stage"])
def test_half_precision_trains_with_float32_boxes(kind, dtype):
    model = build(kind).to(dtype).train()
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    outputs = model(**batch, labels=tiny_labels())
    outputs.loss.backward()
    assert (outputs.logits.dtype, outputs.pred_boxes.dtype) == (dtype, torch.float32)
    assert outputs.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_label_without_classes_is_named_in_two_stage():
    labels = tiny_labels()
    del labels[1]["class_labels"]
    with pytest.raises(ValueError, match=r"labels\[1\] has no 'class_labels'"):
        build("two-stage")(**tiny_batch(), labels=labels)


def test_saved_two_stage_detector_gives_equal_outputs(tmp_path):
    model = perturb(build("two-stage"))
    model.save_pretrained(tmp_path)
    loaded, info = DeformableDETRForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    batch = tiny_batch()
    actual, expected = forward(loaded, **batch), forward(model, **batch)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=0)


def test_two_stage_compiles_into_one_graph():
    model = perturb(build("two-stage")).eval()
    batch = tiny_batch()
    compiled = in_one_graph(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).pred_boxes, model(**batch).pred_boxes)


def test_two_stage_exports_with_dynamic_sizes():
    model = perturb(build("two-stage")).eval()
    height, width = torch.export.Dim("height"), torch.export.Dim("width")
    program = torch.export.export(
        model,
        (torch.randn(2, 3, 128, 160),),
        dynamic_shapes={"pixel_values": {2: 32 * height, 3: 32 * width}},
    )
    other = torch.randn(2, 3, 192, 96)
    expected = forward(model, pixel_values=other)
    torch.testing.assert_close(program.module()(other).pred_boxes, expected.pred_boxes)


def test_recipe_slows_the_layers_that_say_where_to_look():
    from hf_querydet.training import parameter_groups

    model = build("plain")
    groups = {
        group["name"]: group
        for group in parameter_groups(model, VARIANTS["deformable_detr"].recipe)
    }
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates == pytest.approx({"main": 2e-4, "backbone": 2e-5, "slow": 2e-5})
    # Weight and bias of two encoder layers, three decoder layers and the reference points.
    assert len(groups["slow"]["params"]) == 2 * (2 + 3 + 1)


# ---- configuration and errors --------------------------------------------------------------------


def test_defaults_are_the_papers_r50():
    config = DeformableDETRConfig()
    assert config.backbone_config.backbone == "resnet50.tv_in1k"
    assert config.backbone_config.out_indices == [-3, -2, -1]
    assert (config.num_queries, config.num_feature_levels) == (300, 4)
    assert (config.encoder_n_points, config.decoder_n_points) == (4, 4)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (1024, 1024)
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.1,) * 3


@pytest.mark.parametrize(("num_levels", "stages"), [(1, [-1]), (2, [-2, -1]), (5, [-3, -2, -1])])
def test_levels_are_the_last_stages_of_the_backbone(num_levels, stages):
    config = DeformableDETRConfig(num_feature_levels=num_levels)
    assert config.backbone_config.out_indices == stages


def test_number_of_queries_follows_the_proposals(tmp_path):
    options = {**KINDS["two-stage"], "two_stage_num_proposals": 50}
    config = DeformableDETRConfig(**options)
    assert config.num_queries == 50
    config.save_pretrained(tmp_path)
    loaded = DeformableDETRConfig.from_pretrained(tmp_path, two_stage_num_proposals=20)
    assert (loaded.num_queries, loaded.two_stage_num_proposals) == (20, 20)
    with pytest.raises(
        StrictDataclassClassValidationError,
        match="num_queries is 20, but with two_stage=True it follows",
    ):
        DeformableDETRConfig.from_pretrained(tmp_path, num_queries=20)
    assert DeformableDETRConfig(two_stage_num_proposals=50).num_queries == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"two_stage": True}, "two_stage=True needs with_box_refine=True"),
        ({"d_model": 48}, "d_model must be a multiple of 32 .*got 48"),
        ({"encoder_attention_heads": 7}, "multiple of encoder_attention_heads, got 256 and 7"),
        ({"decoder_attention_heads": 0}, "multiple of decoder_attention_heads, got 256 and 0"),
        ({"num_feature_levels": 0}, "num_feature_levels must be at least 1, got 0"),
        ({"encoder_n_points": 0}, "encoder_n_points must be at least 1, got 0"),
        ({"decoder_n_points": -1}, "decoder_n_points must be at least 1, got -1"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ({"two_stage_num_proposals": 0}, "two_stage_num_proposals must be at least 1, got 0"),
        ({"position_embedding_type": "rotary"}, "one of .*got 'rotary'"),
    ],
)
def test_fields_that_do_not_fit_are_an_error(options, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        DeformableDETRConfig(**options)


def test_more_proposals_than_tokens_are_an_error():
    model = build("two-stage", two_stage_num_proposals=90)
    with pytest.raises(ValueError, match=r"two_stage_num_proposals is 90, .* only 85 tokens"):
        model(pixel_values=torch.randn(1, 3, 64, 64))
