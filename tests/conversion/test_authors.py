"""The authors' checkpoints against plain functions that read them by their own names."""

import argparse
import functools
import json

import authors_files
import authors_forward
import pytest
import sparse_rcnn_golden
import torch
from authors_files import RESNET18, RESNET50, RESNET101
from tiny import picture, tiny_batch
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

from hf_querydet import VARIANTS
from hf_querydet.checkpoint_mapping_utils import AuthorsTensors, renamed
from hf_querydet.conversion import (
    Checkpoint,
    CheckpointError,
    convert_checkpoint,
    convert_tensors,
)

HEADS = 4
SMALL = {"kind": RESNET18, "size": 64, "inner": 40, "layers": (2, 3), "classes": 5}
SMALL_SIZES = {
    "detr": {**SMALL, "queries": 7},
    "conditional_detr": {**SMALL, "queries": 7},
    "deformable_detr": {**SMALL, "queries": 7, "heads": HEADS, "points": (3, 2)},
    "anchor_detr": {**SMALL, "positions": 5, "patterns": 2},
    "sparse_rcnn": {
        "kind": RESNET18,
        "size": 32,
        "inner": 40,
        "stages": 2,
        "proposals": 5,
        "classes": 4,
        "dynamic": 8,
        "bins": 3,
    },
}
REFINE = {"refine": True}
TWO_STAGE = {"refine": True, "two_stage": True}
# Variant, changes of its sizes, arguments of the function, options of the training script.
CASES = {
    "detr": ("detr", {}, {}, {}),
    "detr learned": ("detr", {"learned": True}, {}, {}),
    "conditional": ("conditional_detr", {}, {}, {}),
    "conditional one layer": ("conditional_detr", {"layers": (1, 1)}, {}, {}),
    "deformable": ("deformable_detr", {}, {}, {}),
    "deformable one level": ("deformable_detr", {"levels": 1}, {}, {}),
    "deformable five levels": ("deformable_detr", {"levels": 5}, {}, {}),
    "deformable refine": ("deformable_detr", REFINE, {}, {}),
    # More proposals than tokens without one, which are all alike.
    "deformable two-stage": (
        "deformable_detr",
        TWO_STAGE,
        {"proposals": 150},
        {"num_queries": 150},
    ),
    "anchor": ("anchor_detr", {}, {}, {}),
    "anchor grid": (
        "anchor_detr",
        {"grid": True},
        {"grid_side": 2},
        {"num_query_position": 5},
    ),
    "anchor full": ("anchor_detr", {"full": True}, {}, {}),
    "sparse": ("sparse_rcnn", {}, {}, {}),
    "sparse softmax": ("sparse_rcnn", {"focal": False, "towers": (2, 1)}, {}, {}),
}


@functools.lru_cache(maxsize=3)
def filled(variant, changes):
    shapes = getattr(authors_files, variant)(**{**SMALL_SIZES[variant], **dict(changes)})
    return authors_files.fill(shapes)


def tensors_of(variant, **changes):
    return dict(filled(variant, tuple(changes.items())))


def convert(variant, tensors, options=None, *, dilation=False, **arguments):
    """Convert what stands in no file; four heads are told by the options or as an override."""
    checkpoint = Checkpoint(AuthorsTensors(tensors), options or {})
    heads = {"decoder_attention_heads": HEADS}
    if variant != "sparse_rcnn":
        heads["encoder_attention_heads"] = HEADS
    arguments["overrides"] = heads | arguments.get("overrides", {})
    return convert_tensors(checkpoint, variant, dilation=dilation, **arguments)


def assert_equal_detections(model, variant, tensors, batch, **options):
    with torch.no_grad():
        actual = model(**batch)
        logits, boxes = getattr(authors_forward, variant)(
            tensors, batch["pixel_values"], batch["pixel_mask"] == 0, heads=HEADS, **options
        )
    torch.testing.assert_close(actual.logits, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.pred_boxes, boxes, rtol=0, atol=1e-5)
    # The comparison means something only where queries differ.
    assert logits.std(1).mean() > 1e-3
    assert boxes.std(1).mean() > 1e-3


# ---- the same detections -------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_converted_detector_gives_the_authors_detections(case):
    variant, changes, arguments, options = CASES[case]
    tensors = tensors_of(variant, **changes)
    model = convert(variant, tensors, options).model
    assert_equal_detections(model, variant, tensors, tiny_batch(), **arguments)


@pytest.mark.parametrize(
    ("variant", "changes", "dilation"),
    [
        ("detr", {}, False),
        ("detr", {}, True),
        ("deformable_detr", {"levels": 1}, True),
        ("conditional_detr", {}, True),
        ("anchor_detr", {}, True),
        ("sparse_rcnn", {}, False),
    ],
    ids=[
        "DETR",
        "DETR DC5",
        "Deformable DETR DC5",
        "Conditional DETR DC5",
        "Anchor DETR DC5",
        "Sparse R-CNN",
    ],
)
def test_resnet50_gives_the_authors_detections(variant, changes, dilation):
    tensors = tensors_of(variant, kind=RESNET50, **changes)
    model = convert(variant, tensors, dilation=dilation).model
    arguments = {"dilation": True} if dilation else {}
    assert_equal_detections(model, variant, tensors, tiny_batch(), **arguments)


def test_three_levels_of_anchor_detr_need_dilation():
    tensors = tensors_of("anchor_detr", kind=RESNET50, levels=3)
    model = convert("anchor_detr", tensors, dilation=True).model
    batch = {name: value[1:] for name, value in tiny_batch().items()}
    assert_equal_detections(model, "anchor_detr", tensors, batch, dilation=True)


@pytest.mark.parametrize("variant", SMALL_SIZES)
def test_directory_of_a_file_loads_everywhere(variant, tmp_path):
    tensors = tensors_of(variant)
    content = {
        "model": {f"module.{name}": value for name, value in tensors.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "lr_scheduler": {"last_epoch": 49},
        "epoch": 49,
        "args": argparse.Namespace(nheads=HEADS, dilation=False, lr_backbone_names=["backbone.0"]),
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    output_dir = tmp_path / "converted"

    overrides = {"decoder_attention_heads": HEADS} if variant == "sparse_rcnn" else None
    convert_checkpoint(tmp_path / "checkpoint.pth", output_dir, variant, overrides=overrides)

    assert {path.name for path in output_dir.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    model = AutoModelForObjectDetection.from_pretrained(output_dir).eval()
    assert type(model) is VARIANTS[variant].detector
    assert_equal_detections(model, variant, tensors, tiny_batch())
    processor = AutoImageProcessor.from_pretrained(output_dir, size={"shortest_edge": 64})
    assert type(processor) is VARIANTS[variant].image_processor
    detect = pipeline("object-detection", model=str(output_dir), image_processor=processor)
    found = detect(picture(90, 60), threshold=0.0)
    assert {detection["label"] for detection in found} <= set(model.config.id2label.values())
    assert found


def test_plain_functions_of_sparse_rcnn_agree_with_the_authors_modules():
    # In double: other orders of sums differ by more than the printed digits in single.
    tensors = sparse_rcnn_golden.head_tensors()
    tensors = authors_forward.Names({name: value.double() for name, value in tensors.items()})
    levels, boxes, features = sparse_rcnn_golden.inputs()
    levels, boxes, features = [x.double() for x in levels], boxes.double(), features.double()
    all_boxes = []
    for index in range(sparse_rcnn_golden.NUM_STAGES):
        logits, boxes, features = authors_forward.sparse_stage(
            tensors.part(f"head_series.{index}"), levels, boxes, features, heads=8
        )
        all_boxes.append(boxes)
    sparse_rcnn_golden.assert_golden(logits.float(), [boxes.float() for boxes in all_boxes])


# ---- released sizes ------------------------------------------------------------------------------


# Number of tensors in a file, variant, sizes, dilation, name of the configuration.
RELEASED = [
    (458, "detr", {}, False, "r50"),
    (458, "detr", {}, True, "r50-dc5"),
    (713, "detr", {"kind": RESNET101}, False, "r101"),
    (549, "deformable_detr", {"levels": 1}, False, "r50-single-scale"),
    (549, "deformable_detr", {"levels": 1}, True, "r50-single-scale-dc5"),
    (561, "deformable_detr", {}, False, "r50"),
    (597, "deformable_detr", REFINE, False, "r50-refine"),
    (630, "deformable_detr", TWO_STAGE, False, "r50-two-stage"),
    (564, "conditional_detr", {}, False, "r50"),
    (564, "conditional_detr", {}, True, "r50-dc5"),
    (819, "conditional_detr", {"kind": RESNET101}, False, "r101"),
    (507, "anchor_detr", {}, False, "r50"),
    (507, "anchor_detr", {}, True, "r50-dc5"),
    (762, "anchor_detr", {"kind": RESNET101}, False, "r101"),
    (None, "sparse_rcnn", {}, False, "r50-100"),
    (None, "sparse_rcnn", {"proposals": 300}, False, "r50-300"),
    (None, "sparse_rcnn", {"kind": RESNET101, "proposals": 300}, False, "r101-300"),
]


@pytest.mark.parametrize(
    ("num_tensors", "variant", "sizes", "dilation", "name"),
    RELEASED,
    ids=[f"{row[1]} {row[4]}" for row in RELEASED],
)
def test_released_files_fit_their_named_configurations(num_tensors, variant, sizes, dilation, name):
    shapes = getattr(authors_files, variant)(**sizes)
    assert num_tensors in (None, len(shapes))
    row = VARIANTS[variant]
    # Without memory behind them.
    tensors = AuthorsTensors({n: torch.zeros(1).expand(shape) for n, shape in shapes.items()})

    told = row.authors.config(tensors, {})

    expected = row.config.from_name(name, use_pretrained_backbone=False)
    config = row.config(**told, dilation=dilation)
    assert (
        config.to_dict()
        == row.config(
            **{"backbone": told["backbone"], **row.config.named_configurations[name]},
            num_labels=expected.num_labels,
        ).to_dict()
    )
    with torch.device("meta"):
        wanted = row.detector(expected).state_dict()
    places = {
        target: (shape[0] // len(targets), *shape[1:])
        for source, shape in shapes.items()
        for targets in [renamed(source, row.authors.names(config))]
        for target in targets
    }
    assert places == {
        target: tuple(value.shape)
        for target, value in wanted.items()
        if not target.endswith("num_batches_tracked")
    }


def test_sparse_rcnn_files_have_the_number_of_parameters_of_the_released_ones():
    shapes = authors_files.sparse_rcnn()
    count = sum(
        torch.Size(shape).numel() for name, shape in shapes.items() if "running_" not in name
    )
    assert round(count / 1e6, 2) == 106.29


def test_panoptic_file_gives_its_detector_and_names_the_mask_head():
    shapes = authors_files.detr_panoptic()
    assert len(shapes) == 490
    tensors = authors_files.fill(
        authors_files.detr_panoptic(**{**SMALL_SIZES["detr"], "classes": 250})
    )

    conversion = convert("detr", tensors)

    assert "4 of bbox_attention, 28 of mask_head" in conversion.summary()
    assert "labels: 250, 0 with a name; --labels names them" in conversion.summary()
    assert conversion.model.config.num_labels == 250
    alone = {name.removeprefix("detr."): v for name, v in tensors.items() if "detr." in name}
    assert_equal_detections(conversion.model, "detr", alone, tiny_batch())


# ---- configuration -------------------------------------------------------------------------------


def test_settings_follow_the_options_of_the_training_script():
    options = {
        "nheads": 2,
        "dropout": 0.25,
        "aux_loss": False,
        "set_cost_class": 3.0,
        "bbox_loss_coef": 4,
        "eos_coef": 0.2,
        "dilation": False,
        "lr": 1e-4,
    }
    checkpoint = Checkpoint(AuthorsTensors(tensors_of("detr")), options)
    config = convert_tensors(checkpoint, "detr").model.config
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (2, 2)
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.25,) * 3
    assert (config.class_cost, config.bbox_loss_coefficient, config.eos_coefficient) == (3, 4, 0.2)
    assert not config.auxiliary_loss


def test_backbone_is_frozen_as_it_was_trained():
    config = convert("detr", tensors_of("detr")).model.config
    assert (config.backbone_norm, config.frozen_backbone_stages) == ("frozen", 2)


@pytest.mark.parametrize(
    ("dilation", "options", "expected"),
    [
        (True, {"dilation": False}, True),
        (False, {"dilation": True}, False),
        (None, {"dilation": True}, True),
        (None, {"dilation": "True"}, True),
        (None, {"dilation": "false"}, False),
    ],
)
def test_dilation_is_that_of_the_flag_else_of_the_options(dilation, options, expected):
    conversion = convert("detr", tensors_of("detr"), options, dilation=dilation)
    assert conversion.model.config.dilation is expected


@pytest.mark.parametrize("variant", ["detr", "conditional_detr", "anchor_detr"])
def test_where_both_were_released_dilation_must_be_known(variant):
    with pytest.raises(CheckpointError, match="pass --dc5 or --no-dc5"):
        convert(variant, tensors_of(variant), dilation=None)
    conversion = convert(variant, tensors_of(variant), {"dilation": True}, dilation=None)
    assert conversion.model.config.backbone_config.output_stride == 16


def test_only_single_scale_models_may_be_dilated():
    config = convert("deformable_detr", tensors_of("deformable_detr"), dilation=None).model.config
    assert config.num_feature_levels > 1
    assert not config.dilation
    assert VARIANTS["deformable_detr"].authors.may_be_dilated({"num_feature_levels": 1})
    assert not convert(
        "sparse_rcnn", tensors_of("sparse_rcnn"), dilation=None
    ).model.config.dilation


def test_fields_can_be_overridden():
    overrides = {
        "model_type": "querydet_detr",
        "eos_coefficient": 0.3,
        "id2label": {0: "a"} | dict.fromkeys(range(1, 5), "b"),
    }
    backbone = {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [1, 4]}
    model = convert(
        "detr", tensors_of("detr"), overrides={**overrides, "backbone_config": backbone}
    ).model
    assert model.config.eos_coefficient == 0.3
    assert model.config.id2label[0] == "a"
    assert model.config.backbone_config.out_indices == [1, 4]


def test_configuration_of_a_converted_detector_converts_the_file_again():
    tensors = tensors_of("deformable_detr")
    names = {label: f"name {label}" for label in range(5)}
    first = convert("deformable_detr", tensors, dilation=True, labels=names).model.config
    stored = json.loads(first.to_json_string())
    again = convert("deformable_detr", tensors, dilation=None, overrides=stored).model.config
    assert again.to_dict() == first.to_dict()
    named = convert("deformable_detr", tensors, overrides=stored, labels={0: "ant"}).model.config
    assert (named.id2label[0], named.label2id["ant"]) == ("ant", 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_query": 7, "d_mode": 3}, "DETRConfig has no fields 'd_mode', 'num_query'"),
        ({"model_type": "deformable_detr"}, "of type 'deformable_detr', but .* 'querydet_detr'"),
        ({"encoder_attention_heads": 5}, "not possible: .*\n?.*multiple of encoder_attention"),
        ({"encoder_layers": 3}, "12 missing|16 missing"),
    ],
)
def test_overrides_that_do_not_fit_are_an_error(overrides, message):
    with pytest.raises(ValueError, match=message):
        convert("detr", tensors_of("detr"), overrides=overrides)


# ---- labels --------------------------------------------------------------------------------------


def labels_of(variant, classes, labels=None):
    changes = {"classes": classes}
    return convert(variant, tensors_of(variant, **changes), labels=labels).model.config.id2label


def test_91_labels_are_coco_with_its_holes():
    names = labels_of("detr", 91)
    assert len(names) == 91
    assert [names[i] for i in (0, 1, 12, 13, 17, 90)] == [
        "N/A",
        "person",
        "N/A",
        "stop sign",
        "cat",
        "toothbrush",
    ]
    assert sum(name == "N/A" for name in names.values()) == 11


def test_80_labels_of_sparse_rcnn_are_coco_without_holes():
    names = labels_of("sparse_rcnn", 80)
    assert [names[i] for i in (0, 11, 15, 79)] == ["person", "stop sign", "cat", "toothbrush"]


def test_80_labels_of_detr_are_coco_only_when_it_is_said():
    assert labels_of("detr", 80)[0] == "LABEL_0"
    assert labels_of("detr", 80, "coco")[0] == "person"


def test_names_leave_unused_slots():
    assert labels_of("detr", 4, {1: "ant", 3: "bee"}) == {0: "N/A", 1: "ant", 2: "N/A", 3: "bee"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("coco", "COCO has 91 labels with its gaps and 80 without, but the detector has 4"),
        ({0: "a", 4: "b"}, r"has 4 labels, 0 to 3, but there are 2 names, .* the labels \[4\]"),
        ({}, "has 4 labels, 0 to 3, but there are 0 names"),
    ],
)
def test_names_that_do_not_fit_are_an_error(labels, message):
    with pytest.raises(ValueError, match=message):
        labels_of("detr", 4, labels)


# ---- files that do not fit -----------------------------------------------------------------------


def test_every_tensor_without_a_place_is_listed():
    tensors = tensors_of("detr")
    del tensors["transformer.decoder.norm.bias"]
    tensors["transformer.decoder.norm.weight"] = torch.ones(3)
    tensors["transformer.encoder.layers.1.self_attn.in_proj_bias"] = torch.ones(7)
    tensors["extra.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError) as raised:
        convert("detr", tensors)
    assert str(raised.value) == (
        "The tensors of the checkpoint do not fit the model.\n"
        "1 unexpected:\n"
        "  extra.weight\n"
        "1 missing, by their names here:\n"
        "  model.decoder_norm.bias\n"
        "4 of a wrong shape:\n"
        "  transformer.decoder.norm.weight: (3,), expected (64,)\n"
        + "\n".join(
            f"  transformer.encoder.layers.1.self_attn.in_proj_bias (part {part} of 3): (7,), "
            "expected (64,)"
            for part in (1, 2, 3)
        )
    )


def test_long_lists_are_cut():
    with pytest.raises(CheckpointError, match=r"(?s)unexpected:.*\.\.\. and \d+ more"):
        convert("detr", tensors_of("detr") | {f"more.{i}": torch.ones(1) for i in range(30)})


def test_tensor_that_tells_the_configuration_is_named_when_it_is_missing():
    with pytest.raises(CheckpointError, match=r"lacks 'query_embed\.weight', which tells"):
        convert("detr", {k: v for k, v in tensors_of("detr").items() if "query_embed" not in k})
    tensors = tensors_of("detr") | {"query_embed.weight": torch.ones(7)}
    with pytest.raises(CheckpointError, match=r"'query_embed\.weight' has the shape \(7,\)"):
        convert("detr", tensors)


def test_checkpoint_of_another_variant_is_an_error():
    with pytest.raises(CheckpointError, match=r"lacks 'class_embed\.weight'.*another variant"):
        convert("detr", tensors_of("deformable_detr"))


def test_unknown_backbone_is_an_error():
    tensors = {k: v for k, v in tensors_of("detr").items() if "layer3.1." not in k}
    with pytest.raises(CheckpointError, match=r"\(2, 2, 1, 2\) blocks in its four stages"):
        convert("detr", tensors)


def test_pre_norm_is_an_error():
    tensors = tensors_of("detr") | {"transformer.encoder.norm.weight": torch.ones(64)}
    with pytest.raises(CheckpointError, match="trained with pre_norm"):
        convert("detr", tensors)


def test_points_that_heads_do_not_share_evenly_are_an_error():
    with pytest.raises(CheckpointError, match="set encoder_attention_heads by --config"):
        convert(
            "deformable_detr",
            tensors_of("deformable_detr"),
            overrides={"encoder_attention_heads": 32},
        )


@pytest.mark.parametrize("name", ["class_embed.2.bias", "bbox_embed.1.layers.0.weight"])
def test_copies_of_one_head_that_differ_are_an_error(name):
    tensors = tensors_of("deformable_detr")
    tensors[name] = tensors[name] + 1
    with pytest.raises(CheckpointError, match=rf"one in this detector differ.*\n.* and {name}"):
        convert("deformable_detr", tensors)


def test_left_overs_of_profilers_and_counters_are_ignored():
    tensors = tensors_of("detr")
    extra = {"transformer.total_ops": torch.ones(1), "class_embed.total_params": torch.ones(1)}
    extra["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(3)
    conversion = convert("detr", tensors | extra)
    assert set(conversion.ignored) == set(extra)


def test_mixed_types_become_the_widest():
    tensors = {name: tensor.half() for name, tensor in tensors_of("detr").items()}
    assert convert("detr", tensors).model.dtype == torch.float16
    tensors["class_embed.bias"] = tensors["class_embed.bias"].float() + 1e-5
    model = convert("detr", tensors).model
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert torch.equal(model.class_head.bias, tensors["class_embed.bias"])


@pytest.mark.parametrize("variant", ["efficient_detr", "yolo"])
def test_variant_without_published_checkpoints_is_an_error(variant, tmp_path):
    with pytest.raises(ValueError, match=f"variant must be one of detr, .*got '{variant}'"):
        convert_checkpoint(tmp_path / "nothing.pth", tmp_path / "out", variant)


def test_nothing_is_left_of_a_conversion_that_failed(tmp_path, monkeypatch):
    torch.save(tensors_of("detr"), tmp_path / "bare.pth")

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(VARIANTS["detr"].image_processor, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        convert_checkpoint(tmp_path / "bare.pth", tmp_path / "out", "detr", dilation=False)
    assert [path.name for path in tmp_path.iterdir()] == ["bare.pth"]


def test_directory_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty; name a new directory"):
        convert_checkpoint(tmp_path / "any.pth", tmp_path, "detr")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
