"""Models of the papers by name, and their size."""

import pytest
import torch

from hf_querydet import VARIANTS

# Parameters of the authors' models with the authors' number of labels, counted in their code.
# Affine terms of frozen batch norm are no parameters there.
PARAMETERS = {
    ("detr", "r50"): 41_524_768,
    ("detr", "r50-dc5"): 41_524_768,
    ("detr", "r101"): 60_464_672,
    ("detr", "r101-dc5"): 60_464_672,
    ("deformable_detr", "r50"): 40_069_665,
    ("deformable_detr", "r50-single-scale"): 34_066_593,
    ("deformable_detr", "r50-single-scale-dc5"): 34_066_593,
    ("deformable_detr", "r50-refine"): 40_849_660,
    ("deformable_detr", "r50-two-stage"): 41_181_529,
    ("conditional_detr", "r50"): 43_418_401,
    ("conditional_detr", "r50-dc5"): 43_418_401,
    ("conditional_detr", "r101"): 62_358_305,
    ("conditional_detr", "r101-dc5"): 62_358_305,
    ("anchor_detr", "r50"): 37_038_711,
    ("anchor_detr", "r50-dc5"): 37_038_711,
    ("anchor_detr", "r101"): 55_978_615,
    ("anchor_detr", "r101-dc5"): 55_978_615,
}
# Sparse R-CNN, layer by layer. First the convolutions of the backbone; with the 53,120 and 105,344
# affine terms of its batch norms, r50-100 has 106.29 million and r101-100 125.28 million.
RESNET50, RESNET101 = 23_454_912, 42_394_816
FEATURE_PYRAMID = 256 * (256 + 512 + 1024 + 2048 + 4) + 4 * (9 * 256 * 256 + 256)
STAGE = (
    4 * (256 * 256 + 256)  # self-attention
    + (256 + 1) * 2 * 256 * 64  # filters
    + (49 * 256 + 1) * 256  # all positions of a region to one vector
    + 2 * 64
    + 2 * 2 * 256  # norms of the interaction
    + 3 * 2 * 256  # norms of the residuals
    + (256 + 1) * 2048
    + (2048 + 1) * 256  # feed-forward
    + (1 + 3) * (256 * 256 + 2 * 256)  # class tower and box tower
    + (256 + 1) * (80 + 4)  # class and box
)
PARAMETERS |= {
    ("sparse_rcnn", f"{name}-{proposals}"): backbone
    + FEATURE_PYRAMID
    + 6 * STAGE
    + proposals * (256 + 4)
    for name, backbone in (("r50", RESNET50), ("r101", RESNET101))
    for proposals in (100, 300)
}
# Of the paper's stem and first stage, which it freezes.
FROZEN = 222_400


def build(variant, name):
    config = VARIANTS[variant].config.from_name(
        name, use_pretrained_backbone=False, backbone_norm="frozen", frozen_backbone_stages=2
    )
    with torch.device("meta"):
        return VARIANTS[variant].detector(config)


@pytest.mark.parametrize(("variant", "name"), PARAMETERS)
def test_number_of_parameters_is_the_authors(variant, name):
    model = build(variant, name)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters() == PARAMETERS[variant, name]
    assert trainable == PARAMETERS[variant, name] - FROZEN


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_named_configuration_builds(variant):
    for name in VARIANTS[variant].config.named_configurations:
        assert build(variant, name).num_parameters() > 30e6


def test_named_configuration_starts_from_a_pretrained_backbone():
    config = VARIANTS["detr"].config.from_name("r101-dc5")

    assert config.backbone_config.backbone == "resnet101.tv_in1k"
    assert config.backbone_config.output_stride == 16
    assert config.num_labels == 91
    assert config.use_pretrained_backbone
    assert (config.backbone_norm, config.frozen_backbone_stages) == ("frozen", 2)


def test_fields_override_those_of_the_name():
    config = VARIANTS["detr"].config.from_name(
        "r101", id2label={0: "cat", 1: "dog"}, backbone_config={"model_type": "resnet"}
    )

    assert config.id2label == {0: "cat", 1: "dog"}
    assert config.backbone_config.model_type == "resnet"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"DETRConfig has no model named .r34.; .*r50, r50-dc5"):
        VARIANTS["detr"].config.from_name("r34")


def linear(size_in, size_out):
    return size_in * size_out + size_out


@pytest.mark.parametrize(
    ("name", "backbone", "affine_terms", "encoder_layers", "millions"),
    [
        # Convolutions of the ResNet; its norms are frozen, so their affine terms do not count.
        ("r50", 23_454_912, 53_120, 3, "32.66"),
        ("r50-6-encoder-layers", 23_454_912, 53_120, 6, "34.93"),
        ("r101", 42_394_816, 105_344, 3, "51.65"),
        ("r101-6-encoder-layers", 42_394_816, 105_344, 6, "53.92"),
    ],
)
def test_number_of_parameters_of_efficient_detr(
    name, backbone, affine_terms, encoder_layers, millions
):
    # 256 channels, 8 heads, 4 levels, 4 points, a shared head of 91 classes; no code to count in.
    norm = 2 * 256
    projections = sum(linear(size, 256) for size in (512, 1024, 2048, 2048 * 9)) + 4 * norm
    attention = linear(256, 8 * 4 * 4 * 2) + linear(256, 8 * 4 * 4) + 2 * linear(256, 256)
    feed_forward = linear(256, 1024) + linear(1024, 256) + norm
    encoder = encoder_layers * (attention + norm + feed_forward)
    decoder = 4 * linear(256, 256) + norm + attention + norm + feed_forward
    queries = linear(256, 256) + norm + linear(512, 256) + norm
    head = linear(256, 91) + 2 * linear(256, 256) + linear(256, 4)
    expected = backbone + projections + 4 * 256 + encoder + decoder + queries + head

    assert build("efficient_detr", name).num_parameters() == expected
    # Counted with the affine terms, and without the layer that embeds a query's box, on which the
    # paper is silent, this is the size that the paper's rounded millions follow from.
    without_box_embedding = expected - linear(512, 256) - norm
    assert f"{(without_box_embedding + affine_terms) / 1e6:.2f}" == millions


def test_efficient_detr_is_deformable_detr_with_other_queries_and_fewer_layers():
    encoder_layer, decoder_layer = 756_864, 1_020_544
    removed = 300 * 512 + linear(256, 2) + 3 * encoder_layer + 5 * decoder_layer
    added = linear(256, 256) + 512 + linear(512, 256) + 512
    expected = PARAMETERS["deformable_detr", "r50"] - removed + added
    assert build("efficient_detr", "r50").num_parameters() == expected
