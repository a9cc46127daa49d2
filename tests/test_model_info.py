"""Sizes against formulas written from the papers' descriptions, layer by layer."""

import pytest
from tiny import TINY_CONFIGS, tiny_config
from typer.testing import CliRunner

from hf_querydet import VARIANTS
from hf_querydet.cli import app
from hf_querydet.model_info import format_parts, format_sizes, model_info

HEIGHT, WIDTH = 480, 637
D, HEADS, POINTS, LABELS = 256, 8, 4, 91
BLOCKS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}


# ---- multiply-adds by hand -----------------------------------------------------------------------


def half(size):
    return (size + 1) // 2


def convolution(cells, in_channels, out_channels, kernel=1):
    return cells * in_channels * out_channels * kernel**2


def resnet(blocks, dilated=False, width=WIDTH):
    """Multiply-adds of the whole network and (height, width) of its four maps."""
    height, width = half(HEIGHT), half(width)
    total = convolution(height * width, 3, 64, kernel=7)
    height, width = half(height), half(width)  # maximum pooling
    in_channels, sizes = 64, []
    for stage, depth in enumerate(blocks):
        inner = 64 * 2**stage
        for block in range(depth):
            before = height * width
            if block == 0 and stage > 0 and not (dilated and stage == 3):
                height, width = half(height), half(width)
            after = height * width
            total += convolution(before, in_channels, inner)  # at the old resolution
            total += convolution(after, inner, inner, kernel=3)
            total += convolution(after, inner, 4 * inner)
            if block == 0:
                total += convolution(after, in_channels, 4 * inner)
            in_channels = 4 * inner
        sizes.append((height, width))
    return total, sizes


def attention(queries, keys):
    """Four projections, scores, and the weighted sum."""
    projections = 2 * queries * D**2 + 2 * keys * D**2
    return projections + 2 * queries * keys * D


def feed_forward(tokens, inner):
    return 2 * tokens * D * inner


def heads(queries, classes):
    return queries * (D * classes + 2 * D**2 + 4 * D)


def detr(backbone, dilated):
    total, sizes = resnet(BLOCKS[backbone], dilated)
    height, width = sizes[-1]
    tokens, queries = height * width, 100
    total += convolution(tokens, 2048, D)
    total += 6 * (attention(tokens, tokens) + feed_forward(tokens, 2048))
    total += 6 * (
        attention(queries, queries) + attention(queries, tokens) + feed_forward(queries, 2048)
    )
    return total + heads(queries, LABELS + 1)


def conditional_detr(backbone, dilated):
    total, sizes = resnet(BLOCKS[backbone], dilated)
    height, width = sizes[-1]
    tokens, queries = height * width, 300
    total += convolution(tokens, 2048, D)
    total += 6 * (attention(tokens, tokens) + feed_forward(tokens, 2048))
    # Content and position of queries and keys, values and output have a projection each.
    total += 6 * (6 * queries * D**2 + 2 * queries**2 * D + feed_forward(queries, 2048))
    # Across: three projections of the tokens, three of the queries and one more in the first layer;
    # keys have twice the channels of values.
    total += 6 * (3 * tokens * D**2 + 3 * queries * D**2 + 3 * queries * tokens * D)
    total += queries * D**2
    total += 5 * 2 * queries * D**2  # the scale of the spatial query, from the second layer on
    total += queries * (D**2 + 2 * D)  # reference points
    return total + heads(queries, LABELS)


def deformable_attention(queries, tokens, levels):
    samples = HEADS * levels * POINTS
    projections = tokens * D**2 + queries * D**2 + queries * D * 3 * samples
    # Four corners of every sample, for the channels of one head.
    return projections + queries * samples * 4 * (D // HEADS)


def four_levels(sizes):
    """Multiply-adds of the projections of the last three maps and of an extra one; their sizes."""
    total = 0
    for (height, width), channels in zip(sizes[1:], (512, 1024, 2048), strict=True):
        total += convolution(height * width, channels, D)
    height, width = half(sizes[-1][0]), half(sizes[-1][1])
    total += convolution(height * width, 2048, D, kernel=3)
    return total, [*sizes[1:], (height, width)]


def deformable_detr(backbone, levels=4, dilated=False, two_stage=False):
    total, sizes = resnet(BLOCKS[backbone], dilated)
    if levels == 1:
        sizes = sizes[-1:]
        total += convolution(sizes[0][0] * sizes[0][1], 2048, D)
    else:
        products, sizes = four_levels(sizes)
        total += products
    tokens, queries = sum(height * width for height, width in sizes), 300
    total += 6 * (deformable_attention(tokens, tokens, levels) + feed_forward(tokens, 1024))
    layer = attention(queries, queries) + deformable_attention(queries, tokens, levels)
    total += 6 * (layer + feed_forward(queries, 1024))
    # Boxes of every layer, classes of the last.
    total += 6 * heads(queries, 0) + queries * D * LABELS
    if two_stage:
        total += tokens * D**2 + heads(tokens, LABELS) + queries * (2 * D) ** 2
    else:
        total += queries * D * 2  # reference points
    return total


def efficient_detr(backbone, encoder_layers):
    total, sizes = resnet(BLOCKS[backbone])
    products, sizes = four_levels(sizes)
    total += products
    tokens, queries = sum(height * width for height, width in sizes), 100
    layer = deformable_attention(tokens, tokens, levels=4) + feed_forward(tokens, 1024)
    total += encoder_layers * layer
    total += tokens * D**2 + heads(tokens, LABELS)  # dense part
    total += queries * 2 * D * D  # position of a query from the sine of its box
    total += attention(queries, queries) + deformable_attention(queries, tokens, levels=4)
    return total + feed_forward(queries, 1024) + heads(queries, LABELS)


def row_column_attention(queries, height, width):
    projections = 3 * queries * D**2 + height * width * D**2 + (height + width) * D**2
    scores = queries * (height + width) * D
    return projections + scores + queries * D * (height * width + min(height, width))


def anchor_detr(backbone, dilated):
    total, sizes = resnet(BLOCKS[backbone], dilated)
    height, width = sizes[-1]
    cells, queries = height * width, 900
    total += convolution(cells, 2048, D)
    # Both coordinates of cells and queries, and the points of queries, through two layers each.
    total += 2 * (height + width + 3 * queries) * D**2
    total += 6 * (row_column_attention(cells, height, width) + feed_forward(cells, 1024))
    layer = attention(queries, queries) + row_column_attention(queries, height, width)
    total += 6 * (layer + feed_forward(queries, 1024))
    return total + heads(queries, LABELS)


def regions(queries, bins=49, samples=4):
    """RoIAlign: four corners of every sample."""
    return queries * bins * samples * 4 * D


def sparse_rcnn(backbone, queries):
    total, sizes = resnet(BLOCKS[backbone], width=640)  # a multiple of 32
    for (height, width), channels in zip(sizes, (256, 512, 1024, 2048), strict=True):
        total += convolution(height * width, channels, D)
        total += convolution(height * width, D, D, kernel=3)
    stage = attention(queries, queries) + regions(queries)
    stage += queries * D * (2 * D * 64)  # filters
    stage += queries * 49 * 2 * D * 64 + queries * 49 * D * D  # applied, and all bins to one vector
    stage += feed_forward(queries, 2048) + queries * (3 * D**2 + 4 * D)
    return total + 6 * stage + queries * (D**2 + 80 * D)  # classes of the last stage


def dynamic_detr(encoder_layers=6, decoder_layers=6):
    total, sizes = resnet(BLOCKS["r50"], width=640)
    sizes = sizes[1:]
    for (height, width), channels in zip(sizes, (512, 1024, 2048), strict=True):
        total += convolution(height * width, channels, D)
        total += convolution(height * width, D, D, kernel=3)
    for _ in range(2):
        sizes = [*sizes, (half(sizes[-1][0]), half(sizes[-1][1]))]
        total += convolution(sizes[-1][0] * sizes[-1][1], D, D, kernel=3)
    cells = [height * width for height, width in sizes]
    branches = 0
    for level, own in enumerate(cells):
        branches += convolution(own, D, 3 * 9, kernel=3)  # offsets and factors
        # The convolved map has the level's size, that of the coarser neighbour its own.
        for size in [own, *([own] if level > 0 else []), *cells[level + 1 : level + 2]]:
            # Nine taps of all channels, of four corners each; then the products.
            branches += size * 9 * D * 4 + convolution(size, D, D, kernel=3)
            branches += 2 * D * D // 16  # scale attention
        branches += D * D // 4 + D // 4 * 4 * D  # dynamic ReLU
    total += encoder_layers * branches
    queries = 300
    layer = attention(queries, queries) + regions(queries)
    layer += queries * D * (D * 20) + queries * 49 * D * 20 + queries * 49 * 20 * D
    layer += feed_forward(queries, 2048) + queries * (3 * D**2 + 4 * D)
    return total + decoder_layers * layer + queries * (D**2 + LABELS * D)


MULTIPLY_ADDS = {
    ("detr", "r50"): lambda: detr("r50", dilated=False),
    ("detr", "r50-dc5"): lambda: detr("r50", dilated=True),
    ("detr", "r101"): lambda: detr("r101", dilated=False),
    ("detr", "r101-dc5"): lambda: detr("r101", dilated=True),
    ("conditional_detr", "r50"): lambda: conditional_detr("r50", dilated=False),
    ("conditional_detr", "r50-dc5"): lambda: conditional_detr("r50", dilated=True),
    ("conditional_detr", "r101"): lambda: conditional_detr("r101", dilated=False),
    ("conditional_detr", "r101-dc5"): lambda: conditional_detr("r101", dilated=True),
    ("deformable_detr", "r50"): lambda: deformable_detr("r50"),
    ("deformable_detr", "r50-refine"): lambda: deformable_detr("r50"),
    ("deformable_detr", "r50-single-scale"): lambda: deformable_detr("r50", levels=1),
    ("deformable_detr", "r50-single-scale-dc5"): lambda: deformable_detr(
        "r50", levels=1, dilated=True
    ),
    ("deformable_detr", "r50-two-stage"): lambda: deformable_detr("r50", two_stage=True),
    ("deformable_detr", "r101-two-stage"): lambda: deformable_detr("r101", two_stage=True),
    ("efficient_detr", "r50"): lambda: efficient_detr("r50", encoder_layers=3),
    ("efficient_detr", "r50-6-encoder-layers"): lambda: efficient_detr("r50", encoder_layers=6),
    ("efficient_detr", "r101"): lambda: efficient_detr("r101", encoder_layers=3),
    ("efficient_detr", "r101-6-encoder-layers"): lambda: efficient_detr("r101", encoder_layers=6),
    ("anchor_detr", "r50"): lambda: anchor_detr("r50", dilated=False),
    ("anchor_detr", "r50-dc5"): lambda: anchor_detr("r50", dilated=True),
    ("anchor_detr", "r101"): lambda: anchor_detr("r101", dilated=False),
    ("anchor_detr", "r101-dc5"): lambda: anchor_detr("r101", dilated=True),
    ("sparse_rcnn", "r50-100"): lambda: sparse_rcnn("r50", queries=100),
    ("sparse_rcnn", "r50-300"): lambda: sparse_rcnn("r50", queries=300),
    ("sparse_rcnn", "r101-100"): lambda: sparse_rcnn("r101", queries=100),
    ("sparse_rcnn", "r101-300"): lambda: sparse_rcnn("r101", queries=300),
    ("dynamic_detr", "r50"): dynamic_detr,
    ("dynamic_detr", "r50-no-encoder"): lambda: dynamic_detr(encoder_layers=0),
    ("dynamic_detr", "r50-2-decoder-layers"): lambda: dynamic_detr(decoder_layers=2),
}


@pytest.mark.parametrize(("variant", "name"), MULTIPLY_ADDS)
def test_multiply_adds_are_those_of_the_papers_layers(variant, name):
    config = VARIANTS[variant].config.from_name(name)

    counted = model_info(config, size=(HEIGHT, WIDTH)).multiply_adds

    assert counted == pytest.approx(MULTIPLY_ADDS[variant, name](), rel=1e-3)


# ---- the tool ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_parts_add_up_to_the_whole(name):
    info = model_info(tiny_config(VARIANTS, name), size=(64, 96))

    assert sum(part.parameters for part in info.parts.values()) == info.parameters
    assert sum(part.multiply_adds for part in info.parts.values()) == info.multiply_adds
    assert info.parts["backbone"].multiply_adds > 0


def test_frozen_stages_are_not_trainable():
    frozen = model_info(
        VARIANTS["detr"].config.from_name("r50", frozen_backbone_stages=2), size=(64, 64)
    )

    assert frozen.parameters - frozen.trainable_parameters == 222_400


def test_size_must_be_positive():
    with pytest.raises(ValueError, match=r"size must be .* got \(0, 32\)"):
        model_info(VARIANTS["detr"].config(), size=(0, 32))


def test_table_shows_what_the_authors_print():
    lines = format_sizes(["detr"], size=(64, 64)).splitlines()

    assert lines[1].split()[:4] == ["detr", "r50", "41.52", "41"]
    assert lines[1].split()[-1] == "86"


def test_parts_of_a_model_as_a_table():
    lines = format_parts(model_info(VARIANTS["detr"].config.from_name("r50"), size=(64, 64)))

    assert lines.splitlines()[-2].split()[:2] == ["all", "41,524,768"]


def test_command_describes_a_saved_model(tmp_path):
    tiny_config(VARIANTS, "deformable_detr").save_pretrained(tmp_path)

    result = CliRunner().invoke(app, ["info", str(tmp_path), "--height", "64", "--width", "96"])

    assert result.exit_code == 0
    assert "encoder_layers" in result.output


def test_command_describes_a_named_model():
    result = CliRunner().invoke(app, ["info", "detr", "--name", "r101", "--height", "64"])

    assert "60,464,672" in result.output


def test_command_names_the_models_that_there_are():
    result = CliRunner().invoke(app, ["info", "detr", "--name", "r34"])

    assert result.exit_code == 2
    assert "has no model named 'r34'" in result.output


def test_command_says_that_a_directory_holds_no_model(tmp_path):
    result = CliRunner().invoke(app, ["info", str(tmp_path)])

    assert result.exit_code == 2
    assert "config.json" in result.output
