import json

import pytest
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassFieldValidationError,
)
from transformers import DetrConfig, ResNetConfig
from transformers.models.timm_backbone import TimmBackboneConfig

from hf_querydet.models.detr.configuration_detr import DETRConfig

TINY_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}
NAMES = {0: "cat", 1: "dog", 2: "owl"}


def labels_of(config: DETRConfig) -> tuple[int, dict[int, str], dict[str, int]]:
    return config.num_labels, config.id2label, config.label2id


# Labels


@pytest.mark.parametrize("id2label", [{1: "cat", 2: "dog"}, {0: "cat", 2: "dog"}])
def test_labels_that_do_not_count_from_0_are_an_error(id2label):
    message = r"id2label must number the labels from 0 to 1, got \[[01], 2\]"
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        DETRConfig(id2label=id2label)


def test_number_of_labels_that_contradicts_their_names_is_mentioned(caplog):
    config = DETRConfig(id2label={0: "cat", 1: "dog"}, num_labels=7)

    assert config.num_labels == 7
    assert "num_labels=7 contradicts the 2 names of id2label" in caplog.text


# Keywords


def test_keywords_that_are_no_fields_are_mentioned_when_given_but_not_when_loaded(caplog, tmp_path):
    config = DETRConfig(num_querys=7, attn_implementation="eager", num_labels=3)
    assert "DETRConfig has no fields 'num_querys'; do you mean 'num_queries'?" in caplog.text

    caplog.clear()
    config.save_pretrained(tmp_path)
    assert DETRConfig.from_pretrained(tmp_path).num_querys == 7
    assert caplog.text == ""


# Backbone


def test_defaults_are_the_papers_r50():
    config = DETRConfig(num_labels=91)

    backbone = config.backbone_config
    assert (backbone.model_type, backbone.backbone) == ("timm_backbone", "resnet50.tv_in1k")
    assert (backbone.out_indices, backbone.output_stride) == ([-1], None)
    assert (config.d_model, config.num_queries) == (256, 100)
    assert (config.encoder_layers, config.decoder_layers) == (6, 6)
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (8, 8)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (2048, 2048)
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.1,) * 3
    assert (config.class_cost, config.bbox_cost, config.giou_cost) == (1, 5, 2)
    assert (config.bbox_loss_coefficient, config.giou_loss_coefficient) == (5, 2)
    assert (config.cls_loss_coefficient, config.eos_coefficient) == (1, 0.1)
    assert config.auxiliary_loss


def test_name_is_a_timm_backbone():
    backbone = DETRConfig(backbone="resnet18", num_channels=1).backbone_config

    assert isinstance(backbone, TimmBackboneConfig)
    assert (backbone.backbone, backbone.num_channels) == ("resnet18", 1)


def test_backbone_kwargs_set_stages_and_stride():
    options = {"out_indices": [2, 3], "output_stride": 8}

    backbone = DETRConfig(backbone="resnet18", backbone_kwargs=options).backbone_config

    assert (backbone.out_indices, backbone.output_stride) == ([2, 3], 8)


@pytest.mark.parametrize(
    ("options", "use_timm", "known"),
    [
        ({"drop_path_rate": 0.1}, None, r"\['out_indices', 'output_stride'\]"),
        ({"output_stride": 16}, False, r"\['out_indices'\]"),
    ],
)
def test_backbone_kwargs_without_effect_are_refused(options, use_timm, known):
    message = rf"takes {known} here, got \['{next(iter(options))}'\]; pass a backbone_config"
    with pytest.raises(ValueError, match=message):
        DETRConfig(use_timm_backbone=use_timm, backbone_kwargs=options)


def test_name_is_a_transformers_backbone_without_timm(tmp_path):
    ResNetConfig(**TINY_RESNET).save_pretrained(tmp_path)

    backbone = DETRConfig(backbone=str(tmp_path), use_timm_backbone=False).backbone_config

    assert isinstance(backbone, ResNetConfig)
    assert backbone.hidden_sizes == [8, 12, 16, 20]
    assert backbone.out_indices == [-1]
    # Where the pretrained weights are, should they be asked for.
    assert backbone.name_or_path == str(tmp_path)


def test_without_timm_and_without_a_name_it_is_transformers_resnet50():
    backbone = DETRConfig(use_timm_backbone=False, num_channels=1).backbone_config

    assert isinstance(backbone, ResNetConfig)
    assert (backbone.depths, backbone.layer_type) == ((3, 4, 6, 3), "bottleneck")
    assert (backbone.out_indices, backbone.num_channels) == ([-1], 1)


def test_backbone_config_is_taken_as_it_is():
    backbone = ResNetConfig(**TINY_RESNET, out_indices=[3])

    assert DETRConfig(backbone_config=backbone).backbone_config is backbone


def test_dictionary_becomes_a_backbone_config():
    fields = {"model_type": "resnet", **TINY_RESNET, "out_indices": [3]}

    backbone = DETRConfig(backbone_config=fields).backbone_config

    assert isinstance(backbone, ResNetConfig)
    assert (backbone.hidden_sizes, backbone.out_indices) == ([8, 12, 16, 20], [3])
    assert fields["model_type"] == "resnet"


def test_dilation_keeps_the_stride_at_16():
    assert DETRConfig(dilation=True).backbone_config.output_stride == 16


def test_dilation_leaves_a_stride_that_was_given():
    config = DETRConfig(dilation=True, backbone_kwargs={"output_stride": 8})

    assert config.backbone_config.output_stride == 8


def test_dilation_does_not_change_the_callers_backbone_config():
    backbone = TimmBackboneConfig(backbone="resnet18", out_indices=[4])

    config = DETRConfig(backbone_config=backbone, dilation=True)

    assert (config.backbone_config.output_stride, backbone.output_stride) == (16, None)


@pytest.mark.parametrize(
    ("options", "norm", "num_frozen_stages"),
    [
        ({}, "batch", 0),
        ({"use_pretrained_backbone": True}, "frozen", 2),
        ({"use_pretrained_backbone": True, "backbone_norm": "batch"}, "batch", 2),
        ({"use_pretrained_backbone": True, "frozen_backbone_stages": 0}, "frozen", 0),
        ({"backbone_norm": "frozen", "frozen_backbone_stages": 1}, "frozen", 1),
    ],
)
def test_freezing_belongs_to_pretrained_weights_unless_chosen(options, norm, num_frozen_stages):
    config = DETRConfig(**options)

    assert (config.backbone_norm, config.frozen_backbone_stages) == (norm, num_frozen_stages)


# Labels


def test_number_of_labels_counts_objects_only():
    assert labels_of(DETRConfig(num_labels=2)) == (
        2,
        {0: "LABEL_0", 1: "LABEL_1"},
        {"LABEL_0": 0, "LABEL_1": 1},
    )


@pytest.mark.parametrize("id2label", [NAMES, {str(index): name for index, name in NAMES.items()}])
def test_names_need_be_given_in_one_direction_only(id2label):
    expected = (3, NAMES, {"cat": 0, "dog": 1, "owl": 2})

    assert labels_of(DETRConfig(id2label=id2label)) == expected


def test_another_number_of_labels_drops_the_stored_names(tmp_path):
    DETRConfig(id2label=NAMES).save_pretrained(tmp_path)

    assert labels_of(DETRConfig.from_pretrained(tmp_path, num_labels=2)) == (
        2,
        {0: "LABEL_0", 1: "LABEL_1"},
        {"LABEL_0": 0, "LABEL_1": 1},
    )


def test_another_number_of_labels_drops_the_names_of_the_same_call():
    assert labels_of(DETRConfig(id2label=NAMES, num_labels=1)) == (
        1,
        {0: "LABEL_0"},
        {"LABEL_0": 0},
    )


def test_the_same_number_of_labels_keeps_the_stored_names(tmp_path):
    DETRConfig(id2label=NAMES).save_pretrained(tmp_path)

    assert labels_of(DETRConfig.from_pretrained(tmp_path, num_labels=3))[1] == NAMES


@pytest.mark.parametrize("new_names", [{0: "ant", 1: "bee"}, {"0": "ant", "1": "bee"}])
def test_new_names_replace_the_stored_ones_in_both_directions(tmp_path, new_names):
    DETRConfig(id2label=NAMES).save_pretrained(tmp_path)

    config = DETRConfig.from_pretrained(tmp_path, id2label=new_names)

    assert labels_of(config) == (2, {0: "ant", 1: "bee"}, {"ant": 0, "bee": 1})


# Saving


FULL = {
    "backbone": "resnet18",
    "use_pretrained_backbone": True,
    "dilation": True,
    "id2label": NAMES,
    "num_queries": 7,
    "class_cost": 3,
    "position_embedding_type": "learned",
    "auxiliary_loss": False,
}


def test_config_survives_its_dictionary():
    config = DETRConfig(**FULL)

    again = DETRConfig.from_dict(config.to_dict())

    assert again.to_dict() == config.to_dict()
    assert again.backbone_config.output_stride == 16
    assert labels_of(again) == labels_of(config)


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_config_survives_its_file(tmp_path, norm):
    config = DETRConfig(**FULL, backbone_norm=norm, frozen_backbone_stages=1)
    config.save_pretrained(tmp_path)

    again = DETRConfig.from_pretrained(tmp_path)

    assert again.to_dict() == config.to_dict()
    assert (again.backbone_norm, again.frozen_backbone_stages) == (norm, 1)
    assert again.num_queries == 7
    assert not again.auxiliary_loss


def test_file_names_the_backbone_once(tmp_path):
    DETRConfig(backbone="resnet18").save_pretrained(tmp_path)

    fields = json.loads((tmp_path / "config.json").read_text())

    assert fields["model_type"] == "querydet_detr"
    assert fields["backbone_config"]["backbone"] == "resnet18"
    assert not {"backbone", "use_timm_backbone", "backbone_kwargs"} & set(fields)


def test_name_of_a_transformers_backbone_survives_the_file(tmp_path):
    ResNetConfig(**TINY_RESNET).save_pretrained(tmp_path / "backbone")
    folder = str(tmp_path / "backbone")
    DETRConfig(backbone=folder, use_timm_backbone=False).save_pretrained(tmp_path / "detector")

    again = DETRConfig.from_pretrained(tmp_path / "detector")

    assert again.backbone_config.name_or_path == folder


def test_stored_config_can_be_dilated_while_loading(tmp_path):
    DETRConfig(backbone="resnet18").save_pretrained(tmp_path)

    config = DETRConfig.from_pretrained(tmp_path, dilation=True)

    assert config.backbone_config.output_stride == 16


def test_stored_config_can_lose_its_dilation_while_loading(tmp_path):
    DETRConfig(backbone="resnet18", dilation=True).save_pretrained(tmp_path)

    config = DETRConfig.from_pretrained(tmp_path, dilation=False)

    assert (config.dilation, config.backbone_config.output_stride) == (False, None)


def test_channels_reach_the_backbone_of_a_stored_config(tmp_path):
    DETRConfig(backbone="resnet18").save_pretrained(tmp_path)

    config = DETRConfig.from_pretrained(tmp_path, num_channels=4)

    assert (config.num_channels, config.backbone_config.num_channels) == (4, 4)


def test_channels_do_not_change_the_callers_backbone_config():
    backbone_config = ResNetConfig(**TINY_RESNET)

    config = DETRConfig(backbone_config=backbone_config, num_channels=1)

    assert (config.backbone_config.num_channels, backbone_config.num_channels) == (1, 3)


def test_channels_are_those_of_the_given_backbone():
    config = DETRConfig(backbone_config=ResNetConfig(**TINY_RESNET, num_channels=5))

    assert (config.num_channels, config.backbone_config.num_channels) == (5, 5)


# Files of transformers


@pytest.fixture
def transformers_file(tmp_path):
    config = DetrConfig(
        backbone_config=ResNetConfig(**TINY_RESNET, out_features=["stage4"]),
        id2label=NAMES,
        label2id={name: index for index, name in NAMES.items()},
        num_queries=7,
        encoder_ffn_dim=24,
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_config_of_transformers_detr_is_read(transformers_file):
    config = DETRConfig.from_pretrained(transformers_file)

    assert config.model_type == config.to_dict()["model_type"] == "querydet_detr"
    assert "model_type" not in vars(config)
    assert (config.num_queries, config.encoder_ffn_dim) == (7, 24)
    assert config.backbone_config.hidden_sizes == [8, 12, 16, 20]
    assert labels_of(config)[1] == NAMES
    assert not config.is_encoder_decoder


def test_config_of_transformers_detr_has_a_trained_backbone(transformers_file):
    config = DETRConfig.from_pretrained(transformers_file)

    assert (config.backbone_norm, config.frozen_backbone_stages) == ("frozen", 2)


def test_auxiliary_loss_of_transformers_default_is_not_taken_for_a_choice(transformers_file):
    stored = json.loads((transformers_file / "config.json").read_text())

    assert stored["auxiliary_loss"] is False
    assert DETRConfig.from_pretrained(transformers_file).auxiliary_loss
    assert not DETRConfig.from_pretrained(transformers_file, auxiliary_loss=False).auxiliary_loss


@pytest.mark.parametrize("backbone_kwargs", [None, {}, {"out_indices": [1, 2, 3, 4]}])
def test_older_file_with_a_backbone_name_is_read(tmp_path, backbone_kwargs):
    fields = {
        "model_type": "detr",
        "backbone": "resnet101",
        "use_timm_backbone": True,
        "backbone_config": None,
        "backbone_kwargs": backbone_kwargs,
        "dilation": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))

    backbone = DETRConfig.from_pretrained(tmp_path).backbone_config

    assert (backbone.backbone, backbone.output_stride) == ("resnet101", 16)
    assert backbone.out_indices == ([1, 2, 3, 4] if backbone_kwargs else [-1])


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone_norm": "group"}, r"one of \('frozen', 'batch'\), got 'group'"),
        ({"frozen_backbone_stages": -1}, r"frozen_backbone_stages must be 0 or more .*got -1"),
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
        (
            {"class_cost": 0, "bbox_cost": 0, "giou_cost": 0.0},
            "class_cost, bbox_cost and giou_cost are all 0",
        ),
        (
            {"d_model": 12, "encoder_attention_heads": 5},
            "multiple of encoder_attention_heads, got 12 and 5",
        ),
        (
            {"d_model": 12, "encoder_attention_heads": 3, "decoder_attention_heads": 5},
            "multiple of decoder_attention_heads, got 12 and 5",
        ),
        ({"encoder_attention_heads": 0}, "multiple of encoder_attention_heads, got 256 and 0"),
        ({"decoder_attention_heads": -1}, "multiple of decoder_attention_heads, got 256 and -1"),
        (
            {"d_model": 6, "encoder_attention_heads": 3, "decoder_attention_heads": 3},
            "d_model must be a multiple of 4 .*got 6",
        ),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ({"encoder_layers": -1}, "encoder_layers must be at least 0, got -1"),
        ({"encoder_ffn_dim": 0}, "encoder_ffn_dim must be at least 1, got 0"),
        ({"decoder_ffn_dim": 0}, "decoder_ffn_dim must be at least 1, got 0"),
        ({"num_labels": 0}, "num_labels must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"attention_dropout": 1.5}, "attention_dropout must be at least 0 and below 1, got 1.5"),
        ({"activation_dropout": -0.1}, "activation_dropout must be at least 0 .* got -0.1"),
        ({"activation_function": "foo"}, "activation_function must be one of .*relu.* got 'foo'"),
        (
            {"position_embedding_type": "rotary"},
            r"one of \('sine', 'learned'\), got 'rotary'",
        ),
        (
            {"position_embeddings_at": "value"},
            r"position_embeddings_at must be one of \('attention', 'input'\), got 'value'",
        ),
    ],
)
def test_fields_that_do_not_fit_are_an_error(options, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        DETRConfig(**options)


def test_field_of_a_wrong_type_is_an_error():
    with pytest.raises(StrictDataclassFieldValidationError, match="num_queries"):
        DETRConfig(num_queries="many")


@pytest.mark.parametrize(
    "backbone_config",
    [ResNetConfig(**TINY_RESNET), {"model_type": "resnet", **TINY_RESNET}],
    ids=["config", "dictionary"],
)
def test_backbone_named_twice_is_an_error(backbone_config):
    with pytest.raises(ValueError, match="backbone='resnet18' was given, and a backbone_config"):
        DETRConfig(backbone="resnet18", backbone_config=backbone_config)


def test_other_backbone_for_a_stored_config_is_an_error(tmp_path):
    DETRConfig(backbone="resnet18").save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"backbone='resnet34' was given.* a stored configuration"):
        DETRConfig.from_pretrained(tmp_path, backbone="resnet34")


def test_dictionary_without_a_type_is_an_error():
    with pytest.raises(ValueError, match=r"needs a 'model_type'.* with \['backbone'\]"):
        DETRConfig(backbone_config={"backbone": "resnet18"})


@pytest.mark.parametrize(
    "options",
    [{"use_timm_backbone": False}, {"backbone_config": ResNetConfig(**TINY_RESNET)}],
)
def test_dilation_of_a_transformers_backbone_is_an_error(options):
    with pytest.raises(ValueError, match=r"dilation=True needs a timm backbone, .* type 'resnet'"):
        DETRConfig(dilation=True, **options)
