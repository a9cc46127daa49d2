"""Repositories as they lie on the Hub: of several years, panoptic ones, wrong ones."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_BACKBONE, perturb, picture, tiny_batch, tiny_config
from transformers import (
    AutoModelForObjectDetection,
    ConditionalDetrConfig,
    ConditionalDetrForSegmentation,
    DetrConfig,
    DetrForObjectDetection,
    DetrForSegmentation,
    PreTrainedModel,
    YolosConfig,
)

from hf_querydet import (
    VARIANTS,
    ConditionalDETRForObjectDetection,
    DeformableDETRConfig,
    DeformableDETRForObjectDetection,
    DeformableDETRModel,
    DETRForObjectDetection,
    DETRImageProcessor,
    SparseRCNNForObjectDetection,
    load_detector,
)
from hf_querydet.checkpoint_mapping_utils import weight_renamings
from hf_querydet.conversion.transformers_export import transformers_config

OF_TRANSFORMERS = [name for name, row in VARIANTS.items() if row.transformers_names]
# What version 4 wrote beside the fields of today.
OLD_FIELDS = {
    "classifier_dropout": 0.0,
    "init_std": 0.02,
    "init_xavier_std": 1.0,
    "is_encoder_decoder": True,
    "max_position_embeddings": 1024,
    "num_hidden_layers": 2,
    "scale_embedding": False,
    "torch_dtype": "float32",
    "transformers_version": "4.30.0",
}
BACKBONES = {
    # Since version 4.27, and what became of it.
    "timm": {
        "backbone": "resnet50",
        "backbone_config": None,
        "backbone_kwargs": None,
        "dilation": True,
        "use_pretrained_backbone": True,
        "use_timm_backbone": True,
    },
    "timm with options": {
        "backbone": "resnet50",
        "backbone_config": None,
        "backbone_kwargs": {"in_chans": 3, "out_indices": [2, 3, 4], "output_stride": 16},
        "dilation": True,
        "use_timm_backbone": True,
    },
    # The revisions called no_timm.
    "transformers": {
        "backbone": None,
        "backbone_config": {**TINY_BACKBONE, "out_features": ["stage4"], "out_indices": [4]},
        "dilation": None,
        "use_pretrained_backbone": None,
        "use_timm_backbone": False,
    },
    # Conditional DETR's kept a name that it did not mean.
    "transformers with a name": {
        "backbone": "resnet50",
        "backbone_config": {**TINY_BACKBONE, "out_features": ["stage4"], "out_indices": [4]},
        "use_timm_backbone": False,
    },
}


def stored_config(variant):
    """What transformers stores for a tiny detector, without its backbone."""
    fields = transformers_config(tiny_config(VARIANTS, variant)).to_dict()
    del fields["backbone_config"]
    return json.loads(json.dumps(fields, default=str))


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("variant", OF_TRANSFORMERS)
def test_configuration_of_version_4_is_read(variant, kind, tmp_path, caplog):
    stored = {**stored_config(variant), **OLD_FIELDS, **BACKBONES[kind]}
    (tmp_path / "config.json").write_text(json.dumps(stored))

    config = VARIANTS[variant].config.from_pretrained(tmp_path)

    assert not caplog.records
    assert (config.encoder_layers, config.decoder_layers) == (2, 3)
    backbone = config.backbone_config
    if kind.startswith("transformers"):
        assert (backbone.model_type, config.dilation) == ("resnet", False)
    else:
        assert (backbone.backbone, backbone.output_stride) == ("resnet50", 16)
    assert (config.backbone_norm, config.frozen_backbone_stages) == ("frozen", 2)


@pytest.mark.parametrize("variant", OF_TRANSFORMERS)
def test_tensors_of_version_4_are_used(variant, tmp_path):
    """It had learned positions in the backbone, and timm's network in its own wrapper."""
    changes = {"position_embedding_type": "learned"}
    changes["backbone_config"] = {"model_type": "timm_backbone", "backbone": "test_resnet"}
    if variant == "deformable_detr":
        changes["backbone_config"]["out_indices"] = [-3, -2, -1]
    config = transformers_config(tiny_config(VARIANTS, variant, **changes))
    expected = perturb(AutoModelForObjectDetection.from_config(config)).eval()
    expected.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {
        re.sub(
            r"backbone\.(conv_encoder\.)?model\.", r"backbone.conv_encoder.model._backbone.", name
        ).replace("model.position_embedding.", "model.backbone.position_embedding."): value
        for name, value in stored.items()
    }
    assert len(renamed.keys() - stored.keys()) > 10
    assert any("backbone.position_embedding" in name for name in renamed)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})

    model, info = VARIANTS[variant].detector.from_pretrained(tmp_path, output_loading_info=True)

    assert not any(info.values())
    batch = tiny_batch()
    with torch.no_grad():
        actual, wanted = model.eval()(**batch), expected(**batch)
    torch.testing.assert_close(actual.logits, wanted.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.pred_boxes, wanted.pred_boxes, rtol=0, atol=1e-5)


def test_loading_says_nothing_where_nothing_is_wrong(tmp_path, caplog):
    fields = transformers_config(tiny_config(VARIANTS, "detr"))
    DetrForObjectDetection(fields).save_pretrained(tmp_path)
    caplog.clear()
    DETRForObjectDetection.from_pretrained(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("planned", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_planned_device_map_leaves_a_detector_whole(planned, tmp_path, monkeypatch):
    DETRForObjectDetection(tiny_config(VARIANTS, "detr")).save_pretrained(tmp_path)
    load, maps = PreTrainedModel.from_pretrained.__func__, []

    def spy(cls, *args, **kwargs):
        maps.append(kwargs["device_map"])
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(spy))
    model = DETRForObjectDetection.from_pretrained(tmp_path, device_map=planned)
    assert [set(each) for each in maps] == [{""}]
    assert len({value.device for value in model.parameters()}) == 1


# ---- panoptic ------------------------------------------------------------------------------------


# Names of version 4 in a mask head, and those of version 5.
OLD_MASK_NAMES = {"bbox_attention.q_proj": "bbox_attention.q_linear"}
OLD_MASK_NAMES |= {"mask_head.conv1.conv": "mask_head.lay1"}


@pytest.mark.parametrize("layout", ["version 5", "version 4"])
@pytest.mark.parametrize(
    ("config_class", "their_class", "our_class"),
    [
        (DetrConfig, DetrForSegmentation, DETRForObjectDetection),
        (
            ConditionalDetrConfig,
            ConditionalDetrForSegmentation,
            ConditionalDETRForObjectDetection,
        ),
    ],
)
def test_panoptic_repository_gives_its_detector(
    config_class, their_class, our_class, layout, tmp_path, caplog
):
    config = config_class(
        num_labels=6,
        num_queries=5,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        auxiliary_loss=False,
        backbone_config={**TINY_BACKBONE, "out_indices": [1, 2, 3, 4]},
    )
    expected = perturb(their_class(config)).eval()
    expected.save_pretrained(tmp_path)
    if layout == "version 4":
        path, old = tmp_path / "model.safetensors", {}
        for name, value in load_file(path).items():
            for new_name, old_name in OLD_MASK_NAMES.items():
                name = name.replace(new_name, old_name)
            name = name.replace("backbone.model.", "backbone.conv_encoder.model.")
            old[name.replace(".o_proj.", ".out_proj.").replace(".mlp.fc", ".fc")] = value
        save_file(old, path, metadata={"format": "pt"})
    caplog.clear()

    model, info = our_class.from_pretrained(tmp_path, output_loading_info=True)

    assert not any(info.values())
    (record,) = caplog.records
    assert "its mask head is ignored (32 tensors of bbox_attention and mask_head)" in record.message
    batch = tiny_batch()
    with torch.no_grad():
        actual, wanted = model.eval()(**batch), expected(**batch)
    torch.testing.assert_close(actual.logits, wanted.logits, rtol=0, atol=1e-5)
    if our_class is DETRForObjectDetection:
        # transformers' panoptic Conditional DETR leaves out the reference points of boxes.
        torch.testing.assert_close(actual.pred_boxes, wanted.pred_boxes, rtol=0, atol=1e-5)


def test_image_processor_of_a_panoptic_repository_takes_boxes(tmp_path):
    content = {"feature_extractor_type": "DetrFeatureExtractor", "format": "coco_panoptic"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**content, "size": 64}))
    processor = DETRImageProcessor.from_pretrained(tmp_path)
    annotation = {"bbox": [1, 2, 30, 20], "category_id": 3, "area": 600, "iscrowd": 0}
    inputs = processor(
        picture(60, 40),
        annotations={"image_id": 1, "annotations": [annotation]},
        return_tensors="pt",
    )
    assert inputs["labels"][0]["class_labels"].tolist() == [3]


# ---- other architectures -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("our_class", "model_type", "message"),
    [
        (DeformableDETRForObjectDetection, "detr", "load it with DETRForObjectDetection"),
        (DeformableDETRModel, "conditional_detr", "load it with ConditionalDETRForObjectDet"),
        (DETRForObjectDetection, "deformable_detr", "load it with DeformableDETRForObjectDetec"),
        (SparseRCNNForObjectDetection, "detr", "load it with DETRForObjectDetection"),
        (DETRForObjectDetection, "querydet_sparse_rcnn", "load it with SparseRCNNForObjectDetec"),
    ],
)
def test_repository_of_another_detector_names_the_class_that_fits(
    our_class, model_type, message, tmp_path
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=f"holds a model of type '{model_type}', .*: {message}"):
        our_class.from_pretrained(tmp_path)


def test_repository_of_an_architecture_that_is_not_here_says_so(tmp_path):
    YolosConfig().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"'yolos', and DETRConfig .* this library has no such det"
    ):
        DETRForObjectDetection.from_pretrained(tmp_path)


@pytest.mark.parametrize("way", ["keyword", "config"])
def test_heads_of_a_refined_detector_are_not_dropped_in_silence(way, tmp_path):
    config = tiny_config(VARIANTS, "deformable_detr", with_box_refine=True)
    DeformableDETRForObjectDetection(config).save_pretrained(tmp_path)
    options = {"with_box_refine": False}
    if way == "config":
        options = {"config": tiny_config(VARIANTS, "deformable_detr")}
    with pytest.raises(ValueError, match=r"with_box_refine=False, but .* heads of their own"):
        DeformableDETRForObjectDetection.from_pretrained(tmp_path, **options)
    # A configuration without weights may change.
    assert not DeformableDETRConfig.from_pretrained(tmp_path, with_box_refine=False).with_box_refine


# ---- backbones whose parts are called as a transformer's -----------------------------------------


STAGES = {"depths": [1, 1, 1, 1], "out_indices": [2, 3, 4]}
NETWORKS = {
    "swin": {
        "model_type": "swin",
        "embed_dim": 8,
        "num_heads": [1, 1, 1, 1],
        "window_size": 4,
        "image_size": 64,
        **STAGES,
    },
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 12, 16, 24], **STAGES},
    "timm convnext": {
        "model_type": "timm_backbone",
        "backbone": "test_convnext",
        "out_indices": [-3, -2, -1],
    },
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("variant", OF_TRANSFORMERS)
def test_no_expression_renames_a_backbone(variant, network):
    config = tiny_config(VARIANTS, variant, backbone_config=dict(NETWORKS[network]))
    with torch.device("meta"):
        names = VARIANTS[variant].detector(config).state_dict()
    for renaming in weight_renamings(VARIANTS[variant].transformers_names):
        for name in names:
            assert renaming.rename_source_key(name)[0] == name


@pytest.mark.parametrize("network", NETWORKS)
def test_transformers_detector_with_another_backbone_loads(network, tmp_path):
    config = tiny_config(VARIANTS, "detr", backbone_config=dict(NETWORKS[network]))
    expected = perturb(DetrForObjectDetection(transformers_config(config))).eval()
    expected.save_pretrained(tmp_path / "theirs")
    model, info = DETRForObjectDetection.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(info.values())
    model.save_pretrained(tmp_path / "ours")
    DETRImageProcessor().save_pretrained(tmp_path / "ours")
    reloaded, _ = load_detector(tmp_path / "ours")
    batch = {"pixel_values": torch.randn(2, 3, 64, 64)}
    with torch.no_grad():
        wanted = expected(**batch).logits
        for each in (model, reloaded):
            torch.testing.assert_close(each.eval()(**batch).logits, wanted, rtol=0, atol=1e-5)
