import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from scipy.stats import kstest, norm, uniform
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from hf_querydet.models.detr.configuration_detr import DETRConfig
from hf_querydet.models.detr.modeling_detr import DETRForObjectDetection

HIDDEN, INNER, LABELS = 32, 40, 5


def tiny_config(**options) -> DETRConfig:
    defaults = {
        "backbone": "test_resnet",
        "num_labels": LABELS,
        "num_queries": 40,
        "d_model": HIDDEN,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": INNER,
        "decoder_ffn_dim": INNER,
        "position_embedding_type": "learned",
    }
    return DETRConfig(**(defaults | options))


def load_without_weights(folder) -> DETRForObjectDetection:
    """A model built on the meta device of which the file holds the backbone only."""
    model = DETRForObjectDetection(tiny_config())
    model.config.save_pretrained(folder)
    weights = {name: v for name, v in model.state_dict().items() if ".backbone." in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return DETRForObjectDetection.from_pretrained(folder)


@pytest.fixture(params=["constructed", "loaded"])
def model(request, tmp_path) -> DETRForObjectDetection:
    if request.param == "constructed":
        return DETRForObjectDetection(tiny_config())
    return load_without_weights(tmp_path)


def assert_uniform(values: Tensor, bound: float) -> None:
    values = values.detach().flatten().numpy() / bound
    assert abs(values).max() <= 1
    # The seed is fixed; a bound that is wrong by a tenth fails at these sizes.
    assert kstest(values, uniform(-1, 2).cdf).pvalue > 1e-3


def attentions(model):
    encoder, decoder = model.model.encoder_layers[0], model.model.decoder_layers[0]
    return [encoder.self_attention, decoder.self_attention, decoder.cross_attention]


def feed_forwards(model):
    return [model.model.encoder_layers[0].feed_forward, model.model.decoder_layers[0].feed_forward]


def linear_layers_with_pytorchs_default(model):
    yield model.class_head
    yield from model.box_head.layers
    yield model.model.input_projection


def test_query_key_and_value_are_xavier_as_one_stacked_matrix(model):
    for attention in attentions(model):
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert_uniform(layer.weight, (6 / (4 * HIDDEN)) ** 0.5)


def test_attention_output_is_xavier(model):
    for attention in attentions(model):
        assert_uniform(attention.out_proj.weight, (6 / (2 * HIDDEN)) ** 0.5)


def test_attention_biases_are_zero(model):
    for attention in attentions(model):
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            assert torch.equal(layer.bias, torch.zeros(HIDDEN))


def test_feed_forward_weights_are_xavier(model):
    for block in feed_forwards(model):
        assert_uniform(block.expand.weight, (6 / (HIDDEN + INNER)) ** 0.5)
        assert_uniform(block.contract.weight, (6 / (HIDDEN + INNER)) ** 0.5)


def test_feed_forward_biases_are_pytorchs_default(model):
    for block in feed_forwards(model):
        assert_uniform(block.expand.bias, HIDDEN**-0.5)
        assert_uniform(block.contract.bias, INNER**-0.5)


def test_heads_and_input_projection_are_pytorchs_default(model):
    for layer in linear_layers_with_pytorchs_default(model):
        fan_in = layer.weight[0].numel()
        assert_uniform(layer.weight, fan_in**-0.5)
        assert_uniform(layer.bias, fan_in**-0.5)


def test_queries_are_standard_normal(model):
    values = model.model.query_position_embeddings.weight.detach().flatten().numpy()

    assert kstest(values, norm.cdf).pvalue > 1e-3


def test_learned_positions_are_uniform_between_0_and_1(model):
    positions = model.model.position_embedding
    for table in (positions.row_embeddings, positions.column_embeddings):
        assert table.weight.min() >= 0
        assert_uniform(table.weight * 2 - 1, 1.0)


def test_layer_norms_start_as_identity(model):
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 6
    for layer in norms:
        assert torch.equal(layer.weight, torch.ones(HIDDEN))
        assert torch.equal(layer.bias, torch.zeros(HIDDEN))


def test_no_two_layers_share_their_first_values(model):
    weights = [
        layer.weight
        for attention in attentions(model)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    ]
    for index, weight in enumerate(weights):
        assert not any(torch.equal(weight, other) for other in weights[index + 1 :])


def test_new_class_head_starts_like_the_first_one(tmp_path):
    DETRForObjectDetection(tiny_config()).save_pretrained(tmp_path)

    head = DETRForObjectDetection.from_pretrained(tmp_path, num_labels=8).class_head

    assert head.weight.shape == (9, HIDDEN)
    assert_uniform(head.weight, HIDDEN**-0.5)
    assert_uniform(head.bias, HIDDEN**-0.5)


def test_published_weights_survive_the_initialisation_of_the_model(tmp_path):
    published = timm.create_model("test_resnet")
    torch.nn.init.normal_(published.bn1.running_mean)
    timm.models.save_for_hf(published, tmp_path, safe_serialization=True)
    config = tiny_config(backbone=f"local-dir:{tmp_path}", use_pretrained_backbone=True)

    model = DETRForObjectDetection(config)

    weights = published.state_dict()
    loaded = model.model.backbone.body._backbone.state_dict()
    assert len(loaded) > 50
    for name, value in loaded.items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_published_weights_of_transformers_survive_it_too(tmp_path, norm):
    published = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1])
    )
    for module in published.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
    published.save_pretrained(tmp_path)
    config = tiny_config(
        backbone=str(tmp_path),
        use_timm_backbone=False,
        use_pretrained_backbone=True,
        backbone_norm=norm,
    )

    model = DETRForObjectDetection(config)

    weights = published.resnet.state_dict()
    loaded = model.model.backbone.body.state_dict()
    assert len(loaded) > 30
    for name, value in loaded.items():
        assert torch.equal(value, weights[name]), name


@pytest.fixture
def nan_memory(monkeypatch):
    """Uninitialised memory that shows."""
    empty_like = torch.empty_like

    def filled(*args, **kwargs):
        tensor = empty_like(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty_like", filled)


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_tensors_of_the_backbone_that_a_file_lacks_get_first_values(tmp_path, nan_memory, norm):
    model = DETRForObjectDetection(tiny_config(backbone_norm=norm))
    model.config.save_pretrained(tmp_path)
    weights = model.state_dict()
    body = "model.backbone.body._backbone."
    missing = {
        f"{body}conv1.0.weight",
        f"{body}bn1.running_var",
        f"{body}bn1.bias",
        f"{body}layer2.0.conv1.weight",
    }
    kept = {name: value + 1 for name, value in weights.items() if name not in missing}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded = DETRForObjectDetection.from_pretrained(tmp_path).state_dict()

    assert loaded[f"{body}bn1.running_var"].eq(1).all()
    assert loaded[f"{body}bn1.bias"].eq(0).all()
    assert_uniform(
        loaded[f"{body}conv1.0.weight"], weights[f"{body}conv1.0.weight"][0].numel() ** -0.5
    )
    for name, value in kept.items():
        assert torch.equal(loaded[name], value), name


def test_backbone_for_other_channels_starts_anew_on_request(tmp_path, nan_memory):
    DETRForObjectDetection(tiny_config()).save_pretrained(tmp_path)

    model = DETRForObjectDetection.from_pretrained(
        tmp_path, num_channels=4, ignore_mismatched_sizes=True
    )

    weight = model.model.backbone.body._backbone.conv1[0].weight
    assert weight.shape[1] == 4
    assert_uniform(weight, weight[0].numel() ** -0.5)


def test_loading_a_model_does_not_load_published_weights(tmp_path):
    # They are not on this machine, so that an attempt would raise.
    model = DETRForObjectDetection(tiny_config())
    model.config.use_pretrained_backbone = True
    model.config.backbone_config.backbone = "test_resnet.r160_in1k"
    model.save_pretrained(tmp_path)

    loaded = DETRForObjectDetection.from_pretrained(tmp_path)

    assert loaded.config.use_pretrained_backbone
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_frozen_stages_stay_frozen_after_loading(tmp_path):
    model = DETRForObjectDetection(tiny_config(backbone_norm="frozen", frozen_backbone_stages=2))
    model.save_pretrained(tmp_path)

    loaded = DETRForObjectDetection.from_pretrained(tmp_path)

    expected = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == expected
    assert set(expected.values()) == {True, False}


def test_tensors_of_the_file_are_kept_beside_missing_ones(tmp_path):
    model = DETRForObjectDetection(tiny_config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=3.0)
    model.config.save_pretrained(tmp_path)
    weights = model.state_dict()
    # In each kind of block that sets the first values of its layers.
    missing = {
        "model.encoder_layers.0.self_attention.v_proj.weight",
        "model.encoder_layers.0.feed_forward.expand.weight",
        "model.position_embedding.row_embeddings.weight",
    }
    kept = {name: value for name, value in weights.items() if name not in missing}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded = DETRForObjectDetection.from_pretrained(tmp_path).state_dict()

    for name, value in loaded.items():
        assert torch.equal(value, weights[name]) == (name in kept), name
