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
    ("anchor_detr", "r50"): 37_038_711,
    ("anchor_detr", "r50-dc5"): 37_038_711,
    ("anchor_detr", "r101"): 55_978_615,
    ("anchor_detr", "r101-dc5"): 55_978_615,
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
