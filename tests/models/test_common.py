"""What every variant promises."""

import copy
import json
import logging
import re

import pytest
import torch
from accelerate import init_empty_weights
from accelerate.utils import send_to_device
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny import (
    NUM_LABELS,
    TINY_CONFIGS,
    in_one_graph,
    no_objects,
    perturb,
    picture,
    tiny_batch,
    tiny_config,
    tiny_labels,
)
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForObjectDetection,
    TrainingArguments,
)

from hf_querydet import VARIANTS

NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}

pytestmark = pytest.mark.parametrize("name", list(VARIANTS))


def build(name, **changes):
    return VARIANTS[name].detector(tiny_config(VARIANTS, name, **changes))


def forward(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs)


def assert_same_detections(actual, expected, **tolerance):
    torch.testing.assert_close(actual.logits, expected.logits, **tolerance)
    assert_same_boxes(actual.pred_boxes, expected.pred_boxes, **tolerance)


def assert_same_boxes(actual, expected, **tolerance):
    # A box that reaches beyond the picture is rounded by its own size.
    size = expected[..., 2:].amax(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(actual / size, expected / size, **tolerance)


def test_every_variant_has_a_tiny_configuration(name):
    assert name in TINY_CONFIGS
    assert VARIANTS[name].config.model_type == f"querydet_{name}"


def test_saved_model_gives_equal_outputs(name, tmp_path):
    model = perturb(build(name))
    batch = tiny_batch()
    model.save_pretrained(tmp_path)

    loaded, info = VARIANTS[name].detector.from_pretrained(tmp_path, output_loading_info=True)

    assert not any(info.values())
    assert_same_detections(forward(loaded, **batch), forward(model, **batch), rtol=0, atol=0)


def test_auto_classes_return_the_registered_ones(name, tmp_path):
    variant = VARIANTS[name]
    build(name).save_pretrained(tmp_path)
    variant.image_processor().save_pretrained(tmp_path)

    assert type(AutoConfig.from_pretrained(tmp_path)) is variant.config
    assert type(AutoModel.from_pretrained(tmp_path)) is variant.model
    assert type(AutoModelForObjectDetection.from_pretrained(tmp_path)) is variant.detector
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is variant.image_processor


def test_configuration_survives_saving(name, tmp_path):
    config = tiny_config(VARIANTS, name, backbone_norm="frozen", auxiliary_loss=False)
    config.save_pretrained(tmp_path)
    loaded = VARIANTS[name].config.from_pretrained(tmp_path).to_dict()
    expected = config.to_dict()
    for either in (loaded, expected):
        either.pop("transformers_version", None)
    assert loaded == expected


def test_batch_of_equal_sizes_equals_its_single_pictures(name):
    # In double: kernels sum in an order that depends on the size of the batch.
    model = perturb(build(name)).double()
    pixel_values = torch.randn(3, 3, 64, 96).double()

    together = forward(model, pixel_values=pixel_values)

    for index in range(3):
        alone = forward(model, pixel_values=pixel_values[index : index + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[index])
        assert_same_boxes(alone.pred_boxes[0], together.pred_boxes[index])


def test_full_pixel_mask_equals_no_mask(name):
    model = perturb(build(name))
    pixel_values = torch.randn(2, 3, 64, 96)
    full = torch.ones(2, 64, 96, dtype=torch.int64)
    assert_same_detections(
        forward(model, pixel_values=pixel_values, pixel_mask=full),
        forward(model, pixel_values=pixel_values),
    )


def test_features_under_padding_do_not_reach_predictions(name, monkeypatch):
    model = perturb(build(name)).eval()
    alone_features, batch_features = [], []
    # The coarsest map has 3x2 cells of picture and 4x5 of canvas, each finer one twice as many.
    for level, num_channels in enumerate(reversed(model.model.backbone.channels)):
        features = torch.randn(1, num_channels, 3 << level, 2 << level)
        height, width = features.shape[-2:]
        canvas = torch.randn(2, num_channels, 4 << level, 5 << level)
        canvas[0, :, :height, :width] = features[0]
        padding_mask = torch.zeros(2, 4 << level, 5 << level, dtype=torch.bool)
        padding_mask[0, height:] = padding_mask[0, :, width:] = True
        alone_features.insert(0, (features, None))
        batch_features.insert(0, (canvas, padding_mask))

    # Below the backbone, whose convolutions see the padding's border.
    monkeypatch.setattr(model.model.backbone, "forward", lambda *_: alone_features)
    alone = forward(model, pixel_values=torch.zeros(1, 3, 96, 64))
    monkeypatch.setattr(model.model.backbone, "forward", lambda *_: batch_features)
    beside = forward(
        model,
        pixel_values=torch.zeros(2, 3, 128, 160),
        pixel_mask=torch.ones(2, 128, 160, dtype=torch.int64),
    )

    if VARIANTS[name].padding_exception:
        # The table says that they do; what does hold has a test of the variant.
        assert not torch.allclose(beside.logits[:1], alone.logits, rtol=0, atol=1e-4)
        return
    torch.testing.assert_close(beside.logits[:1], alone.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(beside.pred_boxes[:1], alone.pred_boxes, rtol=0, atol=1e-4)


@pytest.mark.parametrize("labels", [tiny_labels(), [no_objects(), tiny_labels()[1]]])
def test_every_trainable_parameter_gets_a_gradient(name, labels):
    model = build(name).train()
    model(**tiny_batch(), labels=labels).loss.backward()
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_detector_without_an_encoder_has_no_parameter_without_a_gradient(name):
    # DistributedDataParallel waits for all of them.
    model = build(name, encoder_layers=0).train()
    model(**tiny_batch(), labels=tiny_labels()).loss.backward()
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_every_linear_layer_is_called(name):
    # Adapters, quantised layers and hooks take a layer's place; its weights alone are not enough.
    model = build(name).train()
    called = set()
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for key, layer in layers.items():
        layer.register_forward_hook(lambda *_, key=key: called.add(key))

    model(**tiny_batch(), labels=tiny_labels())

    assert called == set(layers)


def test_batch_without_any_object_trains(name):
    model = build(name).train()
    outputs = model(**tiny_batch(), labels=[no_objects(), no_objects()])
    outputs.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert outputs.loss.isfinite()


def test_auxiliary_loss_never_changes_the_forward(name):
    model = perturb(build(name)).eval()
    with_auxiliary = model(**tiny_batch_of_seed(0), labels=tiny_labels())
    model.config.auxiliary_loss = False
    without = model(**tiny_batch_of_seed(0), labels=tiny_labels())
    no_labels = model(**tiny_batch_of_seed(0))
    assert_same_detections(with_auxiliary, without, rtol=0, atol=1e-6)
    assert_same_detections(with_auxiliary, no_labels, rtol=0, atol=1e-6)
    assert without.auxiliary_outputs is None


def test_auxiliary_outputs_count_the_layers_before_the_last(name):
    model = build(name)
    outputs = model(**tiny_batch(), labels=tiny_labels())
    num_layers = model.config.decoder_layers
    assert len(outputs.auxiliary_outputs.logits) == num_layers - 1
    terms = [key for key in outputs.loss_dict if key.startswith("loss_giou")]
    assert len([key for key in terms if not key.endswith("_enc")]) == num_layers


def test_auxiliary_loss_is_on_by_default(name):
    assert VARIANTS[name].config().auxiliary_loss


def test_same_seed_gives_the_same_weights_and_loss(name):
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        model = build(name).train()
        losses.append(model(**tiny_batch(), labels=tiny_labels()).loss)
    assert losses[0] == losses[1]


def test_one_picture_is_learned(name):
    torch.manual_seed(0)
    model = build(name, **NO_DROPOUT).train()
    inputs = {"pixel_values": torch.randn(1, 3, 64, 64), "labels": tiny_labels()[:1]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(70):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    # From about 20, with every layer's terms added; what learns nothing stays above 14. The best of
    # the last steps: at this learning rate single steps still jump, by rounding here or there.
    assert min(losses[-20:]) < 4


def test_eager_attention_equals_sdpa(name):
    model = perturb(build(name))
    batch = tiny_batch()
    model.set_attn_implementation("sdpa")
    sdpa = forward(model, **batch)
    model.set_attn_implementation("eager")
    assert_same_detections(forward(model, **batch), sdpa)


def test_attention_weights_and_states_are_returned_on_request(name):
    model = build(name, attn_implementation="eager")
    outputs = forward(model, **tiny_batch(), output_attentions=True, output_hidden_states=True)
    config = model.config
    assert len(outputs.decoder_hidden_states) == config.decoder_layers + 1
    assert len(outputs.encoder_hidden_states) == config.encoder_layers + 1
    attentions = outputs.decoder_attentions
    # What replaces attention to the picture has no weights to return.
    if any("cross_attention" in key for key, _ in model.named_parameters()):
        attentions += outputs.cross_attentions
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert weights.shape[:3] == (2, config.decoder_attention_heads, config.num_queries)


def test_tuple_output_equals_dict_output(name):
    model = build(name)
    batch = tiny_batch()
    outputs = forward(model, **batch)
    as_tuple = forward(model, **batch, return_dict=False)
    for actual, expected in zip(as_tuple, outputs.to_tuple(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_keeps_loss_and_gradients(name, use_reentrant):
    # In double: the order in which gradients of layers are summed differs.
    model = build(name, **NO_DROPOUT).double().train()
    batch, labels = tiny_batch(), tiny_labels()
    batch["pixel_values"] = batch["pixel_values"].double()
    checkpointed = copy.deepcopy(model)
    # The name before transformers 5.23 is deprecated since.
    enable = getattr(
        checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable
    )
    enable({"use_reentrant": use_reentrant})

    losses = []
    for each in (model, checkpointed):
        loss = each(**batch, labels=labels).loss
        loss.backward()
        losses.append(loss)

    torch.testing.assert_close(losses[0], losses[1])
    for (key, expected), actual in zip(
        model.named_parameters(), checkpointed.parameters(), strict=True
    ):
        torch.testing.assert_close(actual.grad, expected.grad, msg=lambda text, key=key: key + text)


def test_new_detector_of_a_half_precision_configuration_is_of_one_type(name, tmp_path):
    build(name).save_pretrained(tmp_path / "whole")
    row = VARIANTS[name]
    half = row.detector.from_pretrained(tmp_path / "whole", dtype=torch.float16)
    assert {value.dtype for value in half.parameters()} == {torch.float16}
    half.save_pretrained(tmp_path / "half")

    model = row.detector(row.config.from_pretrained(tmp_path / "half"))

    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_has_a_float32_loss(name, dtype):
    model = build(name).to(dtype).train()
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    outputs = model(**batch, labels=tiny_labels())
    outputs.loss.backward()
    assert outputs.logits.dtype == dtype
    assert outputs.loss.dtype == torch.float32
    assert outputs.loss.isfinite()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_autocast_trains_with_a_float32_loss(name, device):
    model = build(name).to(device).train()
    batch, labels = send_to_device((tiny_batch(), tiny_labels()), device)
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs = model(**batch, labels=labels)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.pred_boxes.dtype == torch.float32
    assert outputs.loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.cuda
def test_gpu_has_the_loss_and_gradients_of_the_cpu(name):
    # In double, all but the loss: the two sum in other orders.
    model = perturb(build(name, **NO_DROPOUT)).double().train()
    batch, labels = tiny_batch(), tiny_labels()
    batch["pixel_values"] = batch["pixel_values"].double()
    on_gpu = copy.deepcopy(model).cuda()

    loss = model(**batch, labels=labels).loss
    loss.backward()
    gpu_loss = on_gpu(**send_to_device(batch, "cuda"), labels=send_to_device(labels, "cuda")).loss
    gpu_loss.backward()

    torch.testing.assert_close(gpu_loss.cpu(), loss)
    expected, actual = (
        torch.cat([p.grad.cpu().flatten() for p in each.parameters() if p.grad is not None])
        for each in (model, on_gpu)
    )
    # Rounding the loss's input to float32 moves the gradients of all weights by 2e-6 of their norm.
    assert (actual - expected).norm() < 1e-4 * expected.norm()


def test_half_precision_predictions_are_near_float32(name):
    model = build(name).eval()
    pixel_values = torch.randn(1, 3, 64, 96)
    expected = forward(model, pixel_values=pixel_values)
    half = forward(copy.deepcopy(model).bfloat16(), pixel_values=pixel_values.bfloat16())
    # Which tokens are chosen for queries, and in which order, is decided by the smallest of
    # differences; before that choice there are as many boxes as tokens.
    before_choice = "encoder_predictions" in expected
    actual, expected = (
        (outputs.encoder_predictions if before_choice else outputs).pred_boxes.float()
        for outputs in (half, expected)
    )
    # bfloat16 keeps 8 bits; a dozen layers of it.
    assert_same_boxes(actual, expected, rtol=0, atol=0.05)


def test_attention_implementation_can_be_switched(name, caplog):
    model = perturb(build(name))
    pixel_values = torch.randn(1, 3, 64, 96)
    expected = forward(model, pixel_values=pixel_values)

    with caplog.at_level(logging.WARNING):
        model.set_attn_implementation("eager")

    assert not caplog.records
    attentions = forward(model, pixel_values=pixel_values, output_attentions=True)
    assert attentions.decoder_attentions[0] is not None
    torch.testing.assert_close(attentions.logits, expected.logits, rtol=0, atol=1e-4)


def test_attention_implementation_is_chosen_at_loading(name, tmp_path):
    build(name).save_pretrained(tmp_path)

    # The backbone, transformers' ResNet, has no attention and would refuse it.
    model = AutoModelForObjectDetection.from_pretrained(tmp_path, attn_implementation="sdpa")
    eager = AutoModelForObjectDetection.from_pretrained(tmp_path, attn_implementation="eager")

    assert model.config._attn_implementation == "sdpa"
    assert eager.config._attn_implementation == "eager"


def test_model_without_weights_is_built_by_accelerate(name):
    config = tiny_config(VARIANTS, name, backbone_norm="frozen")

    with init_empty_weights():  # parameters on the meta device, buffers on the CPU
        model = VARIANTS[name].detector(config)

    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.model.backbone.body.embedder.embedder.normalization.is_folded


def test_exported_program_takes_other_batches_and_sizes(name):
    model = perturb(build(name)).eval()
    batch, height, width = (torch.export.Dim(axis) for axis in ("batch", "height", "width"))
    program = torch.export.export(
        model,
        (),
        {
            # No level has a side of one cell, which the exporter would take for a constant.
            # Channels last, as image processors return them; the program takes any layout.
            "pixel_values": torch.randn(2, 256, 320, 3).permute(0, 3, 1, 2),
            "pixel_mask": torch.ones(2, 256, 320, dtype=torch.int64),
        },
        dynamic_shapes={
            "pixel_values": {0: batch, 2: 32 * height, 3: 32 * width},
            "pixel_mask": {0: batch, 1: 32 * height, 2: 32 * width},
        },
    )
    other = {
        "pixel_values": torch.randn(3, 3, 384, 192),
        "pixel_mask": torch.ones(3, 384, 192, dtype=torch.int64),
    }
    # Another memory layout than in eager mode, hence another order of sums.
    assert_same_detections(program.module()(**other), forward(model, **other), rtol=0, atol=1e-4)


def test_compiles_into_one_graph(name):
    model = perturb(build(name)).eval()
    batch = tiny_batch()
    compiled = in_one_graph(model)
    with torch.no_grad():
        # As for the exported program.
        assert_same_detections(compiled(**batch), model(**batch), rtol=0, atol=1e-4)


def test_new_labels_recreate_the_class_head_only(name, tmp_path):
    model = perturb(build(name))
    model.save_pretrained(tmp_path)
    id2label = {0: "cat", 1: "dog", 2: "owl", 3: "yak"}

    loaded, info = VARIANTS[name].detector.from_pretrained(
        tmp_path, id2label=id2label, output_loading_info=True
    )

    assert loaded.config.label2id == {"cat": 0, "dog": 1, "owl": 2, "yak": 3}
    recreated = {key for key, *_ in info["mismatched_keys"]}
    assert recreated == {key for key in model.state_dict() if key.endswith(model._class_head_keys)}
    kept = {key: value for key, value in model.state_dict().items() if key not in recreated}
    loaded_state = loaded.state_dict()
    for key, value in kept.items():
        torch.testing.assert_close(loaded_state[key], value, rtol=0, atol=0)
    labels = [{"class_labels": torch.tensor([3]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    assert loaded(pixel_values=torch.randn(1, 3, 64, 64), labels=labels).loss.isfinite()


def test_new_number_of_labels_passes_through_auto_classes(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path, num_labels=5)
    assert loaded.config.num_labels == 5
    outputs = forward(loaded, **tiny_batch())
    assert outputs.logits.shape[-1] >= 5


def test_other_wrong_shapes_stay_errors_with_new_labels(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    # The number of queries is nobody's shape where they are chosen from the picture.
    for change in ({"num_queries": 6}, {"decoder_ffn_dim": 44}):
        changed = build(name, **change).state_dict()
        wrong = [key for key, value in changed.items() if value.shape != shapes[key]]
        if wrong:
            break
    with pytest.raises(RuntimeError, match=re.escape(f"{wrong[0]}: ")):
        VARIANTS[name].detector.from_pretrained(tmp_path, num_labels=4, **change)


def test_class_head_is_not_replaced_unless_labels_are_given(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    labels = dict(enumerate("abcdefg"))
    config |= {"id2label": labels, "label2id": {name: label for label, name in labels.items()}}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(RuntimeError, match=r"in the checkpoint.*\n.*re-created, where num_labels"):
        VARIANTS[name].detector.from_pretrained(tmp_path)
    detector = VARIANTS[name].detector.from_pretrained(tmp_path, num_labels=7)
    assert detector.config.id2label == labels


def test_frozen_stages_stay_frozen_after_loading(name, tmp_path):
    model = build(name, frozen_backbone_stages=2)
    model.save_pretrained(tmp_path)
    loaded = VARIANTS[name].detector.from_pretrained(tmp_path)
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert {key for key, p in loaded.named_parameters() if not p.requires_grad} == frozen


@pytest.mark.parametrize("shape", [(2, 35, 50), (1, 70, 101), (2, 1, 70, 101)])
def test_pixel_mask_of_another_shape_is_an_error(name, shape):
    with pytest.raises(ValueError, match=r"pixel_mask must have the shape \(2, 70, 101\).* got "):
        build(name)(torch.zeros(2, 3, 70, 101), torch.ones(shape))


def test_label_out_of_range_is_named(name):
    labels = tiny_labels()
    labels[1]["class_labels"] = torch.tensor([NUM_LABELS])
    with pytest.raises(ValueError, match=rf"labels\[1\].*is {NUM_LABELS}.*has {NUM_LABELS} labels"):
        build(name)(**tiny_batch(), labels=labels)


def test_label_without_classes_is_named(name):
    labels = tiny_labels()
    del labels[1]["class_labels"]
    with pytest.raises(ValueError, match=r"labels\[1\] has no 'class_labels'"):
        build(name)(**tiny_batch(), labels=labels)


def test_keywords_of_loading_are_checked_as_those_of_a_new_configuration(name, tmp_path):
    build(name).config.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassClassValidationError, match="activation_function must be"):
        VARIANTS[name].config.from_pretrained(tmp_path, activation_function="rleu")


def test_pipeline_detects_without_complaint(name, tmp_path, caplog):
    build(name).save_pretrained(tmp_path)
    VARIANTS[name].image_processor(size={"shortest_edge": 64, "longest_edge": 100}).save_pretrained(
        tmp_path
    )
    from transformers import pipeline

    with caplog.at_level(logging.WARNING):
        detect = pipeline("object-detection", model=str(tmp_path))
        detections = detect(picture(90, 60), threshold=0.0)

    assert not caplog.records
    # One detection per query, or one per query and class where the processor limits their number.
    per_query = 1 if VARIANTS[name].image_processor.default_top_k is None else NUM_LABELS
    assert len(detections) == tiny_config(VARIANTS, name).num_queries * per_query
    assert {"score", "label", "box"} == set(detections[0])


def test_pipeline_batches_unlike_pictures_with_pad_size(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    VARIANTS[name].image_processor(
        size={"shortest_edge": 64, "longest_edge": 100}, pad_size={"height": 100, "width": 100}
    ).save_pretrained(tmp_path)
    from transformers import pipeline

    detect = pipeline("object-detection", model=str(tmp_path))
    # More than there are layers.
    pictures = [picture(90, 60), picture(60, 90), picture(50, 50), picture(70, 80)]
    together = detect(pictures, threshold=0.0, batch_size=4)
    for batched, each in zip(together, pictures, strict=True):
        alone = detect(each, threshold=0.0)
        assert [found["box"] for found in batched] == [found["box"] for found in alone]
        scores = [[found["score"] for found in result] for result in (batched, alone)]
        torch.testing.assert_close(*(torch.tensor(values) for values in scores))


class OnePicture(Dataset):
    """Four examples of what the image processor returns."""

    def __init__(self):
        self.labels = tiny_labels()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.manual_seed(index)
        label = self.labels[index % 2]
        extra = {
            "image_id": torch.tensor([index]),
            "orig_size": torch.tensor([64, 96]),
            "size": torch.tensor([64, 96]),
            "area": torch.full((len(label["boxes"]),), 100.0),
            "iscrowd": torch.zeros(len(label["boxes"]), dtype=torch.int64),
        }
        return {"pixel_values": torch.randn(3, 64, 96), "labels": {**label, **extra}}


def test_trainer_trains_evaluates_and_resumes(name, tmp_path):
    from hf_querydet.data import DetectionCollator
    from hf_querydet.evaluation import DetectionTrainer

    model, processor = build(name), VARIANTS[name].image_processor()

    def trainer(max_steps):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=max_steps,
            save_steps=2,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        return DetectionTrainer(
            model=model,
            args=arguments,
            train_dataset=OnePicture(),
            eval_dataset=OnePicture(),
            data_collator=DetectionCollator(processor),
            processing_class=processor,
        )

    first = trainer(2)
    first.train()
    metrics = first.evaluate()
    assert 0 <= metrics["eval_map"] <= 1
    assert metrics["eval_loss"] > 0
    second = trainer(4)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4


def tiny_batch_of_seed(seed):
    torch.manual_seed(seed)
    return tiny_batch()


def test_untrained_heads_are_warned_of_where_layers_refine_boxes(name, caplog):
    refines = {"deformable_detr", "efficient_detr", "dynamic_detr", "sparse_rcnn"}
    options = {"with_box_refine": True} if name == "deformable_detr" else {}

    with caplog.at_level(logging.WARNING):
        tiny_config(VARIANTS, name, auxiliary_loss=False, decoder_layers=3, **options)

    warned = (
        "trains the last decoder layer's heads only; the boxes that the 2 layers" in caplog.text
    )
    assert warned == (name in refines)
