"""Anchor DETR against its equations, written out here, and what only this paper claims."""

import math

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import kstest, norm, uniform
from tiny import NUM_LABELS, TINY_BACKBONE, perturb, tiny_batch, tiny_labels
from torch.nn import functional as F

from hf_querydet import VARIANTS, AnchorDETRConfig, AnchorDETRForObjectDetection
from hf_querydet.layers.attention import MultiHeadAttention
from hf_querydet.models.anchor_detr.modeling_anchor_detr import anchor_grid, cell_coordinates

HIDDEN = 64
SMALL = {
    "num_labels": NUM_LABELS,
    "num_query_positions": 4,
    "num_query_patterns": 3,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
}
DC5 = {"backbone": "test_resnet", "dilation": True}
KINDS = {
    "learned": {"backbone_config": TINY_BACKBONE},
    "grid": {"backbone_config": TINY_BACKBONE, "spatial_prior": "grid"},
    "valid keys": {"backbone_config": TINY_BACKBONE, "average_valid_keys": True},
    "full": {"backbone_config": TINY_BACKBONE, "attention_type": "full"},
    "levels": {**DC5, "num_feature_levels": 3},
    "levels, valid keys": {**DC5, "num_feature_levels": 3, "average_valid_keys": True},
}
PRIOR_BIAS = -math.log(99)


def build(kind="learned", **changes):
    return AnchorDETRForObjectDetection(AnchorDETRConfig(**{**SMALL, **KINDS[kind], **changes}))


def forward(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs)


# ---- the equations, one picture at a time --------------------------------------------------------


def oracle(model, features, padding_mask):
    """Logits and boxes of every decoder layer from the backbone's maps of one picture.

    Args:
        model: The detector.
        features: Maps (1, channels, height, width).
        padding_mask: (height, width) of the last map.
    """
    inner, config = model.model, model.config
    levels = []
    for index, (project, level) in enumerate(
        zip(inner.input_projection.levels, features, strict=True)
    ):
        is_halved = len(features) > 1 and index == 0
        level = F.conv2d(
            level,
            project[0].weight,
            project[0].bias,
            stride=2 if is_halved else 1,
            padding=1 if is_halved else 0,
        )
        level = F.group_norm(level, 32, project[1].weight, project[1].bias)
        levels.append(level[0].permute(1, 2, 0))
    height, width = padding_mask.shape
    x = oracle_coordinates(padding_mask[0].tolist())
    y = oracle_coordinates(padding_mask[:, 0].tolist())
    is_full = config.attention_type == "full"
    if is_full:
        cells = torch.stack(
            [oracle_point(inner, x[j], y[i]) for i in range(height) for j in range(width)]
        )
        attend = oracle_full(padding_mask, cells)
    else:
        rows = torch.stack([oracle_coordinate(inner, value) for value in x])
        columns = torch.stack([oracle_coordinate(inner, value) for value in y])
        attend = oracle_row_column(padding_mask, rows, columns, config.average_valid_keys)

    for index, layer in enumerate(inner.encoder_layers):
        for number, level in enumerate(levels):
            tokens = level.flatten(0, 1)
            if is_full:
                positions = [cells]
            else:
                positions = [rows.repeat(height, 1), columns.repeat_interleave(width, 0)]
            update = attend(layer.self_attention, [tokens + each for each in positions], level)
            tokens = layer.self_attention_norm(tokens + update)
            levels[number] = oracle_feed_forward(layer.feed_forward, tokens).view_as(level)
        if len(levels) > 1:
            layer = inner.level_layers[index]
            tokens = torch.stack([level.flatten(0, 1) for level in levels], dim=1)
            query = tokens + inner.level_embeddings.weight
            update = oracle_attention(layer.self_attention, query, query, tokens)
            tokens = layer.self_attention_norm(tokens + update)
            tokens = oracle_feed_forward(layer.feed_forward, tokens)
            levels = [tokens[:, number].view_as(level) for number, level in enumerate(levels)]

    if config.spatial_prior == "grid":
        side = round(math.sqrt(config.num_query_positions))
        places = [((i + 0.5) / side, (j + 0.5) / side) for i in range(side) for j in range(side)]
    else:
        places = inner.anchor_points.weight.tolist()
    queries, points = [], []
    for pattern in inner.patterns.weight:
        for place in places:
            queries.append(pattern)
            points.append(place)
    queries = torch.stack(queries)
    positions = torch.stack([oracle_point(inner, *point) for point in points])
    if not is_full:
        query_rows = torch.stack([oracle_coordinate(inner, px) for px, _ in points])
        query_columns = torch.stack([oracle_coordinate(inner, py) for _, py in points])
    logits, boxes = [], []
    for layer in inner.decoder_layers:
        query = queries + positions
        update = oracle_attention(layer.self_attention, query, query, queries)
        queries = layer.self_attention_norm(queries + update)
        if is_full:
            cross_queries = [queries + positions]
        else:
            cross_queries = [queries + query_rows, queries + query_columns]
        updates = [attend(layer.cross_attention.attention, cross_queries, v) for v in levels]
        if len(levels) > 1:
            merged = torch.zeros(len(queries), HIDDEN * len(levels), dtype=queries.dtype)
            for channel in range(HIDDEN):
                for number, update in enumerate(updates):
                    merged[:, channel * len(levels) + number] = update[:, channel]
            updates = [layer.cross_attention.level_merge(merged)]
        queries = layer.cross_attention_norm(queries + updates[0])
        queries = oracle_feed_forward(layer.feed_forward, queries)
        logits.append(model.class_head(queries))
        boxes.append(oracle_boxes(model.box_head, queries, points))
    return torch.stack(logits), torch.stack(boxes)


def oracle_coordinates(is_padding):
    """Centres of the valid cells of one side; padding repeats the last."""
    num_valid = is_padding.count(False)
    return [(min(index + 1, num_valid) - 0.5) / num_valid for index in range(len(is_padding))]


def oracle_sine(value, size):
    features = []
    for index in range(size):
        angle = value * 2 * math.pi / 10000 ** (2 * (index // 2) / size)
        features.append(math.cos(angle) if index % 2 else math.sin(angle))
    return features


def oracle_coordinate(inner, value):
    first, second = inner.coordinate_mlp.layers
    return second(first(torch.tensor(oracle_sine(value, HIDDEN)).to(first.weight)).relu())


def oracle_point(inner, x, y):
    first, second = inner.point_mlp.layers
    features = oracle_sine(y, HIDDEN // 2) + oracle_sine(x, HIDDEN // 2)
    return second(first(torch.tensor(features).to(first.weight)).relu())


def oracle_heads(module, query, key):
    """Weights of every head, [(..., num_queries, num_keys)], of projected queries and keys."""
    size = getattr(module, "head_size", None) or HIDDEN // module.num_heads
    for start in range(0, HIDDEN, size):
        part = slice(start, start + size)
        yield part, query[..., part] @ key[..., part].transpose(-1, -2) / math.sqrt(size)


def oracle_attention(module, query, key, value, is_padding=None):
    values, outputs = module.v_proj(value), []
    for part, scores in oracle_heads(module, module.q_proj(query), module.k_proj(key)):
        if is_padding is not None:
            scores = scores.masked_fill(is_padding, -math.inf)
        outputs.append(scores.softmax(-1) @ values[..., part])
    return module.out_proj(torch.cat(outputs, dim=-1))


def oracle_full(padding_mask, cell_positions):
    def attend(module, queries, level):
        tokens = level.flatten(0, 1)
        return oracle_attention(
            module, queries[0], tokens + cell_positions, tokens, padding_mask.flatten()
        )

    return attend


def oracle_row_column(padding_mask, row_positions, column_positions, average_valid_keys):
    """A weight for every cell; keys are projected, then averaged, as in the authors' code."""

    def attend(module, queries, level):
        row_keys = module.row_k_proj(level + row_positions)
        column_keys = module.column_k_proj(level + column_positions[:, None])
        if average_valid_keys:
            row_keys, column_keys = row_keys[~padding_mask[:, 0]], column_keys[:, ~padding_mask[0]]
        row_scores = oracle_heads(module, module.row_q_proj(queries[0]), row_keys.mean(0))
        column_scores = oracle_heads(module, module.column_q_proj(queries[1]), column_keys.mean(1))
        values, outputs = module.v_proj(level).flatten(0, 1), []
        for (part, rows), (_, columns) in zip(row_scores, column_scores, strict=True):
            rows = rows.masked_fill(padding_mask[0], -math.inf).softmax(-1)
            columns = columns.masked_fill(padding_mask[:, 0], -math.inf).softmax(-1)
            weights = columns[:, :, None] * rows[:, None, :]
            outputs.append(weights.flatten(1) @ values[:, part])
        return module.out_proj(torch.cat(outputs, dim=-1))

    return attend


def oracle_feed_forward(block, tokens):
    update = F.linear(tokens, block.expand.weight, block.expand.bias).relu()
    update = F.linear(update, block.contract.weight, block.contract.bias)
    return F.layer_norm(tokens + update, (HIDDEN,), block.norm.weight, block.norm.bias)


def oracle_boxes(box_head, queries, points):
    first, second, third = box_head.layers
    deltas = third(second(first(queries).relu()).relu())
    boxes = []
    for delta, point in zip(deltas, points, strict=True):
        point = [min(max(value, 0.0), 1.0) for value in point]
        logits = [math.log(max(v, 1e-5) / max(1 - v, 1e-5)) for v in point]
        boxes.append((delta + torch.tensor([*logits, 0.0, 0.0]).to(delta)).sigmoid())
    return torch.stack(boxes)


def random_features(model, height, width):
    """Maps of two pictures; of the second, the last column and the last two rows are padding."""
    channels = model.model.backbone.channels
    finest = [(2 * height - 1, 2 * width)] if len(channels) > 1 else []
    sizes = finest + [(height, width)] * (len(channels) - len(finest))
    maps = [
        torch.randn(2, n, *size, dtype=torch.float64)
        for n, size in zip(channels, sizes, strict=True)
    ]
    padding_mask = torch.zeros(2, height, width, dtype=torch.bool)
    padding_mask[1, :, width - 1] = True
    padding_mask[1, height - 2 :] = True
    return maps, padding_mask


def feed(model, monkeypatch, maps, padding_mask):
    """Let the backbone return these maps."""
    stages = [(features, padding_mask) for features in maps]
    monkeypatch.setattr(model.model.backbone, "forward", lambda *_: stages)
    return {"pixel_values": torch.zeros(len(maps[0]), 3, 64, 64)}


@pytest.mark.parametrize("size", [(4, 5), (5, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_equal_the_equations(kind, size, monkeypatch):
    model = perturb(build(kind)).double().eval()
    if kind != "grid":
        with torch.no_grad():  # one anchor point outside of the picture
            model.model.anchor_points.weight[0] = torch.tensor([1.2, -0.1])
    maps, padding_mask = random_features(model, *size)
    # The one with the padding first: what is beside it must not matter.
    maps, padding_mask = [features.flip(0) for features in maps], padding_mask.flip(0)

    inputs = feed(model, monkeypatch, maps, padding_mask)
    outputs = model(**inputs, labels=tiny_labels())

    for index in range(2):
        with torch.no_grad():
            logits, boxes = oracle(
                model, [level[index : index + 1] for level in maps], padding_mask[index]
            )
        predictions = outputs.auxiliary_outputs
        actual = torch.cat([predictions.logits, outputs.logits[None]])[:, index]
        torch.testing.assert_close(actual, logits, rtol=0, atol=1e-5)
        actual = torch.cat([predictions.pred_boxes, outputs.pred_boxes[None]])[:, index]
        torch.testing.assert_close(actual, boxes, rtol=0, atol=1e-5)
        # The comparison means something only where queries differ.
        assert logits.std(1).mean() > 1e-3


def test_coordinates_count_valid_cells_and_repeat_the_last_on_padding():
    padding_mask = torch.zeros(2, 2, 4, dtype=torch.bool)
    padding_mask[1, :, 2:] = padding_mask[1, 1:] = True
    x, y = cell_coordinates(padding_mask)
    assert x.tolist() == [[0.125, 0.375, 0.625, 0.875], [0.25, 0.75, 0.75, 0.75]]
    assert y.tolist() == [[0.25, 0.75], [0.5, 0.5]]


def test_picture_of_padding_alone_has_finite_coordinates():
    for coordinates in cell_coordinates(torch.ones(1, 2, 3, dtype=torch.bool)):
        assert coordinates.isfinite().all()


def test_grid_has_the_centres_of_equal_fields():
    points = anchor_grid(3, device=torch.device("cpu"))
    sixth = 1 / 6
    expected = [(i * sixth, j * sixth) for i in (1, 3, 5) for j in (1, 3, 5)]
    torch.testing.assert_close(points, torch.tensor(expected))


# ---- queries -------------------------------------------------------------------------------------


def by_pattern(predictions):
    return predictions.unflatten(1, (SMALL["num_query_patterns"], -1))


def test_permuting_patterns_permutes_predictions():
    model, batch, order = perturb(build()), tiny_batch(), torch.tensor([2, 0, 1])
    expected = forward(model, **batch)
    with torch.no_grad():
        model.model.patterns.weight.copy_(model.model.patterns.weight[order])
    permuted = forward(model, **batch)
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(
            by_pattern(permuted[name]), by_pattern(expected[name])[:, order], rtol=0, atol=1e-5
        )


def test_permuting_anchor_points_permutes_predictions_of_every_pattern():
    model, batch, order = perturb(build()), tiny_batch(), torch.tensor([3, 1, 0, 2])
    expected = forward(model, **batch)
    with torch.no_grad():
        model.model.anchor_points.weight.copy_(model.model.anchor_points.weight[order])
    permuted = forward(model, **batch)
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(
            by_pattern(permuted[name]), by_pattern(expected[name])[:, :, order], rtol=0, atol=1e-5
        )


def test_boxes_of_every_layer_start_around_the_fixed_anchor_points():
    model = build()
    outputs = model(**tiny_batch(), labels=tiny_labels())
    points = model.model.anchor_points.weight.repeat(3, 1).expand(2, -1, -1)
    size = torch.full_like(points, 1 / (1 + math.exp(2)))
    expected = torch.cat([points, size], dim=-1)
    assert len(outputs.auxiliary_outputs.pred_boxes) == 2
    for boxes in (*outputs.auxiliary_outputs.pred_boxes, outputs.pred_boxes):
        torch.testing.assert_close(boxes, expected)
    torch.testing.assert_close(outputs.anchor_points, points)


def test_every_layer_trains_the_anchor_points_through_its_boxes():
    model = build()
    boxes = model(**tiny_batch(), labels=tiny_labels()).auxiliary_outputs.pred_boxes
    for layer in boxes:
        # Width and height do not depend on the points while the box head starts at zero.
        (gradient,) = torch.autograd.grad(
            layer[..., :2].sum(), model.model.anchor_points.weight, retain_graph=True
        )
        # Two pictures and three patterns at every point.
        torch.testing.assert_close(gradient, torch.full_like(gradient, 6.0))


# ---- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "num_levels"), [("learned", 1), ("levels", 3)])
def test_attention_of_a_cell_is_the_product_of_its_row_and_column_weights(kind, num_levels):
    model, batch = perturb(build(kind)), tiny_batch()
    outputs = forward(model, **batch, output_attentions=True)

    _, _, height, width = model.model.backbone(batch["pixel_values"])[-1][0].shape
    assert len(outputs.cross_attentions) == 3
    for cells, rows, columns in zip(
        outputs.cross_attentions,
        outputs.cross_row_attentions,
        outputs.cross_column_attentions,
        strict=True,
    ):
        assert rows.shape == (2, 2, 12, num_levels * width)
        assert columns.shape == (2, 2, 12, num_levels * height)
        assert cells.shape == (2, 2, 12, num_levels * height * width)
        for level in range(num_levels):
            for y in range(height):
                for x in range(width):
                    torch.testing.assert_close(
                        cells[..., (level * height + y) * width + x],
                        rows[..., level * width + x] * columns[..., level * height + y],
                    )
        torch.testing.assert_close(cells.sum(-1), torch.full((2, 2, 12), float(num_levels)))


@pytest.mark.parametrize(("kind", "num_layers"), [("learned", 2), ("levels", 1)])
def test_encoder_attention_comes_as_row_and_column_weights_of_every_token(kind, num_layers):
    outputs = forward(build(kind), **tiny_batch(), output_attentions=True)

    num_tokens = outputs.encoder_last_hidden_state.shape[1]
    assert outputs.encoder_attentions is None
    for weights in (outputs.encoder_row_attentions, outputs.encoder_column_attentions):
        assert len(weights) == num_layers
        for layer in weights:
            assert layer.shape[:3] == (2, 4, num_tokens)
            torch.testing.assert_close(layer.sum(-1), torch.ones(2, 4, num_tokens))


def test_weights_that_say_where_a_query_looks_are_those_of_its_own_picture():
    model, batch = perturb(build("levels")), tiny_batch()
    together = forward(model, **batch, output_attentions=True)
    for index in range(2):
        alone = forward(
            model,
            **{name: tensor[index : index + 1] for name, tensor in batch.items()},
            output_attentions=True,
        )
        for name in ("cross_attentions", "encoder_row_attentions", "encoder_column_attentions"):
            for actual, expected in zip(together[name], alone[name], strict=True):
                torch.testing.assert_close(actual[index], expected[0], rtol=0, atol=1e-5)


def test_full_attention_returns_the_weights_of_all_cells():
    model = build("full", attn_implementation="eager")
    outputs = forward(model, **tiny_batch(), output_attentions=True)

    num_tokens = outputs.encoder_last_hidden_state.shape[1]
    assert [tuple(w.shape) for w in outputs.cross_attentions] == [(2, 2, 12, num_tokens)] * 3
    shape = (2, 4, num_tokens, num_tokens)
    assert [tuple(w.shape) for w in outputs.encoder_attentions] == [shape] * 2
    assert outputs.cross_row_attentions is None


def test_nothing_is_kept_that_nobody_asked_for():
    outputs = forward(build(), **tiny_batch())
    given = {name for name in outputs if "attentions" in name or "hidden_states" in name}
    assert given == {"intermediate_hidden_states"}


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_the_encoder_are_one_more_than_its_layers(kind):
    outputs = forward(build(kind), **tiny_batch(), output_hidden_states=True)
    states = outputs.encoder_hidden_states
    assert len(states) == SMALL["encoder_layers"] + 1
    assert torch.equal(states[-1], outputs.encoder_last_hidden_state)
    assert len({tuple(state.shape) for state in states}) == 1


# ---- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["valid keys", "levels, valid keys", "full"])
def test_cells_under_padding_do_not_reach_predictions(kind, monkeypatch):
    # Below the group normalisation, whose statistics are of the whole map.
    model = perturb(build(kind))
    maps, padding_mask = random_features(model, 4, 5)
    maps = [features.float() for features in maps]
    inputs = feed(model, monkeypatch, maps, padding_mask)
    levels = torch.randn(2, model.config.num_feature_levels, 4, 5, HIDDEN)
    beside = levels[1:, :, :2, :4]

    monkeypatch.setattr(model.model.input_projection, "forward", lambda _: levels)
    together = forward(model, **inputs)
    monkeypatch.setattr(model.model.input_projection, "forward", lambda _: beside)
    inputs = feed(model, monkeypatch, maps, padding_mask=None)
    alone = forward(model, **inputs)

    torch.testing.assert_close(together.logits[1:], alone.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.pred_boxes[1:], alone.pred_boxes, rtol=0, atol=1e-5)


# ---- the common promises, of the options ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "levels"])
def test_batch_without_mask_equals_its_single_pictures(kind):
    model, pixel_values = perturb(build(kind)), torch.randn(2, 3, 64, 96)
    together = forward(model, pixel_values=pixel_values)
    for index in range(2):
        alone = forward(model, pixel_values=pixel_values[index : index + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "levels", "grid"])
def test_every_parameter_gets_a_gradient(kind):
    model = build(kind).train()
    model(**tiny_batch(), labels=tiny_labels()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", ["full", "levels", "grid"])
def test_saved_model_gives_equal_outputs(kind, tmp_path):
    model, batch = perturb(build(kind)), tiny_batch()
    model.save_pretrained(tmp_path)
    loaded, info = AnchorDETRForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(forward(loaded, **batch).logits, forward(model, **batch).logits)


@pytest.mark.parametrize("kind", ["full", "levels", "valid keys"])
def test_exported_program_takes_other_batches_and_sizes(kind):
    model = perturb(build(kind)).eval()
    batch, height, width = (torch.export.Dim(axis) for axis in ("batch", "height", "width"))
    program = torch.export.export(
        model,
        (),
        {
            "pixel_values": torch.randn(2, 3, 128, 160),
            "pixel_mask": torch.ones(2, 128, 160, dtype=torch.int64),
        },
        dynamic_shapes={
            "pixel_values": {0: batch, 2: 32 * height, 3: 32 * width},
            "pixel_mask": {0: batch, 1: 32 * height, 2: 32 * width},
        },
    )
    other = {
        "pixel_values": torch.randn(3, 3, 192, 96),
        "pixel_mask": torch.ones(3, 192, 96, dtype=torch.int64),
    }
    torch.testing.assert_close(program.module()(**other).logits, forward(model, **other).logits)


@pytest.mark.parametrize("kind", ["full", "levels"])
def test_half_precision_trains(kind):
    model = build(kind).bfloat16().train()
    batch = tiny_batch()
    outputs = model(batch["pixel_values"].bfloat16(), batch["pixel_mask"], labels=tiny_labels())
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.pred_boxes.dtype == torch.float32
    assert outputs.loss.isfinite()


def tiny_batch_of_seed_0():
    torch.manual_seed(0)
    return tiny_batch()


# ---- loss, first values, recipe ------------------------------------------------------------------


def test_weights_of_matching_and_loss_are_2_5_and_2():
    config = AnchorDETRConfig()
    assert (config.class_cost, config.bbox_cost, config.giou_cost) == (2, 5, 2)
    coefficients = (
        config.cls_loss_coefficient,
        config.bbox_loss_coefficient,
        config.giou_loss_coefficient,
    )
    assert coefficients == (2, 5, 2)
    criterion = build(class_cost=3.0, cls_loss_coefficient=7.0).criterion
    assert (criterion.class_cost, criterion.coefficients["loss_ce"]) == (3.0, 7.0)


def test_focal_alpha_enters_the_loss():
    losses = {}
    for alpha in (0.25, 0.5):
        torch.manual_seed(0)
        model = build(focal_alpha=alpha).eval()
        losses[alpha] = model(**tiny_batch_of_seed_0(), labels=tiny_labels()).loss_dict["loss_ce"]
    assert losses[0.25] != losses[0.5]


@pytest.fixture(params=["constructed", "loaded"])
def load(request, tmp_path):
    """Builds a model; or loads it from a file that holds the backbone only."""

    def load(kind):
        model = build(kind, num_query_positions=100, num_query_patterns=20)
        if request.param == "constructed":
            return model
        model.config.save_pretrained(tmp_path)
        weights = {name: v for name, v in model.state_dict().items() if ".backbone." in name}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return AnchorDETRForObjectDetection.from_pretrained(tmp_path)

    return load


def assert_uniform(values, bound):
    values = values.detach().flatten().numpy() / bound
    assert abs(values).max() <= 1
    assert kstest(values, uniform(-1, 2).cdf).pvalue > 1e-3


def test_first_values_of_row_column_attention(load):
    model = load("learned").model
    for attention in (
        model.encoder_layers[1].self_attention,
        model.decoder_layers[2].cross_attention.attention,
    ):
        for name in ("row_q_proj", "column_q_proj", "row_k_proj", "column_k_proj", "v_proj"):
            projection = getattr(attention, name)
            # As one matrix of five times the rows.
            assert_uniform(projection.weight, (6 / (6 * HIDDEN)) ** 0.5)
            assert not projection.bias.any()
        assert_uniform(attention.out_proj.weight, HIDDEN**-0.5)
        assert not attention.out_proj.bias.any()


@pytest.mark.parametrize("kind", ["learned", "full", "levels"])
def test_first_values_of_full_attention(kind, load):
    attentions = [m for m in load(kind).modules() if isinstance(m, MultiHeadAttention)]
    assert len(attentions) == {"learned": 3, "full": 8, "levels": 4}[kind]
    for attention in attentions:
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert_uniform(projection.weight, (6 / (4 * HIDDEN)) ** 0.5)
            assert not projection.bias.any()
        assert_uniform(attention.out_proj.weight, HIDDEN**-0.5)
        assert not attention.out_proj.bias.any()


def test_first_values_of_feed_forward_and_position_layers_are_pytorchs_default(load):
    model = load("learned").model
    blocks = [model.encoder_layers[0].feed_forward, model.decoder_layers[1].feed_forward]
    layers = [layer for block in blocks for layer in (block.expand, block.contract)]
    for layer in (*layers, *model.coordinate_mlp.layers, *model.point_mlp.layers):
        assert_uniform(layer.weight, layer.in_features**-0.5)
        assert_uniform(layer.bias, layer.in_features**-0.5)


def test_first_values_of_anchor_points_and_patterns(load):
    model = load("levels").model
    points = model.anchor_points.weight
    assert points.min() >= 0
    assert_uniform(points * 2 - 1, 1.0)
    for embeddings in (model.patterns, model.level_embeddings):
        values = embeddings.weight.detach().flatten().numpy()
        assert kstest(values, norm.cdf).pvalue > 1e-3


def test_first_values_of_the_input_projection(load):
    model = load("levels").model
    for projection, size_in in zip(
        model.input_projection.levels, model.backbone.channels, strict=True
    ):
        convolution, normalisation = projection
        area = convolution.kernel_size[0] ** 2
        assert_uniform(convolution.weight, (6 / ((size_in + HIDDEN) * area)) ** 0.5)
        assert not convolution.bias.any()
        assert (normalisation.weight == 1).all()


def test_first_values_of_the_heads(load):
    model = load("learned")
    torch.testing.assert_close(model.class_head.bias, torch.full((NUM_LABELS,), PRIOR_BIAS))
    assert_uniform(model.class_head.weight, HIDDEN**-0.5)
    last = model.box_head.layers[-1]
    assert not last.weight.any()
    assert last.bias.tolist() == [0, 0, -2, -2]


def test_new_labels_start_with_the_prior(tmp_path):
    perturb(build()).save_pretrained(tmp_path)
    model = AnchorDETRForObjectDetection.from_pretrained(tmp_path, num_labels=7)
    torch.testing.assert_close(model.class_head.bias, torch.full((7,), PRIOR_BIAS))


def test_recipe_is_the_authors():
    recipe = VARIANTS["anchor_detr"].recipe
    assert (recipe.learning_rate, recipe.backbone_learning_rate_factor) == (1e-4, 0.1)
    assert (recipe.num_epochs, recipe.num_epochs * recipe.step_fraction) == (50, 40)
    assert recipe.slow_parameters == ()


# ---- configuration and errors --------------------------------------------------------------------


def test_defaults_are_the_papers_r50():
    config = AnchorDETRConfig()
    assert config.backbone_config.backbone == "resnet50.tv_in1k"
    assert config.backbone_config.out_indices == [-1]
    queries = (config.num_query_positions, config.num_query_patterns, config.num_queries)
    assert queries == (300, 3, 900)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (1024, 1024)
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.0,) * 3
    assert not config.average_valid_keys


def test_three_levels_have_the_authors_number_of_parameters():
    config = AnchorDETRConfig(
        num_labels=91, num_feature_levels=3, dilation=True, backbone_norm="frozen"
    )
    with torch.device("meta"):
        model = AnchorDETRForObjectDetection(config)
    assert config.backbone_config.out_indices == [-3, -2, -1]
    assert model.num_parameters() == 39_269_239


def test_grid_takes_the_nearest_square_number_of_points():
    config = AnchorDETRConfig(spatial_prior="grid")
    assert (config.num_query_positions, config.num_queries) == (289, 867)


def test_number_of_queries_follows_its_factors_when_loading(tmp_path):
    AnchorDETRConfig().save_pretrained(tmp_path)
    assert AnchorDETRConfig.from_pretrained(tmp_path).num_queries == 900
    loaded = AnchorDETRConfig.from_pretrained(tmp_path, num_query_patterns=2)
    assert loaded.num_queries == 600
    loaded = AnchorDETRConfig.from_pretrained(tmp_path, spatial_prior="grid")
    assert loaded.num_queries == 867


def test_number_of_queries_cannot_be_set_alone(tmp_path):
    message = r"num_queries is 100, .* = 300 \* 3; set these two"
    AnchorDETRConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AnchorDETRConfig(num_queries=100)
    with pytest.raises(ValueError, match=message):
        AnchorDETRConfig.from_pretrained(tmp_path, num_queries=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_query_positions": 0}, "num_query_positions must be at least 1, got 0"),
        (
            {"num_query_positions": -1, "spatial_prior": "grid"},
            "num_query_positions must be at least 1, got -1",
        ),
        ({"num_query_patterns": -2}, "num_query_patterns must be at least 1, got -2"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ({"d_model": 48}, "d_model must be a multiple of 32 .*got 48"),
        ({"encoder_attention_heads": 7}, "multiple of encoder_attention_heads, got 256 and 7"),
        ({"decoder_attention_heads": 0}, "multiple of decoder_attention_heads, got 256 and 0"),
        ({"spatial_prior": "random"}, "spatial_prior must be one of .*got 'random'"),
        ({"attention_type": "RCDA"}, "attention_type must be one of .*got 'RCDA'"),
        ({"num_feature_levels": 2}, r"num_feature_levels must be one of \(1, 3\), got 2"),
        (
            {"num_feature_levels": 3, "attention_type": "full"},
            "num_feature_levels=3 needs attention_type='row_column', got 'full'",
        ),
        ({"num_feature_levels": 3, "encoder_layers": 5}, "encoder_layers must be even .*got 5"),
    ],
)
def test_fields_that_do_not_fit_are_an_error(options, message):
    from huggingface_hub.errors import StrictDataclassClassValidationError

    with pytest.raises(StrictDataclassClassValidationError, match=message):
        AnchorDETRConfig(**options)


def test_number_of_maps_must_be_that_of_the_levels():
    backbone_config = {**TINY_BACKBONE, "out_indices": [3, 4]}
    with pytest.raises(ValueError, match="num_feature_levels is 1 but the backbone returns 2 maps"):
        build(backbone_config=backbone_config)


def test_levels_of_unlike_sizes_are_an_error():
    model = build("levels", dilation=False)
    with pytest.raises(ValueError, match=r"levels of one size, got .*; set dilation=True"):
        model(pixel_values=torch.randn(1, 3, 96, 64))
