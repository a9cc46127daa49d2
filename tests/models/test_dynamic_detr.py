"""Dynamic DETR: its decoder by loops, its size by hand, and what only this paper claims."""

import math

import oracles
import pytest
import torch
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
)
from safetensors.torch import save_file
from scipy.stats import kstest, norm, uniform
from tiny import NUM_LABELS, TINY_BACKBONE, perturb, tiny_batch, tiny_config, tiny_labels
from torch.nn import functional as F
from torchvision.ops import box_iou, roi_align

from hf_querydet import (
    VARIANTS,
    DynamicDETRConfig,
    DynamicDETRForObjectDetection,
    DynamicDETRImageProcessor,
)
from hf_querydet.layers.feature_levels import flatten_levels

PRIOR_BIAS = -math.log(99)


def build(**changes):
    return DynamicDETRForObjectDetection(tiny_config(VARIANTS, "dynamic_detr", **changes))


def forward(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs)


def calls_of(modules, run):
    """Arguments and results of all calls of these modules, in order."""
    calls = []
    handles = [
        module.register_forward_hook(lambda _, args, result: calls.append((args, result)))
        for module in modules
    ]
    run()
    for handle in handles:
        handle.remove()
    return calls


def pixel_boxes(boxes_cxcywh, width, height):
    center_x, center_y, box_width, box_height = boxes_cxcywh.unbind(-1)
    left, top = center_x - box_width / 2, center_y - box_height / 2
    right, bottom = center_x + box_width / 2, center_y + box_height / 2
    return torch.stack([left * width, top * height, right * width, bottom * height], dim=-1)


# ---- size ----------------------------------------------------------------------------------------


def linear(size_in, size_out, bias=True):
    return size_in * size_out + bias * size_out


def hand_sum(*, encoder_layers, decoder_layers, filter_size=20, d=256, labels=91):
    resnet50 = 23_454_912  # convolutions; affine terms of frozen batch norm are no parameters
    norm_ = 2 * d
    pyramid = sum(linear(size, d) for size in (512, 1024, 2048)) + 5 * linear(9 * d, d)
    encoder = (
        linear(9 * d, 27)
        + 3 * (9 * d * d + norm_)
        + linear(d, d // 16)
        + linear(d // 16, d)
        + linear(d, d // 4)
        + linear(d // 4, 4 * d)
    )
    decoder = (
        4 * linear(d, d)
        + linear(d, d * filter_size)
        + 2 * filter_size
        + linear(49 * filter_size, d)
        + linear(d, 2048)
        + linear(2048, d)
        + 4 * norm_  # after attention, projection, convolution and feed-forward
        + 4 * (linear(d, d, bias=False) + norm_)  # one hidden layer for classes, three for boxes
        + linear(d, labels)
        + linear(d, 4)
    )
    queries = 300 * (d + 4)
    return resnet50 + pyramid + encoder_layers * encoder + decoder_layers * decoder + queries


@pytest.mark.parametrize(
    ("name", "layers", "millions"),
    [
        ("r50", {"encoder_layers": 6, "decoder_layers": 6}, 58.0),
        ("r50-no-encoder", {"encoder_layers": 0, "decoder_layers": 6}, 46.4),
        ("r50-2-decoder-layers", {"encoder_layers": 6, "decoder_layers": 2}, 45.3),
    ],
)
def test_number_of_parameters_is_the_sum_by_hand(name, layers, millions):
    config = DynamicDETRConfig.from_name(
        name, use_pretrained_backbone=False, backbone_norm="frozen"
    )
    with torch.device("meta"):
        model = DynamicDETRForObjectDetection(config)

    assert model.num_parameters() == hand_sum(**layers)
    assert round(model.num_parameters() / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("dynamic_dim", "millions"), [(16, 56.1), (20, 58.0), (24, 59.8), (64, 78.6)]
)
def test_width_of_the_filter_decides_the_size(dynamic_dim, millions):
    config = DynamicDETRConfig.from_name(
        "r50",
        use_pretrained_backbone=False,
        backbone_norm="frozen",
        num_labels=80,
        dynamic_dim=dynamic_dim,
    )
    with torch.device("meta"):
        size = DynamicDETRForObjectDetection(config).num_parameters()

    assert size == hand_sum(encoder_layers=6, decoder_layers=6, filter_size=dynamic_dim, labels=80)
    assert round(size / 1e6, 1) == millions


# ---- decoder -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic_mode", ["single", "bottleneck"])
def test_decoder_layer_equals_its_loops(dynamic_mode):
    model = perturb(build(dynamic_mode=dynamic_mode)).double().eval()
    layer = model.model.decoder_layers[0]
    levels = [torch.randn(2, 64, *size).double() for size in [(20, 24), (10, 12), (5, 6), (3, 3)]]
    levels.append(torch.randn(2, 64, 2, 2).double())
    queries = torch.randn(2, 5, 64).double()
    # Roots of areas of 60, 200, 500, 800 and 300 pixels: levels 3, 3, 5, 5 and 4.
    boxes = torch.tensor([[10.0, 20, 70, 80], [0, 0, 200, 200], [-40, -30, 460, 470]]).double()
    boxes = torch.cat([boxes, torch.tensor([[0.0, 0, 1600, 400], [50, 40, 350, 340]]).double()])
    sizes = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt().tolist()
    boxes = boxes.expand(2, -1, -1)

    with torch.no_grad():
        output, _ = layer(queries, boxes, *flatten_levels(levels))

    attention, dynamic = layer.self_attention, layer.dynamic_convolution
    reference = torch.nn.MultiheadAttention(64, 2, batch_first=True).double()
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    reference.in_proj_weight.data = torch.cat([layer.weight for layer in projections])
    reference.in_proj_bias.data = torch.cat([layer.bias for layer in projections])
    reference.out_proj.load_state_dict(attention.out_proj.state_dict())
    attended = layer.self_attention_norm(queries + reference(queries, queries, queries)[0])
    read = set()
    for picture in range(2):
        for index, size in enumerate(sizes):
            query = attended[picture, index]
            level = min(max(math.floor(4 + math.log2(size / 224)), 3), 7) - 3
            read.add(level)
            roi = torch.cat([torch.tensor([picture]), boxes[picture, index]])[None]
            region = roi_align(levels[level], roi, 3, 1 / 2 ** (level + 3), 2, aligned=True)
            positions = region[0].flatten(1).T  # (9, 64)
            weights = dynamic.filter_generator(query)
            filtered = F.layer_norm(positions @ weights[: 64 * 6].view(64, 6), [6])
            scale, shift = dynamic.norms[0].weight, dynamic.norms[0].bias
            filtered = (filtered * scale + shift).relu()
            if dynamic_mode == "bottleneck":
                back = weights[64 * 6 :].view(6, 64)
                filtered = dynamic.norms[1](filtered @ back).relu()
            vector = dynamic.output_norm(dynamic.output_projection(filtered.flatten())).relu()
            query = layer.dynamic_convolution_norm(query + vector)
            block = layer.feed_forward
            update = block.contract(block.expand(query).relu())
            torch.testing.assert_close(output[picture, index], block.norm(query + update))
    assert read == {0, 1, 2}


def test_dynamic_dim_of_d_model_makes_a_full_matrix():
    generator = build(dynamic_dim=64).model.decoder_layers[0].dynamic_convolution.filter_generator
    assert generator.out_features == 64 * 64


def test_boxes_stay_where_the_deltas_are_zero():
    model = build()
    for head in model.model.heads:
        torch.nn.init.zeros_(head.box_head.weight)
        torch.nn.init.zeros_(head.box_head.bias)
    boxes = torch.tensor([0.3, 0.6, 0.2, 0.5]).expand(5, -1).clone()
    model.model.query_boxes.weight.data = boxes

    outputs = forward(model, **tiny_batch())

    # Relative to each picture, whose sizes differ.
    torch.testing.assert_close(outputs.intermediate_boxes, boxes.expand(2, 2, 5, 4))
    torch.testing.assert_close(outputs.pred_boxes, boxes.expand(2, 5, 4))


def test_each_layer_looks_at_the_boxes_of_the_one_before():
    model = build(decoder_layers=3)
    kept = {}
    calls = calls_of(
        model.model.decoder_layers, lambda: kept.update(forward(model, **tiny_batch()))
    )

    learned = model.model.query_boxes.weight.detach()
    assert torch.equal(learned, torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(5, -1))
    looked_at = [learned.expand(2, -1, -1), *kept["intermediate_boxes"][:-1]]
    # Width and height of the two pictures.
    for (arguments, _), boxes in zip(calls, looked_at, strict=True):
        for picture, (width, height) in enumerate([(64, 70), (101, 45)]):
            expected = pixel_boxes(boxes[picture], width, height)
            torch.testing.assert_close(arguments[1][picture], expected, rtol=1e-5, atol=1e-3)


def test_boxes_follow_from_deltas_by_hand():
    model = build(decoder_layers=1)
    head = model.model.heads[0].box_head
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([0.2, -0.4, math.log(0.5), math.log(2)])

    boxes = forward(model, **tiny_batch()).pred_boxes

    # From the whole picture: half of each shift, half the width, twice the height.
    torch.testing.assert_close(boxes, torch.tensor([0.6, 0.3, 0.5, 2.0]).expand(2, 5, -1))


def test_learned_boxes_are_trained_by_the_first_layer_only():
    model = build(auxiliary_loss=True).train()
    outputs = model.model(**tiny_batch())
    gradients = [
        torch.autograd.grad(
            boxes.square().sum(),
            model.model.query_boxes.weight,
            retain_graph=True,
            allow_unused=True,
        )[0]
        for boxes in outputs.intermediate_boxes.unbind()
    ]
    assert gradients[0].abs().sum() > 0
    assert not any(gradient.abs().sum() for gradient in gradients[1:])


def test_queries_are_not_detached_between_layers():
    model = perturb(build()).train()
    boxes = model.model(**tiny_batch()).intermediate_boxes
    weight = model.model.query_embeddings.weight
    (gradient,) = torch.autograd.grad(boxes[-1].square().sum(), weight)
    assert gradient.abs().sum() > 0


def test_permuting_queries_permutes_predictions():
    model = perturb(build())
    batch, order = tiny_batch(), torch.tensor([3, 0, 4, 1, 2])
    expected = forward(model, **batch)

    for table in (model.model.query_embeddings, model.model.query_boxes):
        table.weight.data = table.weight.data[order]
    permuted = forward(model, **batch)

    torch.testing.assert_close(permuted.logits, expected.logits[:, order], rtol=0, atol=1e-4)


# ---- canvas and levels ---------------------------------------------------------------------------


def test_canvas_is_padded_to_multiples_of_32():
    model = perturb(build())
    batch = tiny_batch()  # 70 x 101
    padding = (0, 128 - 101, 0, 96 - 70)
    padded = {name: F.pad(values, padding) for name, values in batch.items()}

    actual, expected = forward(model, **batch), forward(model, **padded)

    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.intermediate_boxes, expected.intermediate_boxes)


def test_picture_on_an_equal_canvas_is_independent_of_its_batch():
    model = perturb(build(decoder_layers=2))
    batch = tiny_batch()
    together = forward(model, **batch)

    alone = forward(model, **{name: values[1:] for name, values in batch.items()})

    torch.testing.assert_close(alone.logits, together.logits[1:], rtol=1e-4, atol=1e-4)


def test_size_without_a_mask_is_that_before_padding_the_canvas():
    model = build()
    pixel_values = torch.randn(1, 3, 70, 101)
    mask = torch.ones(1, 70, 101, dtype=torch.int64)

    actual = forward(model, pixel_values=pixel_values)
    expected = forward(model, pixel_values=pixel_values, pixel_mask=mask)

    assert torch.equal(actual.pred_boxes, expected.pred_boxes)


@pytest.mark.parametrize(
    ("feature_levels", "stages", "cells"),
    [
        ("p3-p7", [2, 3, 4], [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]),
        ("p2-p6", [1, 2, 3, 4], [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]),
    ],
)
@pytest.mark.parametrize("encoder_layers", [0, 1])
def test_decoder_reads_five_levels(feature_levels, stages, cells, encoder_layers):
    model = build(
        feature_levels=feature_levels,
        backbone_config={**TINY_BACKBONE, "out_indices": stages},
        encoder_layers=encoder_layers,
    )
    calls = calls_of(model.model.decoder_layers[:1], lambda: forward(model, **tiny_batch()))

    _, _, tokens, spatial_shapes = calls[0][0]
    assert spatial_shapes == cells
    assert tokens.shape[1] == sum(height * width for height, width in cells)
    stride = model.model.decoder_layers[0].finest_level
    assert 2**stride == 96 // cells[0][0]


def test_without_encoder_the_decoder_reads_the_feature_pyramid():
    model = build(encoder_layers=0)
    outputs = {}

    def run():
        outputs.update(forward(model, **tiny_batch(), output_hidden_states=True))

    ((_, pyramid),) = calls_of([model.model.feature_pyramid], run)

    tokens = torch.cat([level.flatten(2) for level in pyramid], dim=2).transpose(1, 2)
    assert torch.equal(outputs["encoder_last_hidden_state"], tokens)
    assert len(outputs["encoder_hidden_states"]) == 1


def test_memory_is_what_the_last_encoder_layer_returns():
    model = build(encoder_layers=2)
    outputs = {}

    def run():
        outputs.update(forward(model, **tiny_batch(), output_hidden_states=True))

    calls = calls_of(model.model.encoder_layers, run)

    for (_, levels), tokens in zip(calls, outputs["encoder_hidden_states"][1:], strict=True):
        expected = torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)
        assert torch.equal(tokens, expected)
    assert torch.equal(outputs["encoder_last_hidden_state"], expected)


@pytest.mark.parametrize(
    "stages",
    [[1, 2, 3], [3, 4], [1, 2, 3, 4]],
    ids=["too fine", "too few", "too many"],
)
def test_stages_of_other_strides_are_an_error(stages):
    model = build(backbone_config={**TINY_BACKBONE, "out_indices": stages})
    message = r"The backbone must give maps of strides \[8, 16, 32\], got "
    with pytest.raises(ValueError, match=message + r".*\(96, 128\) pixels; set out_indices"):
        model(**tiny_batch())


def test_levels_decide_the_stages_of_a_named_backbone():
    config = DynamicDETRConfig(backbone="resnet18", feature_levels="p2-p6")
    assert config.backbone_config.out_indices == [-4, -3, -2, -1]
    assert DynamicDETRConfig(backbone="resnet18").backbone_config.out_indices == [-3, -2, -1]


# ---- classification and loss ---------------------------------------------------------------------


@pytest.mark.parametrize("use_focal", [True, False])
def test_loss_terms_of_every_layer_equal_those_by_definition(use_focal):
    model = perturb(build(use_focal=use_focal, focal_alpha=0.4, eos_coefficient=0.3))
    model.eval()
    labels = tiny_labels()
    with torch.no_grad():
        outputs = model(**tiny_batch(), labels=labels)

    assert outputs.logits.shape[-1] == NUM_LABELS + (not use_focal)
    layers = [
        *zip(outputs.auxiliary_outputs.logits, outputs.auxiliary_outputs.pred_boxes, strict=True),
        (outputs.logits, outputs.pred_boxes),
    ]
    weight = 2.0 if use_focal else 1.0
    total = 0.0
    for index, (logits, boxes) in enumerate(layers):
        expected = oracles.set_loss(
            logits.double(),
            boxes.double(),
            labels,
            class_cost=weight,
            bbox_cost=5.0,
            giou_cost=2.0,
            no_object_weight=None if use_focal else 0.3,
            alpha=0.4,
        )
        suffix = "" if index == len(layers) - 1 else f"_{index}"
        for name, value in expected.items():
            assert outputs.loss_dict[name + suffix].item() == pytest.approx(value, rel=1e-4)
        total += weight * expected["loss_ce"]
        total += 5 * expected["loss_bbox"] + 2 * expected["loss_giou"]
    assert outputs.loss.item() == pytest.approx(total, rel=1e-4)


def test_class_weights_can_be_chosen():
    config = DynamicDETRConfig(class_cost=3.0, cls_loss_coefficient=0.5)
    assert (config.class_cost, config.cls_loss_coefficient) == (3.0, 0.5)


def test_softmax_detector_trains_and_is_read_by_its_processor():
    model = build(use_focal=False).train()
    outputs = model(**tiny_batch(), labels=tiny_labels())
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    processor = DynamicDETRImageProcessor.for_config(model.config)
    (found, _) = processor.post_process_object_detection(outputs, 0.0)

    assert len(found["labels"]) == 5
    assert found["labels"].max() < NUM_LABELS


# ---- first values --------------------------------------------------------------------------------


def assert_uniform(values, bound):
    values = values.detach().flatten().numpy() / bound
    assert abs(values).max() <= 1
    assert kstest(values, uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.fixture(params=["constructed", "loaded"])
def fresh(request, tmp_path):
    """A new model, as constructed and as built on the meta device without weights of its own."""
    model = build()
    if request.param == "loaded":
        model.config.save_pretrained(tmp_path)
        weights = {name: v for name, v in model.state_dict().items() if ".backbone." in name}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model = DynamicDETRForObjectDetection.from_pretrained(tmp_path)
    return model


def test_encoder_starts_without_offsets_and_as_relu(fresh):
    for layer in fresh.model.encoder_layers:
        for parameter in (
            *layer.offsets.convolution.parameters(),
            *layer.activation.coefficients.parameters(),
        ):
            assert not parameter.any()


def test_deformable_convolutions_start_normal(fresh):
    for layer in fresh.model.encoder_layers:
        for convolution in (layer.middle, layer.finer, layer.coarser):
            values = convolution.weight.detach().flatten()[::7].numpy()
            assert kstest(values, norm(scale=0.01).cdf).pvalue > 1e-3


def test_queries_start_normal_and_on_the_whole_picture(fresh):
    values = fresh.model.query_embeddings.weight.detach().flatten().numpy()
    assert kstest(values, norm.cdf).pvalue > 1e-3
    boxes = fresh.model.query_boxes.weight
    assert torch.equal(boxes, torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(5, -1))


def test_matrices_of_heads_and_dynamic_convolution_are_xavier(fresh):
    for layer, head in zip(fresh.model.decoder_layers, fresh.model.heads, strict=True):
        dynamic = layer.dynamic_convolution
        for linear_layer in (
            dynamic.filter_generator,
            dynamic.output_projection,
            *head.class_tower.layers,
            *head.box_tower.layers,
            head.class_head,
            head.box_head,
        ):
            assert_uniform(linear_layer.weight, (6 / sum(linear_layer.weight.shape)) ** 0.5)


def test_classes_start_at_the_prior_with_focal_loss_only(fresh):
    for head in fresh.model.heads:
        torch.testing.assert_close(head.class_head.bias, torch.full((3,), PRIOR_BIAS))
    for head in build(use_focal=False).model.heads:
        assert head.class_head.bias.abs().max() <= 64**-0.5


def test_feature_pyramid_starts_without_biases(fresh):
    pyramid = fresh.model.feature_pyramid
    assert len(pyramid.extra_convolutions) == 2
    for convolution in pyramid.extra_convolutions:
        assert_uniform(convolution.weight[::3], (3 / (64 * 9)) ** 0.5)
        assert not convolution.bias.any()


# ---- learning ------------------------------------------------------------------------------------


def scenes():
    """Three grey pictures, each with one or two coloured rectangles, and what is on them."""
    objects = [
        [(0, (8, 8, 40, 48))],
        [(1, (30, 20, 60, 58)), (0, (4, 4, 24, 20))],
        [(2, (10, 30, 50, 60))],
    ]
    pictures, labels = torch.randn(3, 3, 64, 64) * 0.1, []
    for picture, found in zip(pictures, objects, strict=True):
        boxes = []
        for label, (left, top, right, bottom) in found:
            picture[label, top:bottom, left:right] += 2.0
            boxes.append([left + right, top + bottom, 2 * (right - left), 2 * (bottom - top)])
        labels.append(
            {
                "class_labels": torch.tensor([label for label, _ in found]),
                "boxes": torch.tensor(boxes) / 128,
            }
        )
    return pictures, labels


def test_a_few_pictures_are_learned_by_heart():
    model = build().train()
    pictures, labels = scenes()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(150):
        # With a decay at the end, or the last boxes depend on how the machine rounds.
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (150 - step) / 75)
        loss = model(pixel_values=pictures, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    # In training mode: batch norm of so few pictures.
    outputs = model(pixel_values=pictures)
    results = DynamicDETRImageProcessor().post_process_object_detection(outputs, 0.4)
    for found, label in zip(results, labels, strict=True):
        assert sorted(found["labels"].tolist()) == sorted(label["class_labels"].tolist())
        overlaps = box_iou(found["boxes"], pixel_boxes(label["boxes"], 1, 1))
        best, target = overlaps.max(1)
        assert best.min() > 0.8
        assert torch.equal(label["class_labels"][target], found["labels"])


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_levels": "p4-p8"}, r"one of \('p3-p7', 'p2-p6'\), got 'p4-p8'"),
        ({"offset_source": "finest"}, r"offset_source .* \('middle', 'own'\), got 'finest'"),
        ({"scale_attention": "none"}, r"scale_attention .* \('channel', 'scalar'\), got 'none'"),
        ({"encoder_activation": "gelu"}, r"\('dynamic_relu', 'relu'\), got 'gelu'"),
        ({"dynamic_mode": "full"}, r"dynamic_mode .* \('single', 'bottleneck'\), got 'full'"),
        ({"decoder_attention_heads": 7}, "multiple of decoder_attention_heads, got 256 and 7"),
        ({"decoder_attention_heads": 0}, "multiple of decoder_attention_heads, got 256 and 0"),
        ({"d_model": 40}, "d_model must be a multiple of 16 .*got 40"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ({"encoder_layers": -1}, "encoder_layers must be at least 0, got -1"),
        ({"pooling_size": 0}, "pooling_size must be at least 1, got 0"),
        ({"pooling_sampling_ratio": 0}, "pooling_sampling_ratio must be at least 1, got 0"),
        ({"dynamic_dim": 0}, "dynamic_dim must be at least 1, got 0"),
    ],
)
def test_fields_that_do_not_fit_are_an_error(options, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        DynamicDETRConfig(**options)


def test_dilated_backbone_is_an_error():
    message = r"last stage has stride 16 \(dilation=True makes it 16\).*set dilation=False"
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        DynamicDETRConfig(dilation=True)
