"""Efficient DETR: what only this paper claims, each against a computation of its own."""

import math

import oracles
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from scipy.stats import kstest, uniform
from tiny import NUM_LABELS, TINY_BACKBONE, no_objects, perturb, tiny_batch, tiny_labels

from hf_querydet import (
    VARIANTS,
    EfficientDETRConfig,
    EfficientDETRForObjectDetection,
    EfficientDETRImageProcessor,
)
from hf_querydet.models.efficient_detr.configuration_efficient_detr import (
    QUERY_INITS,
    REFERENCE_POINT_INITS,
)
from hf_querydet.models.efficient_detr.modeling_efficient_detr import initial_reference_points
from hf_querydet.outputs import SetPredictions

SMALL = {
    "backbone_config": {**TINY_BACKBONE, "out_indices": [2, 3, 4]},
    "num_labels": NUM_LABELS,
    "num_queries": 9,
    "d_model": 64,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "encoder_n_points": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "decoder_n_points": 2,
}
LEARNABLE = {"reference_point_init": "learnable", "query_init": "learnable"}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
COSTS = {"class_cost": 2.0, "bbox_cost": 5.0, "giou_cost": 2.0}
every_reference = pytest.mark.parametrize("reference_point_init", REFERENCE_POINT_INITS)
every_query = pytest.mark.parametrize("query_init", QUERY_INITS)


def build(**changes):
    return EfficientDETRForObjectDetection(EfficientDETRConfig(**SMALL | changes))


def forward(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs)


def best_first(dense, picture):
    """Usable tokens of a picture by their highest class score."""
    scores = dense.logits[0, picture].max(-1).values.tolist()
    usable = [token for token, fits in enumerate(dense.is_usable[picture].tolist()) if fits]
    return sorted(usable, key=lambda token: -scores[token])


# ---- the dense part chooses the queries ----------------------------------------------------------


def test_queries_are_the_tokens_with_the_highest_class_score():
    model = perturb(build())
    outputs = forward(model, **tiny_batch(), output_hidden_states=True)

    dense, memory = outputs.encoder_predictions, outputs.encoder_last_hidden_state
    for picture in range(2):
        tokens = best_first(dense, picture)[:9]
        boxes = [dense.pred_boxes[0, picture, token] for token in tokens]
        torch.testing.assert_close(outputs.reference_boxes[picture], torch.stack(boxes))
        contents = [memory[picture, token] for token in tokens]
        torch.testing.assert_close(outputs.decoder_hidden_states[0][picture], torch.stack(contents))
    assert outputs.usable_queries.all()


def test_unusable_tokens_are_chosen_only_after_all_others_and_none_twice():
    model = build(num_queries=6)
    is_usable = torch.tensor([[True, False] * 5, [False] * 7 + [True] * 3])
    logits = torch.randn(1, 2, 10, NUM_LABELS)
    logits[0, ~is_usable] += 100.0
    dense = SetPredictions(logits=logits, pred_boxes=torch.rand(1, 2, 10, 4), is_usable=is_usable)

    best, usable_queries = model.model._best_tokens(dense)

    assert best[0].tolist()[:5] == best_first(dense, 0)
    assert best[1].tolist()[:3] == best_first(dense, 1)
    assert usable_queries.tolist() == [[True] * 5 + [False], [True] * 3 + [False] * 3]
    assert all(len(set(row)) == 6 for row in best.tolist())


def test_more_queries_start_with_the_same_boxes():
    model = perturb(build(num_queries=100))
    pixel_values = torch.randn(1, 3, 160, 192)
    few = forward(model, pixel_values=pixel_values).reference_boxes
    model.config.num_proposals = 300
    many = forward(model, pixel_values=pixel_values).reference_boxes
    assert (few.shape[1], many.shape[1]) == (100, 300)
    torch.testing.assert_close(many[:, :100], few, rtol=0, atol=0)


def test_dense_boxes_are_the_anchors_where_deltas_are_zero():
    dense = forward(build(), pixel_values=torch.randn(1, 3, 64, 96)).encoder_predictions
    # The first values of the box head; levels of 8x12, 4x6, 2x3 and 1x2 cells.
    expected = [
        [(column + 0.5) / width, (row + 0.5) / height, 0.05 * 2**level, 0.05 * 2**level]
        for level, (height, width) in enumerate([(8, 12), (4, 6), (2, 3), (1, 2)])
        for row in range(height)
        for column in range(width)
    ]
    torch.testing.assert_close(dense.pred_boxes[0, 0], torch.tensor(expected))
    assert dense.is_usable.all()


def test_with_zero_deltas_every_layer_keeps_the_reference_boxes():
    outputs = forward(build(decoder_layers=3), **tiny_batch())
    for layer in outputs.intermediate_boxes:
        torch.testing.assert_close(layer, outputs.reference_boxes)


def test_padded_tokens_are_not_usable():
    outputs = forward(perturb(build()), **tiny_batch())
    # Rows of cells with picture in the first level: 45 of 70 pixels, 9 cells sample every 7.8th.
    first_level = outputs.encoder_predictions.is_usable[1, : 9 * 13].view(9, 13)
    assert first_level[:6].all()
    assert not first_level[6:].any()


# ---- gradients -----------------------------------------------------------------------------------


def test_reference_boxes_are_detached_and_query_features_are_not():
    model = perturb(build())
    outputs = model(**tiny_batch(), output_hidden_states=True)
    assert outputs.encoder_predictions.pred_boxes.requires_grad
    assert not outputs.reference_boxes.requires_grad
    contents = outputs.decoder_hidden_states[0]
    weight = model.model.encoder_layers[0].feed_forward.expand.weight
    (gradient,) = torch.autograd.grad(contents.square().sum(), weight)
    assert gradient.any()


def test_sparse_predictions_do_not_train_the_dense_head():
    model = perturb(build(share_head=False))
    outputs = model(**tiny_batch())
    (outputs.pred_boxes.sum() + outputs.logits.sum()).backward()
    dense_part = (*model.model.heads[-1].parameters(), *model.model.memory_projection.parameters())
    assert all(parameter.grad is None for parameter in dense_part)
    assert model.model.heads[0].class_head.weight.grad.any()


def test_boxes_are_detached_between_decoder_layers():
    model = perturb(build(decoder_layers=2, share_head=False))
    model(**tiny_batch()).intermediate_boxes[1].sum().backward()
    heads = model.model.heads
    assert heads[1].box_head.layers[-1].weight.grad.any()
    assert not heads[0].box_head.layers[-1].weight.grad.any()


# ---- losses --------------------------------------------------------------------------------------


def small_padded_batch():
    """Few enough tokens for an oracle that tries all assignments."""
    pixel_mask = torch.ones(2, 48, 64, dtype=torch.int64)
    pixel_mask[1, 30:] = 0
    return {"pixel_values": torch.randn(2, 3, 48, 64), "pixel_mask": pixel_mask}


def assert_terms(loss_dict, suffix, logits, boxes, labels):
    expected = oracles.set_loss(logits, boxes, labels, **COSTS)
    for name, value in expected.items():
        assert loss_dict[name + suffix].item() == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("labels", [tiny_labels(), [no_objects(), tiny_labels()[0]]])
def test_dense_loss_is_the_set_loss_of_the_usable_tokens(labels):
    model = perturb(build()).eval()
    outputs = model(**small_padded_batch(), labels=labels)
    dense = outputs.encoder_predictions
    usable = dense.is_usable
    assert usable[0].sum() > usable[1].sum()
    assert_terms(
        outputs.loss_dict,
        "_enc",
        [dense.logits[0, picture, usable[picture]] for picture in range(2)],
        [dense.pred_boxes[0, picture, usable[picture]] for picture in range(2)],
        labels,
    )


def test_object_is_matched_to_a_usable_token_even_where_a_padded_one_has_its_box():
    model = perturb(build()).eval()
    batch = small_padded_batch()
    dense = forward(model, **batch).encoder_predictions
    usable = dense.is_usable[1]
    boxes = dense.pred_boxes[0, 1, ~usable][:1]
    labels = [no_objects(), {"class_labels": torch.tensor([0]), "boxes": boxes}]

    terms = model(**batch, labels=labels).loss_dict

    distances = [oracles.l1(box, boxes[0].tolist()) for box in dense.pred_boxes[0, 1].tolist()]
    of_usable = [
        distance for distance, fits in zip(distances, usable.tolist(), strict=True) if fits
    ]
    assert min(distances) == 0
    assert terms["loss_bbox_enc"] >= min(of_usable) > 0


def test_unusable_tokens_get_no_gradient_from_the_dense_loss():
    model = perturb(build()).eval()
    outputs = model(**small_padded_batch(), labels=tiny_labels())
    dense = outputs.encoder_predictions
    weights = model.criterion.coefficients
    loss = sum(
        weights[name[:-4]] * outputs.loss_dict[name]
        for name in outputs.loss_dict
        if name.endswith("_enc")
    )
    gradients = torch.autograd.grad(loss, [dense.logits, dense.pred_boxes])
    for gradient in gradients:
        assert not gradient[0, ~dense.is_usable].any()
    assert gradients[0][0, dense.is_usable].all()


@pytest.mark.parametrize("decoder_layers", [1, 2, 6])
def test_sparse_loss_is_the_set_loss_of_every_layer(decoder_layers):
    model = perturb(build(decoder_layers=decoder_layers, num_queries=4)).eval()
    labels = tiny_labels()
    outputs = model(**tiny_batch(), labels=labels)
    auxiliary = outputs.auxiliary_outputs
    assert len(auxiliary.logits) == decoder_layers - 1
    for layer in range(decoder_layers - 1):
        suffix = f"_{layer}"
        logits, boxes = auxiliary.logits[layer], auxiliary.pred_boxes[layer]
        assert_terms(outputs.loss_dict, suffix, logits, boxes, labels)
    assert_terms(outputs.loss_dict, "", outputs.logits, outputs.pred_boxes, labels)
    terms = {f"loss_{term}" for term in ("ce", "bbox", "giou")}
    suffixes = ["", "_enc", *(f"_{layer}" for layer in range(decoder_layers - 1))]
    assert set(outputs.loss_dict) == {term + suffix for term in terms for suffix in suffixes}


@pytest.mark.parametrize("auxiliary_loss", [False, True])
def test_loss_is_the_weighted_sum_of_both_parts(auxiliary_loss):
    model = perturb(build(decoder_layers=2, auxiliary_loss=auxiliary_loss))
    outputs = model(**tiny_batch(), labels=tiny_labels())
    weights = {"ce": 2, "bbox": 5, "giou": 2}
    expected = sum(weights[name.split("_")[1]] * value for name, value in outputs.loss_dict.items())
    torch.testing.assert_close(outputs.loss, expected)
    assert len(outputs.loss_dict) == (9 if auxiliary_loss else 6)


# ---- fewer usable tokens than queries ------------------------------------------------------------

SIZES, CANVAS_SIZES = [(3, 2), (2, 1), (1, 1), (1, 1)], [(4, 6), (3, 3), (2, 2), (1, 2)]


@pytest.fixture
def run_levels(monkeypatch):
    """Run a model below the projections, whose normalisation takes statistics from padding."""

    def run(model, levels, masks):
        monkeypatch.setattr(model.model.input_projection, "forward", lambda _: levels)
        stages = [(None, mask) for mask in masks]
        monkeypatch.setattr(model.model.backbone, "forward", lambda *_: stages)
        return forward(model, pixel_values=torch.zeros(len(levels[0]), 3, 8, 8))

    return run


def alone_and_beside():
    """Levels of a small picture, and the same ones in a batch with a larger picture."""
    alone, beside, masks = [], [], []
    for (height, width), canvas_size in zip(SIZES, CANVAS_SIZES, strict=True):
        alone.append(torch.randn(1, 64, height, width))
        canvas = torch.randn(2, 64, *canvas_size)
        canvas[0, :, :height, :width] = alone[-1][0]
        mask = torch.zeros(2, *canvas_size, dtype=torch.bool)
        mask[0, height:] = mask[0, :, width:] = True
        beside.append(canvas)
        masks.append(mask)
    return alone, beside, masks


@every_query
@pytest.mark.parametrize("reference_point_init", ["dense", "border"])
@pytest.mark.parametrize("num_queries", [4, 25])
def test_predictions_do_not_depend_on_the_batch(
    reference_point_init, query_init, num_queries, run_levels
):
    model = perturb(
        build(
            reference_point_init=reference_point_init,
            query_init=query_init,
            num_queries=num_queries,
            decoder_layers=2,
        )
    )
    alone, beside, masks = alone_and_beside()

    expected, actual = run_levels(model, alone, [None] * 4), run_levels(model, beside, masks)

    # 6 + 2 + 1 + 1 tokens of the small picture, all usable.
    num_expected = min(num_queries, 10)
    if "dense" not in (reference_point_init, query_init):
        num_expected = num_queries
    else:
        assert actual.usable_queries.sum(1).tolist() == [num_expected, num_queries]
        assert expected.usable_queries.all()
    assert expected.logits.shape[1] == num_expected
    torch.testing.assert_close(actual.logits[:1, :num_expected], expected.logits)
    torch.testing.assert_close(actual.pred_boxes[:1, :num_expected], expected.pred_boxes)


def test_queries_that_there_are_not_are_never_detected(run_levels):
    model = perturb(build(num_queries=25))
    _, beside, masks = alone_and_beside()
    outputs = run_levels(model, beside, masks)
    missing = ~outputs.usable_queries
    assert missing[0].tolist() == [False] * 10 + [True] * 15
    assert (outputs.logits[missing] == torch.finfo(torch.float32).min).all()
    detections = EfficientDETRImageProcessor().post_process_object_detection(outputs, 0.0)
    assert len(detections[0]["scores"]) == 10 * NUM_LABELS
    assert len(detections[1]["scores"]) == 25 * NUM_LABELS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_more_objects_than_queries_train(dtype):
    model = build(num_queries=200).to(dtype).train()
    pixel_values = torch.randn(2, 3, 64, 96, dtype=dtype)
    pixel_mask = torch.ones(2, 64, 96, dtype=torch.int64)
    pixel_mask[0, 32:] = 0
    boxes = torch.rand(140, 4) * 0.5 + 0.2
    label = {"class_labels": torch.randint(NUM_LABELS, (140,)), "boxes": boxes}

    outputs = model(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=[label, label])
    outputs.loss.backward()

    # Half the tokens of three levels, and all of the last one's single row.
    assert outputs.usable_queries.sum(1).tolist() == [4 * 12 + 2 * 6 + 3 + 2, 96 + 24 + 6 + 2]
    assert outputs.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_the_100_best_pairs_of_query_and_class_are_detected():
    outputs = SetPredictions(logits=torch.randn(1, 60, 4), pred_boxes=torch.rand(1, 60, 4))
    (found,) = EfficientDETRImageProcessor().post_process_object_detection(outputs, 0.0)
    expected = sorted(map(oracles.sigmoid, outputs.logits.flatten().tolist()), reverse=True)
    torch.testing.assert_close(found["scores"], torch.tensor(expected[:100]))


# ---- where queries start -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("grid", [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]),
        ("center", [(0.5, 0.5)] * 4),
        ("border", [(0, 0), (1, 0), (1, 1), (0, 1)]),
        ("border", [(0, 0), (0.5, 0), (1, 0), (1, 0.5), (1, 1), (0.5, 1), (0, 1), (0, 0.5)]),
        ("border", [(0, 0), (0.8, 0), (1, 0.6), (0.6, 1), (0, 0.8)]),
    ],
)
def test_points_lie_where_their_name_says(kind, expected):
    points = initial_reference_points(kind, len(expected), torch.device("cpu"))
    torch.testing.assert_close(points, torch.tensor([expected], dtype=torch.float32))


@every_query
@pytest.mark.parametrize("kind", ["grid", "center", "border", "learnable"])
def test_queries_start_at_the_points(kind, query_init):
    model = build(reference_point_init=kind, query_init=query_init)
    outputs = forward(model, **tiny_batch())
    if kind == "learnable":
        embeddings = model.model.reference_point_embeddings.weight.tolist()
        points = torch.tensor([[[oracles.sigmoid(value) for value in row] for row in embeddings]])
    else:
        points = initial_reference_points(kind, 9, torch.device("cpu"))
    torch.testing.assert_close(outputs.reference_points, points.expand(2, -1, -1))
    assert outputs.reference_boxes is None
    # First values: no deltas, and a side of 1 / (1 + e^2).
    side = torch.full((2, 9, 2), 1 / (1 + math.exp(2)))
    expected = torch.cat([points.expand(2, -1, -1), side], dim=-1)
    torch.testing.assert_close(outputs.pred_boxes, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["dense", "center"])
def test_learnable_queries_are_the_same_for_every_picture(kind):
    model = build(reference_point_init=kind, query_init="learnable")
    states = forward(model, **tiny_batch(), output_hidden_states=True).decoder_hidden_states
    expected = model.model.query_embeddings.weight.expand(2, -1, -1)
    torch.testing.assert_close(states[0], expected)


@every_reference
def test_positions_of_queries_are_sines_of_their_references(reference_point_init):
    model = perturb(build(reference_point_init=reference_point_init)).model
    size = 4 if reference_point_init == "dense" else 2
    references = torch.rand(2, 3, size)

    positions = model._positions(references, torch.float32)

    features = torch.zeros(2, 3, size * 32)
    for picture in range(2):
        for query in range(3):
            for coordinate in range(size):
                angle = references[picture, query, coordinate].item() * 2 * math.pi
                for pair in range(16):
                    value = angle / 10000 ** (2 * pair / 32)
                    place = coordinate * 32 + 2 * pair
                    features[picture, query, place] = math.sin(value)
                    features[picture, query, place + 1] = math.cos(value)
    expected = features @ model.query_projection.weight.T + model.query_projection.bias
    expected = (expected - expected.mean(-1, keepdim=True)) / (
        expected.var(-1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    expected = expected * model.query_norm.weight + model.query_norm.bias
    torch.testing.assert_close(positions, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "center"])
def test_boxes_scale_the_offsets_of_the_first_layer_and_points_do_not(kind):
    outputs = forward(
        build(reference_point_init=kind, decoder_layers=2),
        pixel_values=torch.randn(1, 3, 64, 96),
        output_attentions=True,
    )
    # First values: head 0 looks to the right, its points 1 and 2 steps away.
    locations = outputs.cross_sampling_locations[0][0, 0].view(9, 4, 2, 2)
    for query in range(9):
        for level, width in enumerate([12, 6, 3, 2]):
            for step in (1, 2):
                if kind == "dense":
                    x, y, w, _ = outputs.reference_boxes[0, query].tolist()
                    x += step / 2 * w / 2
                else:
                    x, y = 0.5 + step / width, 0.5
                actual = locations[query, level, step - 1]
                torch.testing.assert_close(actual, torch.tensor([x, y]))
    # The second layer starts from boxes in any case.
    _, _, w, _ = outputs.intermediate_boxes[0][0, 0].tolist()
    second = outputs.cross_sampling_locations[1][0, 0].view(9, 4, 2, 2)
    step = second[0, 0, 1, 0] - second[0, 0, 0, 0]
    assert step.item() == pytest.approx(w / 4, rel=1e-4)


# ---- every combination trains --------------------------------------------------------------------


@every_query
@every_reference
@pytest.mark.parametrize("share_head", [True, False])
def test_every_parameter_gets_a_finite_gradient(reference_point_init, query_init, share_head):
    model = build(
        reference_point_init=reference_point_init,
        query_init=query_init,
        share_head=share_head,
        decoder_layers=2,
    ).train()
    outputs = model(**tiny_batch(), labels=tiny_labels())
    outputs.loss.backward()
    wrong = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert wrong == []
    has_dense_part = "dense" in (reference_point_init, query_init)
    assert (outputs.encoder_predictions is not None) == has_dense_part
    assert ("loss_ce_enc" in outputs.loss_dict) == has_dense_part
    assert len(model.model.heads) == (1 if share_head else 2 + has_dense_part)


def test_shared_head_serves_both_parts():
    model = perturb(build())
    outputs = forward(model, **tiny_batch())
    base = model.model
    tokens = base.memory_norm(base.memory_projection(outputs.encoder_last_hidden_state))
    class_head = base.heads[0].class_head
    torch.testing.assert_close(outputs.encoder_predictions.logits[0], class_head(tokens))
    torch.testing.assert_close(outputs.logits, class_head(outputs.last_hidden_state))


def test_heads_of_their_own_are_the_layers_and_then_the_dense_parts():
    model = perturb(build(share_head=False, decoder_layers=2))
    outputs = forward(model, **tiny_batch(), labels=tiny_labels())
    base = model.model
    tokens = base.memory_norm(base.memory_projection(outputs.encoder_last_hidden_state))
    class_heads = [head.class_head for head in base.heads]
    states = outputs.intermediate_hidden_states
    torch.testing.assert_close(outputs.auxiliary_outputs.logits[0], class_heads[0](states[0]))
    torch.testing.assert_close(outputs.logits, class_heads[1](states[1]))
    torch.testing.assert_close(outputs.encoder_predictions.logits[0], class_heads[2](tokens))


@pytest.mark.parametrize("options", [LEARNABLE, {"share_head": False, "decoder_layers": 2}])
def test_saved_detector_gives_equal_outputs(options, tmp_path):
    model = perturb(build(**options))
    model.save_pretrained(tmp_path)
    loaded, info = EfficientDETRForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    batch = tiny_batch()
    actual, expected = forward(loaded, **batch), forward(model, **batch)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(actual.pred_boxes, expected.pred_boxes, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["grid", "border"])
def test_points_export_with_dynamic_sizes(kind):
    model = perturb(build(reference_point_init=kind, query_init="learnable")).eval()
    height, width = torch.export.Dim("height"), torch.export.Dim("width")
    program = torch.export.export(
        model,
        (torch.randn(2, 3, 128, 160),),
        dynamic_shapes={"pixel_values": {2: 32 * height, 3: 32 * width}},
    )
    other = torch.randn(2, 3, 192, 96)
    expected = forward(model, pixel_values=other)
    torch.testing.assert_close(program.module()(other).pred_boxes, expected.pred_boxes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_with_float32_boxes(dtype):
    model = build(**LEARNABLE, decoder_layers=2).to(dtype).train()
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    outputs = model(**batch, labels=tiny_labels())
    outputs.loss.backward()
    assert (outputs.logits.dtype, outputs.pred_boxes.dtype) == (dtype, torch.float32)
    assert outputs.reference_points.dtype == torch.float32
    assert outputs.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---- number of queries during training -----------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 30), (0.1, 28), (0.5, 20), (0.77, 14), (1.0, 9)]
)
def test_number_of_queries_falls_linearly_during_training(progress, expected):
    model = build(num_queries_train_start=30)
    model.set_training_progress(progress)
    assert model.train()(**tiny_batch()).logits.shape[1] == expected
    assert forward(model, **tiny_batch()).logits.shape[1] == 9


def test_number_of_queries_is_constant_until_a_trainer_says_how_far_it_is():
    model = build(num_queries_train_start=30).train()
    assert model(**tiny_batch()).logits.shape[1] == 9


def test_number_of_queries_is_constant_without_a_start():
    model = build().train()
    model.set_training_progress(0.2)
    assert model(**tiny_batch()).logits.shape[1] == 9


@pytest.mark.parametrize("progress", [-0.1, 1.01, math.nan])
def test_progress_beyond_the_run_is_an_error(progress):
    with pytest.raises(ValueError, match=f"progress must be between 0 and 1.*got {progress}"):
        build().set_training_progress(progress)


# ---- first values and configuration --------------------------------------------------------------


def assert_uniform(values, bound):
    values = values.detach().flatten().numpy() / bound
    assert abs(values).max() <= 1
    assert kstest(values, uniform(-1, 2).cdf).pvalue > 1e-3


def test_first_values_are_those_of_deformable_detr():
    model = build(share_head=False, decoder_layers=2).model
    for head in model.heads:
        prior = torch.full((NUM_LABELS,), -math.log(99))
        torch.testing.assert_close(head.class_head.bias, prior)
        assert not head.box_head.layers[-1].weight.any()
        assert not head.box_head.layers[-1].bias.any()
    assert_uniform(model.memory_projection.weight, (6 / 128) ** 0.5)
    assert_uniform(model.query_projection.weight, (6 / 192) ** 0.5)
    assert_uniform(model.input_projection.levels[3][0].weight, (6 / (24 * 9 + 64 * 9)) ** 0.5)
    attention = model.decoder_layers[1].cross_attention
    assert not attention.sampling_offsets.weight.any()
    assert attention.sampling_offsets.bias.abs().max() == 2


def test_defaults_are_the_papers_r50():
    config = EfficientDETRConfig()
    assert config.backbone_config.backbone == "resnet50.tv_in1k"
    assert config.backbone_config.out_indices == [-3, -2, -1]
    assert (config.encoder_layers, config.decoder_layers, config.num_queries) == (3, 1, 100)
    assert (config.class_cost, config.bbox_cost, config.giou_cost) == (2, 5, 2)
    coefficients = (config.cls_loss_coefficient, config.bbox_loss_coefficient)
    assert (*coefficients, config.giou_loss_coefficient) == (2, 5, 2)
    assert (config.reference_point_init, config.query_init) == ("dense", "dense")
    assert config.share_head
    assert config.num_queries_train_start is None


@pytest.mark.parametrize(("num_levels", "stages"), [(1, [-1]), (2, [-2, -1]), (5, [-3, -2, -1])])
def test_levels_are_the_last_stages_of_the_backbone(num_levels, stages, tmp_path):
    config = EfficientDETRConfig(num_feature_levels=num_levels)
    assert config.backbone_config.out_indices == stages


def test_num_proposals_is_the_number_of_queries(tmp_path):
    config = EfficientDETRConfig(num_proposals=50)
    assert (config.num_queries, config.num_proposals) == (50, 50)
    config.save_pretrained(tmp_path)
    assert EfficientDETRConfig.from_pretrained(tmp_path).num_queries == 50
    assert EfficientDETRConfig.from_pretrained(tmp_path, num_proposals=70).num_queries == 70


def test_trained_detector_loads_with_another_number_of_queries(tmp_path):
    build().save_pretrained(tmp_path)
    loaded, info = EfficientDETRForObjectDetection.from_pretrained(
        tmp_path, num_proposals=20, output_loading_info=True
    )
    assert not any(info.values())
    assert forward(loaded, **tiny_batch()).logits.shape[1] == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_point_init": "random"}, "reference_point_init must be one of .*got 'random'"),
        ({"query_init": "grid"}, "query_init must be one of .*got 'grid'"),
        (
            {"reference_point_init": "grid", "num_queries": 50},
            "square number of queries, got num_queries=50; the nearest below is 49",
        ),
        ({"num_queries_train_start": 99}, "must be at least num_queries = 100, got 99"),
        (
            {"num_queries_train_start": 300, "query_init": "learnable"},
            "num_queries_train_start needs .*got 'dense' and 'learnable'",
        ),
        (
            {"num_queries_train_start": 300, "reference_point_init": "center"},
            "num_queries_train_start needs .*got 'center' and 'dense'",
        ),
        ({"d_model": 48}, "d_model must be a multiple of 32 .*got 48"),
        ({"encoder_attention_heads": 7}, "multiple of encoder_attention_heads, got 256 and 7"),
        ({"decoder_attention_heads": 0}, "multiple of decoder_attention_heads, got 256 and 0"),
        ({"num_feature_levels": 0}, "num_feature_levels must be at least 1, got 0"),
        ({"encoder_n_points": 0}, "encoder_n_points must be at least 1, got 0"),
        ({"decoder_n_points": -1}, "decoder_n_points must be at least 1, got -1"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
    ],
)
def test_fields_that_do_not_fit_are_an_error(options, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        EfficientDETRConfig(**options)


def test_recipe_slows_the_layers_that_say_where_to_look():
    from hf_querydet.training import parameter_groups

    model = build(**LEARNABLE, decoder_layers=2)
    groups = {
        group["name"]: group for group in parameter_groups(model, VARIANTS["efficient_detr"].recipe)
    }
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates == pytest.approx({"main": 2e-4, "backbone": 2e-5, "slow": 2e-5})
    # Weight and bias of one encoder layer and two decoder layers, and the reference points.
    assert len(groups["slow"]["params"]) == 2 * (1 + 2) + 1
