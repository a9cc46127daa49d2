"""Conditional DETR against transformers', against the authors, and what only this paper claims."""

import json
import math
from itertools import pairwise

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from oracles import set_loss, sigmoid
from safetensors.torch import load_file, save_file
from scipy.stats import kstest, norm, uniform
from tiny import NUM_LABELS, TINY_BACKBONE, perturb, tiny_batch, tiny_labels
from transformers import (
    AutoModelForObjectDetection,
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
)

from hf_querydet import (
    VARIANTS,
    ConditionalDETRConfig,
    ConditionalDETRForObjectDetection,
    ConditionalDETRModel,
    load_detector,
)
from hf_querydet.checkpoint_mapping_utils import weight_renamings
from hf_querydet.models.conditional_detr.checkpoint_mapping import TRANSFORMERS_NAMES

HIDDEN = 32
SMALL = {
    "num_labels": NUM_LABELS,
    "num_queries": 7,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
}
TIMM = {"model_type": "timm_backbone", "backbone": "test_resnet"}
PEERS = {
    "timm": {"backbone_config": TIMM},
    "timm DC5": {"backbone_config": {**TIMM, "output_stride": 16}, "dilation": True},
    "transformers": {"backbone_config": TINY_BACKBONE},
    "learned": {"backbone_config": TINY_BACKBONE, "position_embedding_type": "learned"},
    "one layer": {"backbone_config": TINY_BACKBONE, "decoder_layers": 1},
}
PRIOR_BIAS = -math.log(99)


def build(**changes):
    fields = {**SMALL, "backbone_config": dict(TINY_BACKBONE), **changes}
    return ConditionalDETRForObjectDetection(ConditionalDETRConfig(**fields))


def forward(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs)


def peer(kind, *, scale=0.1):
    """A detector of transformers, perturbed, whose forward auxiliary losses would change."""
    config = ConditionalDetrConfig(**{**SMALL, **PEERS[kind]}, auxiliary_loss=False)
    model = ConditionalDetrForObjectDetection(config)
    # Its first values are so small that all queries see the same; these are the authors'.
    for name, parameter in model.named_parameters():
        if "backbone" not in name and parameter.ndim > 1:
            torch.nn.init.xavier_uniform_(parameter)
    torch.nn.init.normal_(model.model.query_position_embeddings.weight)
    return perturb(model, scale=scale).eval()


def assert_equal_detections(model, expected_model, **inputs):
    actual, expected = forward(model, **inputs), forward(expected_model, **inputs)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-5)
    # The comparison means something only where queries differ.
    assert expected.pred_boxes.std(1).mean() > 1e-3
    assert expected.logits.std(1).mean() > 1e-3


# ---- the same as transformers --------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.1], ids=["plain", "perturbed"])
@pytest.mark.parametrize("kind", PEERS)
def test_same_weights_give_the_detections_of_transformers(kind, scale, tmp_path):
    expected = peer(kind, scale=scale)
    expected.save_pretrained(tmp_path)

    model, info = ConditionalDETRForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True
    )

    assert not any(info.values())
    # In double: a norm that is folded into its convolution rounds elsewhere.
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    assert_equal_detections(model.double(), expected.double(), **batch)


def test_every_tensor_of_the_file_is_used_unchanged(tmp_path):
    peer("timm").save_pretrained(tmp_path)
    model = ConditionalDETRForObjectDetection.from_pretrained(tmp_path)

    stored = load_file(tmp_path / "model.safetensors")
    loaded = model.state_dict()
    assert len(loaded) == len(stored)
    # Perturbed tensors of one shape are all different, so each is found by its sum.
    sums = [sorted(float(t.double().sum()) for t in each.values()) for each in (stored, loaded)]
    assert sums[0] == pytest.approx(sums[1], rel=0, abs=0)


# Names in the decoder layers of repositories on the Hub, and of modules in transformers 5.
HUB_LAYER = {
    "sa_qcontent_proj": "self_attn.q_content_proj",
    "sa_qpos_proj": "self_attn.q_pos_proj",
    "sa_kcontent_proj": "self_attn.k_content_proj",
    "sa_kpos_proj": "self_attn.k_pos_proj",
    "sa_v_proj": "self_attn.v_proj",
    "self_attn.out_proj": "self_attn.o_proj",
    "ca_qcontent_proj": "encoder_attn.q_content_proj",
    "ca_qpos_proj": "encoder_attn.q_pos_proj",
    "ca_qpos_sine_proj": "encoder_attn.q_pos_sine_proj",
    "ca_kcontent_proj": "encoder_attn.k_content_proj",
    "ca_kpos_proj": "encoder_attn.k_pos_proj",
    "ca_v_proj": "encoder_attn.v_proj",
    "encoder_attn.out_proj": "encoder_attn.o_proj",
    "self_attn_layer_norm": "self_attn_layer_norm",
    "encoder_attn_layer_norm": "encoder_attn_layer_norm",
    "final_layer_norm": "final_layer_norm",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def hub_layout(modules):
    """Tensors under the names of the Hub's files."""
    modules = dict(modules)
    tensors = {"model.backbone.conv_encoder.model.bn1.num_batches_tracked": torch.tensor(0)}
    for layer in range(SMALL["decoder_layers"]):
        for hub_name, name in HUB_LAYER.items():
            # Only the first layer has the projection of the query's position.
            if hub_name == "ca_qpos_proj" and layer > 0:
                continue
            for kind in ("weight", "bias"):
                prefix = f"model.decoder.layers.{layer}."
                tensors[f"{prefix}{hub_name}.{kind}"] = modules.pop(f"{prefix}{name}.{kind}")
    assert not any(name.startswith("model.decoder.layers.") for name in modules)
    for name, value in modules.items():
        name = name.replace("backbone.model.", "backbone.conv_encoder.model.")
        tensors[name.replace(".o_proj.", ".out_proj.").replace(".mlp.fc", ".fc")] = value
    return tensors


@pytest.mark.parametrize("layout", [dict, hub_layout], ids=["transformers 5", "Hub"])
def test_both_layouts_of_files_load_completely(layout, tmp_path):
    expected = peer("timm")
    expected.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(layout(expected.state_dict()), path, metadata={"format": "pt"})
    theirs = ConditionalDetrForObjectDetection.from_pretrained(tmp_path)

    model, info = ConditionalDETRForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True
    )

    assert not any(info.values())
    assert_equal_detections(model, expected, **tiny_batch())
    # The layout is one that transformers reads.
    assert_equal_detections(theirs, expected, **tiny_batch())


def test_transformers_repository_becomes_one_of_ours_when_saved(tmp_path):
    expected = peer("timm")
    expected.save_pretrained(tmp_path / "theirs")
    VARIANTS["conditional_detr"].image_processor().save_pretrained(tmp_path / "theirs")
    model, _ = load_detector(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")

    reloaded, info = ConditionalDETRForObjectDetection.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )

    assert not any(info.values())
    assert reloaded.config.model_type == "querydet_conditional_detr"
    assert_equal_detections(reloaded, expected, **tiny_batch())


def test_model_without_heads_loads_the_same_file(tmp_path):
    peer("timm").save_pretrained(tmp_path)
    batch = tiny_batch()
    expected = forward(ConditionalDETRForObjectDetection.from_pretrained(tmp_path), **batch)

    base = ConditionalDETRModel.from_pretrained(tmp_path)

    actual = forward(base, **batch)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(actual.reference_points, expected.reference_points)


def test_own_names_are_renamed_by_no_expression():
    names = [*build().state_dict(), *build(backbone_config=TIMM).state_dict()]
    for renaming in weight_renamings(TRANSFORMERS_NAMES):
        for name in names:
            assert renaming.rename_source_key(name)[0] == name


def test_loss_terms_are_those_of_transformers(tmp_path):
    expected = peer("timm")
    expected.save_pretrained(tmp_path)
    model = ConditionalDETRForObjectDetection.from_pretrained(tmp_path, auxiliary_loss=False)
    batch = tiny_batch()

    actual = forward(model, **batch, labels=tiny_labels()).loss_dict

    theirs = forward(expected, **batch, labels=tiny_labels()).loss_dict
    assert set(actual) == {"loss_ce", "loss_bbox", "loss_giou"}
    for name, value in actual.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


# ---- the authors, where transformers differs -----------------------------------------------------


def test_class_loss_coefficient_is_read():
    losses = []
    for coefficient in (2, 7):
        torch.manual_seed(0)
        model = build(cls_loss_coefficient=coefficient, auxiliary_loss=False).eval()
        torch.manual_seed(1)
        losses.append(model(**tiny_batch(), labels=tiny_labels()))
    difference = losses[1].loss - losses[0].loss
    torch.testing.assert_close(difference, 5 * losses[0].loss_dict["loss_ce"])


@pytest.mark.parametrize("auxiliary_loss", [False, True])
def test_loss_is_the_sum_of_its_terms_with_the_authors_weights(auxiliary_loss):
    outputs = build(auxiliary_loss=auxiliary_loss)(**tiny_batch(), labels=tiny_labels())
    suffixes = ["", *(["_0", "_1"] if auxiliary_loss else [])]
    weights = {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}
    assert set(outputs.loss_dict) == {name + suffix for name in weights for suffix in suffixes}
    expected = sum(
        weight * outputs.loss_dict[name + suffix]
        for name, weight in weights.items()
        for suffix in suffixes
    )
    torch.testing.assert_close(outputs.loss, expected)


def test_every_layer_is_matched_anew_with_the_authors_costs():
    model = perturb(build()).eval()
    outputs = forward(model, **tiny_batch(), labels=tiny_labels())
    layers = zip(
        [*outputs.auxiliary_outputs.logits, outputs.logits],
        [*outputs.auxiliary_outputs.pred_boxes, outputs.pred_boxes],
        ["_0", "_1", ""],
        strict=True,
    )
    for logits, boxes, suffix in layers:
        expected = set_loss(
            logits, boxes, tiny_labels(), class_cost=2.0, bbox_cost=5.0, giou_cost=2.0
        )
        actual = {name: float(outputs.loss_dict[name + suffix]) for name in expected}
        assert actual == pytest.approx(expected, rel=1e-4)


def test_focal_alpha_enters_the_loss():
    losses = {}
    for alpha in (0.25, 0.5):
        torch.manual_seed(0)
        model = build(focal_alpha=alpha).eval()
        torch.manual_seed(1)
        losses[alpha] = model(**tiny_batch(), labels=tiny_labels()).loss_dict["loss_ce"]
    assert losses[0.25] != losses[0.5]


def test_norm_of_the_heads_does_not_enter_the_next_layer():
    model = perturb(build())
    seen = []
    for layer in model.model.decoder_layers:
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output[0])))
    model.eval()(**tiny_batch())
    for (_, output), (following_input, _) in pairwise(seen):
        assert following_input is output


def test_encoder_input_has_no_dropout():
    model = build(dropout=0.9, backbone_norm="frozen")
    batch = tiny_batch()
    expected = forward(model, **batch, output_hidden_states=True).encoder_hidden_states
    actual = model.train()(**batch, output_hidden_states=True).encoder_hidden_states
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)
    assert not torch.allclose(actual[1], expected[1])


def test_stem_and_first_stage_of_a_loaded_backbone_are_frozen(tmp_path):
    peer("timm").save_pretrained(tmp_path)
    backbone = ConditionalDETRForObjectDetection.from_pretrained(tmp_path).model.backbone
    frozen, trained = set(), set()
    for name, parameter in backbone.body._backbone.named_parameters():
        (trained if parameter.requires_grad else frozen).add(name.split(".")[0])
    assert frozen == {"conv1", "layer1"}
    assert trained == {"layer2", "layer3", "layer4"}


HUB_CONFIG = {
    # The form of configuration files on the Hub, which transformers 4 wrote.
    "model_type": "conditional_detr",
    "architectures": ["ConditionalDetrForObjectDetection"],
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "auxiliary_loss": False,
    "backbone": "resnet101",
    "backbone_config": None,
    "bbox_cost": 5,
    "class_cost": 2,
    "cls_loss_coefficient": 2,
    "dice_loss_coefficient": 1,
    "dilation": True,
    "focal_alpha": 0.25,
    "id2label": {"0": "N/A", "1": "person", "2": "bicycle"},
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "label2id": {"N/A": 0, "person": 1, "bicycle": 2},
    "mask_loss_coefficient": 1,
    "num_hidden_layers": 6,
    "num_queries": 120,
    "scale_embedding": False,
    "torch_dtype": "float32",
    "use_timm_backbone": True,
}


def test_configuration_of_the_hub_is_read_with_our_defaults(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG))

    config = ConditionalDETRConfig.from_pretrained(tmp_path)

    backbone = config.backbone_config
    assert (backbone.backbone, backbone.output_stride) == ("resnet101", 16)
    assert (config.num_queries, config.num_labels, config.id2label[2]) == (120, 3, "bicycle")
    assert (config.encoder_layers, config.hidden_size) == (6, 256)
    assert (config.backbone_norm, config.frozen_backbone_stages) == ("frozen", 2)
    assert config.auxiliary_loss
    assert not config.is_encoder_decoder


def test_auxiliary_loss_of_transformers_default_is_not_taken_for_a_choice(tmp_path):
    ConditionalDetrConfig(**SMALL).save_pretrained(tmp_path)
    assert ConditionalDETRConfig.from_pretrained(tmp_path).auxiliary_loss
    assert not ConditionalDETRConfig.from_pretrained(tmp_path, auxiliary_loss=False).auxiliary_loss


# ---- first values --------------------------------------------------------------------------------


@pytest.fixture(params=["constructed", "loaded"])
def first_model(request, tmp_path):
    """A new model; or one loaded from a file that holds the backbone only."""
    model = build(num_queries=40)
    if request.param == "constructed":
        return model
    model.config.save_pretrained(tmp_path)
    weights = {name: v for name, v in model.state_dict().items() if ".backbone." in name}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return ConditionalDETRForObjectDetection.from_pretrained(tmp_path)


def assert_uniform(values, bound):
    values = values.detach().flatten().numpy() / bound
    assert abs(values).max() <= 1
    # The seed is fixed; a bound that is wrong by a tenth fails at these sizes.
    assert kstest(values, uniform(-1, 2).cdf).pvalue > 1e-3


def linear_layers(module):
    return {n: m for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)}


def test_every_class_starts_at_a_probability_of_one_percent(first_model):
    head = first_model.class_head
    torch.testing.assert_close(head.bias, torch.full((NUM_LABELS,), PRIOR_BIAS))
    assert_uniform(head.weight, HIDDEN**-0.5)


def test_last_layer_of_the_box_head_starts_at_zero(first_model):
    *others, last = first_model.box_head.layers
    assert not last.weight.any()
    assert not last.bias.any()
    for layer in others:
        assert_uniform(layer.weight, HIDDEN**-0.5)


def test_projections_of_the_decoders_attention_are_xavier(first_model):
    biases = []
    for index, layer in enumerate(first_model.model.decoder_layers):
        for attention, num_projections in (
            (layer.self_attention, 6),
            (layer.cross_attention, 7 if index == 0 else 6),
        ):
            projections = linear_layers(attention)
            assert len(projections) == num_projections
            for name, projection in projections.items():
                assert_uniform(projection.weight, (6 / (2 * HIDDEN)) ** 0.5)
                if name == "out_proj":
                    assert not projection.bias.any()
                else:
                    biases.append(projection.bias)
    assert_uniform(torch.cat(biases), HIDDEN**-0.5)


def test_reference_points_and_scale_start_xavier(first_model):
    for head, size_out in (
        (first_model.model.query_scale, HIDDEN),
        (first_model.model.reference_point_head, 2),
    ):
        first, last = head.layers
        assert_uniform(first.weight, (6 / (2 * HIDDEN)) ** 0.5)
        assert_uniform(last.weight, (6 / (HIDDEN + size_out)) ** 0.5)
        assert_uniform(first.bias, HIDDEN**-0.5)
        assert last.bias.abs().max() <= HIDDEN**-0.5
        assert last.bias.all()


def test_encoder_and_queries_start_as_in_detr(first_model):
    encoder = first_model.model.encoder_layers[1]
    assert_uniform(encoder.self_attention.q_proj.weight, (6 / (4 * HIDDEN)) ** 0.5)
    assert not encoder.self_attention.q_proj.bias.any()
    assert_uniform(encoder.feed_forward.expand.weight, (6 / (HIDDEN + 40)) ** 0.5)
    assert_uniform(first_model.model.input_projection.weight, 24**-0.5)
    queries = first_model.model.query_position_embeddings.weight.detach().flatten().numpy()
    assert kstest(queries, norm.cdf).pvalue > 1e-3


def test_new_labels_start_with_the_prior(tmp_path):
    model = perturb(build())
    model.save_pretrained(tmp_path)
    id2label = dict(enumerate(["cat", "dog", "owl", "yak", "eel"]))
    for loaded in (
        ConditionalDETRForObjectDetection.from_pretrained(tmp_path, id2label=id2label),
        AutoModelForObjectDetection.from_pretrained(tmp_path, num_labels=5),
    ):
        torch.testing.assert_close(loaded.class_head.bias, torch.full((5,), PRIOR_BIAS))
        # The box head of the file is kept, although its first values are set in the same place.
        for name, value in model.box_head.state_dict().items():
            assert torch.equal(loaded.box_head.state_dict()[name], value)


# ---- what the paper claims -----------------------------------------------------------------------


def sine_embedding(x: float, y: float) -> list[float]:
    """First y, then x; sine and cosine alternate; frequencies fall from 1 to nearly 1 / 10000."""
    num_features = HIDDEN // 2
    embedding = []
    for coordinate in (y, x):
        for index in range(num_features):
            angle = 2 * math.pi * coordinate / 10000 ** (2 * (index // 2) / num_features)
            embedding.append(math.sin(angle) if index % 2 == 0 else math.cos(angle))
    return embedding


def two_layers(head, vector: torch.Tensor) -> list[float]:
    for layer in head.layers:
        out = []
        for row, bias in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True):
            out.append(bias + sum(w * x for w, x in zip(row, vector, strict=True)))
        vector = [max(value, 0.0) for value in out]
    return out


def test_reference_point_is_predicted_from_the_position_embedding_of_a_query():
    model = perturb(build(), scale=0.3)
    points = forward(model, **tiny_batch()).reference_points
    base = model.model
    expected = [
        [sigmoid(value) for value in two_layers(base.reference_point_head, query)]
        for query in base.query_position_embeddings.weight.tolist()
    ]
    torch.testing.assert_close(points, torch.tensor(expected).expand(2, -1, -1))
    assert points.std(1).min() > 0.01


def test_spatial_query_is_the_embedded_reference_point_scaled_from_the_second_layer_on():
    model = perturb(build(), scale=0.3)
    seen = []
    for layer in model.model.decoder_layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(args[:3]))

    points = forward(model, **tiny_batch()).reference_points

    for index, (object_queries, _, spatial_queries) in enumerate(seen):
        for picture in range(2):
            for query in range(7):
                expected = sine_embedding(*points[picture, query].tolist())
                if index > 0:
                    # From the state that enters the layer, which the heads' norm has not touched.
                    scale = two_layers(
                        model.model.query_scale, object_queries[picture, query].tolist()
                    )
                    expected = [a * b for a, b in zip(expected, scale, strict=True)]
                actual = spatial_queries[picture, query]
                torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_content_starts_at_zero_and_identity_comes_from_the_position_embedding():
    model = build()
    seen = []
    model.model.decoder_layers[0].register_forward_hook(lambda _, args, output: seen.append(args))
    forward(model, **tiny_batch())
    object_queries, query_positions = seen[0][:2]
    assert not object_queries.any()
    for picture in query_positions:
        assert torch.equal(picture, model.model.query_position_embeddings.weight)


def test_only_the_first_layer_projects_the_position_of_the_query_in_cross_attention():
    names = {
        name
        for name in build().state_dict()
        if name.endswith("cross_attention.q_position_proj.weight")
    }
    assert names == {"model.decoder_layers.0.cross_attention.q_position_proj.weight"}


def test_box_is_placed_around_the_reference_point():
    model = perturb(build(), scale=0.3)
    outputs = forward(model, **tiny_batch(), labels=tiny_labels())
    boxes = [*outputs.auxiliary_outputs.pred_boxes, outputs.pred_boxes]
    assert len(boxes) == 3
    for states, layer_boxes in zip(outputs.intermediate_hidden_states, boxes, strict=True):
        deltas = model.box_head(states)
        for picture in range(2):
            for query in range(7):
                delta = deltas[picture, query].tolist()
                point = outputs.reference_points[picture, query].tolist()
                for axis in (0, 1):
                    delta[axis] += math.log(point[axis] / (1 - point[axis]))
                expected = torch.tensor([sigmoid(value) for value in delta])
                torch.testing.assert_close(layer_boxes[picture, query], expected)


def test_first_boxes_are_half_the_picture_around_the_reference_points():
    outputs = forward(build(), **tiny_batch())
    expected = torch.cat([outputs.reference_points, torch.full((2, 7, 2), 0.5)], -1)
    torch.testing.assert_close(outputs.pred_boxes, expected)


def test_boxes_train_the_reference_points():
    model = build()
    model(**tiny_batch()).pred_boxes.sum().backward()
    # Not detached. The box head starts at zero, so nothing comes through the decoder yet.
    assert model.model.reference_point_head.layers[0].weight.grad.any()


def test_permuting_object_queries_permutes_predictions():
    model = perturb(build()).eval()
    batch, order = tiny_batch(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    with torch.no_grad():
        expected = model(**batch)
        embeddings = model.model.query_position_embeddings.weight
        embeddings.copy_(embeddings[order])
        permuted = model(**batch)
    torch.testing.assert_close(permuted.logits, expected.logits[:, order])
    torch.testing.assert_close(permuted.pred_boxes, expected.pred_boxes[:, order])


# ---- numbers and sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("decoder_layers", [1, 2])
def test_every_parameter_gets_a_finite_gradient(decoder_layers):
    model = build(decoder_layers=decoder_layers).train()
    model(**tiny_batch(), labels=tiny_labels()).loss.backward()
    wrong = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_points_and_boxes_in_float32(dtype):
    model = build().to(dtype)
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    outputs = forward(model, **batch)
    assert outputs.logits.dtype == dtype
    assert (outputs.reference_points.dtype, outputs.pred_boxes.dtype) == (torch.float32,) * 2


def test_reference_points_on_the_border_train_with_finite_numbers():
    model = build().train()
    with torch.no_grad():
        model.model.reference_point_head.layers[-1].bias.copy_(torch.tensor([-200.0, 200.0]))
    outputs = model(**tiny_batch(), labels=tiny_labels())
    outputs.loss.backward()
    assert outputs.reference_points[0, 0].tolist() == [0, 1]
    assert outputs.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_compiled_model_trains_under_autocast_to_bfloat16():
    """Where two biases have one gradient, PyTorch 2.14 writes C++ that does not compile."""
    torch.compiler.reset()
    model = build(encoder_layers=0, decoder_layers=1, dropout=0.0, attention_dropout=0.0).train()
    batch, labels = tiny_batch(), tiny_labels()

    def gradient(dtype):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradient(torch.float32)
    model.model.compile()
    # bfloat16 keeps 8 bits, and the backbone's norms have few values to divide by; plain, the
    # distance is 0.1.
    assert (gradient(torch.bfloat16) - exact).norm() < 0.4 * exact.norm()


# ---- configuration and recipe --------------------------------------------------------------------


def test_defaults_are_the_papers_r50():
    config = ConditionalDETRConfig()
    assert config.backbone_config.backbone == "resnet50.tv_in1k"
    assert config.backbone_config.out_indices == [-1]
    assert (config.d_model, config.num_queries) == (256, 300)
    assert (config.encoder_layers, config.decoder_layers) == (6, 6)
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (8, 8)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (2048, 2048)
    # transformers has 0 for the last two.
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.1,) * 3
    assert (config.class_cost, config.bbox_cost, config.giou_cost) == (2, 5, 2)
    assert (config.cls_loss_coefficient, config.focal_alpha) == (2, 0.25)
    assert (config.bbox_loss_coefficient, config.giou_loss_coefficient) == (5, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_attention_heads": 7}, "multiple of encoder_attention_heads, got 256 and 7"),
        ({"decoder_attention_heads": 0}, "multiple of decoder_attention_heads, got 256 and 0"),
        (
            {"d_model": 18, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
            "d_model must be a multiple of 4 .*, got 18",
        ),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ({"position_embedding_type": "rotary"}, "one of .*got 'rotary'"),
    ],
)
def test_fields_that_do_not_fit_are_an_error(options, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        ConditionalDETRConfig(**options)


def test_recipe_is_the_authors():
    recipe = VARIANTS["conditional_detr"].recipe
    assert (recipe.learning_rate, recipe.backbone_learning_rate_factor) == (1e-4, 0.1)
    assert (recipe.num_epochs, recipe.step_fraction * recipe.num_epochs) == (50, 40)
    assert (recipe.weight_decay, recipe.max_grad_norm) == (1e-4, 0.1)
