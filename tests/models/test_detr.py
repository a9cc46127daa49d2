"""DETR against transformers' DETR, against the paper's numbers, and what only this paper claims."""

from itertools import pairwise

import pytest
import torch
from tiny import NUM_LABELS, TINY_BACKBONE, perturb, tiny_batch, tiny_labels
from transformers import DetrConfig, DetrForObjectDetection

from hf_querydet import VARIANTS, DETRConfig, DETRForObjectDetection, load_detector
from hf_querydet.checkpoint_mapping_utils import weight_renamings
from hf_querydet.models.detr.checkpoint_mapping import TRANSFORMERS_NAMES

SMALL = {
    "num_labels": NUM_LABELS,
    "num_queries": 7,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
}
PEERS = {
    "timm": {"backbone_config": {"model_type": "timm_backbone", "backbone": "test_resnet"}},
    "dc5": {
        "backbone_config": {
            "model_type": "timm_backbone",
            "backbone": "test_resnet",
            "output_stride": 16,
        },
        "dilation": True,
    },
    "transformers": {"backbone_config": TINY_BACKBONE},
    "learned": {"backbone_config": TINY_BACKBONE, "position_embedding_type": "learned"},
}


def peer(**fields):
    """A perturbed detector of transformers, whose forward auxiliary losses would change."""
    config = DetrConfig(**{**SMALL, **fields}, auxiliary_loss=False)
    return perturb(DetrForObjectDetection(config), scale=0.3).eval()


def assert_equal_detections(model, expected_model, **inputs):
    with torch.no_grad():
        actual, expected = model.eval()(**inputs), expected_model(**inputs)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-5)
    # The comparison means something only where queries differ.
    assert expected.pred_boxes.std(1).mean() > 1e-4
    assert expected.logits.std(1).mean() > 1e-4


@pytest.mark.parametrize("kind", PEERS)
def test_same_weights_give_the_detections_of_transformers(kind, tmp_path):
    expected = peer(**PEERS[kind])
    expected.save_pretrained(tmp_path)

    model, info = DETRForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)

    assert not any(info.values())
    assert_equal_detections(model, expected, **tiny_batch())


@pytest.mark.parametrize("options", [{}, {"dilation": True}], ids=["R50", "R50-DC5"])
def test_resnet50_gives_the_detections_of_transformers(options, tmp_path):
    config = DetrConfig(num_labels=91, auxiliary_loss=False, **options)
    expected = DetrForObjectDetection(config).eval()
    # Its first values are so small that all queries see the same; these are the authors'.
    for name, parameter in expected.named_parameters():
        if "backbone" not in name and parameter.ndim > 1:
            torch.nn.init.xavier_uniform_(parameter)
    torch.nn.init.normal_(expected.model.query_position_embeddings.weight)
    perturb(expected, scale=0.01)
    expected.save_pretrained(tmp_path)

    model = DETRForObjectDetection.from_pretrained(tmp_path)

    assert_equal_detections(model, expected, **tiny_batch())


def test_file_with_the_names_of_version_4_loads_completely(tmp_path):
    from safetensors.torch import load_file, save_file

    expected = peer(**PEERS["timm"])
    expected.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {}
    for name, value in load_file(path).items():
        name = name.replace("backbone.model.", "backbone.conv_encoder.model.")
        name = name.replace(".o_proj.", ".out_proj.").replace(".mlp.fc", ".fc")
        old[name] = value
    old["model.backbone.conv_encoder.model.bn1.num_batches_tracked"] = torch.tensor(0)
    assert set(old) != set(load_file(path))
    save_file(old, path, metadata={"format": "pt"})

    model, info = DETRForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)

    assert not any(info.values())
    assert_equal_detections(model, expected, **tiny_batch())


def test_transformers_repository_becomes_one_of_ours_when_saved(tmp_path):
    expected = peer(**PEERS["timm"])
    expected.save_pretrained(tmp_path / "theirs")
    VARIANTS["detr"].image_processor().save_pretrained(tmp_path / "theirs")
    model, _ = load_detector(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")

    reloaded, info = DETRForObjectDetection.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )

    assert not any(info.values())
    assert reloaded.config.model_type == "querydet_detr"
    assert_equal_detections(reloaded, expected, **tiny_batch())


def test_own_names_are_renamed_by_no_expression():
    names = DETRForObjectDetection(DETRConfig(**SMALL, backbone="test_resnet")).state_dict()
    names |= DETRForObjectDetection(
        DETRConfig(**SMALL, backbone_config=dict(TINY_BACKBONE))
    ).state_dict()
    for renaming in weight_renamings(TRANSFORMERS_NAMES):
        for name in names:
            assert renaming.rename_source_key(name)[0] == name


@pytest.mark.parametrize(
    ("backbone", "num_parameters"),
    [("resnet50.tv_in1k", 41_524_768), ("resnet101.tv_in1k", 60_464_672)],
)
@pytest.mark.parametrize("dilation", [False, True])
def test_number_of_parameters_is_that_of_the_released_models(backbone, num_parameters, dilation):
    config = DETRConfig(
        num_labels=91,
        backbone=backbone,
        dilation=dilation,
        backbone_norm="frozen",
        frozen_backbone_stages=2,
    )
    with torch.device("meta"):
        model = DETRForObjectDetection(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen == 222_400  # the stem and the first stage


def test_dilation_halves_the_stride():
    features = {}
    for dilation in (False, True):
        model = DETRForObjectDetection(
            DETRConfig(**SMALL, backbone="test_resnet", dilation=dilation)
        )
        (maps, _), *_ = model.model.backbone(torch.zeros(1, 3, 96, 160))
        features[dilation] = tuple(maps.shape[-2:])
    assert features == {False: (3, 5), True: (6, 10)}


def test_permuting_object_queries_permutes_predictions():
    model = perturb(DETRForObjectDetection(DETRConfig(**SMALL, backbone_config=TINY_BACKBONE)))
    model.eval()
    batch, order = tiny_batch(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    with torch.no_grad():
        expected = model(**batch)
        embeddings = model.model.query_position_embeddings.weight
        embeddings.copy_(embeddings[order])
        permuted = model(**batch)
    torch.testing.assert_close(permuted.logits, expected.logits[:, order])
    torch.testing.assert_close(permuted.pred_boxes, expected.pred_boxes[:, order])


def test_decoder_content_starts_at_zero():
    model = DETRForObjectDetection(DETRConfig(**SMALL, backbone_config=TINY_BACKBONE))
    outputs = model(**tiny_batch(), output_hidden_states=True)
    assert not outputs.decoder_hidden_states[0].any()


def test_positions_at_the_input_are_added_once():
    config = DETRConfig(**SMALL, backbone_config=TINY_BACKBONE, position_embeddings_at="input")
    model = perturb(DETRForObjectDetection(config)).eval().model
    images = torch.randn(2, 3, 64, 96)
    attended = []
    for layer in (*model.encoder_layers, *model.decoder_layers):
        layer.self_attention.register_forward_pre_hook(
            lambda module, args: attended.append(args[:3])
        )
    for layer in model.decoder_layers:
        layer.cross_attention.register_forward_pre_hook(
            lambda module, args: attended.append((args[1], args[1], args[2]))
        )

    with torch.no_grad():
        outputs = model(images, output_hidden_states=True)
        ((features, _),) = model.backbone(images)
        tokens = model.input_projection(features).flatten(2).transpose(1, 2)
        positions = model.position_embedding(torch.zeros(1, 2, 3, dtype=torch.bool))

    assert torch.equal(outputs.encoder_hidden_states[0], tokens + positions)
    queries = model.query_position_embeddings.weight
    assert torch.equal(outputs.decoder_hidden_states[0], queries.expand(2, -1, -1))
    assert len(attended) == 2 + 2 * 3
    for query, key, value in attended:
        assert torch.equal(query, value)
        assert torch.equal(key, value)


def test_norm_of_the_heads_does_not_enter_the_next_layer():
    model = perturb(DETRForObjectDetection(DETRConfig(**SMALL, backbone_config=TINY_BACKBONE)))
    seen = []
    for layer in model.model.decoder_layers:
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output[0])))
    model.eval()(**tiny_batch())
    for (_, output), (following_input, _) in pairwise(seen):
        assert following_input is output


def test_score_of_a_query_is_its_best_class_beside_no_object():
    from types import SimpleNamespace

    logits = torch.tensor([[[1.0, 2.0, 5.0], [4.0, 0.0, 0.0]]])
    outputs = SimpleNamespace(logits=logits, pred_boxes=torch.full((1, 2, 4), 0.5))
    (found,) = VARIANTS["detr"].image_processor().post_process_object_detection(outputs, 0.0)
    probability = logits.softmax(-1)[0]
    torch.testing.assert_close(found["scores"], torch.stack([probability[1, 0], probability[0, 1]]))
    assert found["labels"].tolist() == [0, 1]


def test_no_object_weight_enters_the_loss():
    labels = tiny_labels()
    losses = {}
    for weight in (0.1, 1.0):
        torch.manual_seed(0)
        config = DETRConfig(**SMALL, backbone_config=TINY_BACKBONE, eos_coefficient=weight)
        torch.manual_seed(1)
        model = DETRForObjectDetection(config).eval()
        torch.manual_seed(2)
        losses[weight] = model(**tiny_batch(), labels=labels).loss_dict["loss_ce"]
    assert losses[0.1] != losses[1.0]
