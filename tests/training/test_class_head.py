"""Class heads of detectors that get other labels."""

import math

import pytest
import torch
from tiny import perturb, tiny_batch, tiny_config, tiny_labels

from hf_querydet import VARIANTS, load_detector_for_labels


def build(name, **changes):
    return perturb(VARIANTS[name].detector(tiny_config(VARIANTS, name, **changes)))


def class_heads(model):
    """Class heads and their names, each once."""
    return {name: module for name, module in model.named_modules() if name.endswith("class_head")}


def copies(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_reset_gives_all_class_heads_the_first_values_of_a_new_model(name):
    model = build(name)
    new = class_heads(VARIANTS[name].detector(model.config))
    before = {key: copies(head) for key, head in class_heads(model).items()}

    model.reset_class_head()

    assert before.keys() == new.keys()
    for key, head in class_heads(model).items():
        assert not torch.isclose(head.weight, before[key]["weight"]).any(1).all()
        # The range of a uniform distribution over some hundred values.
        assert head.weight.abs().max().item() == pytest.approx(
            new[key].weight.abs().max().item(), rel=0.15
        )
        if name == "detr":  # softmax, the only one without a prior
            assert head.bias.std() > 0
        else:
            assert head.bias.tolist() == pytest.approx([-math.log(99)] * 3)


@pytest.mark.parametrize("name", VARIANTS)
def test_reset_leaves_all_other_tensors_alone(name):
    model = build(name)
    before = copies(model)
    gradients = {key: parameter.requires_grad for key, parameter in model.named_parameters()}

    model.reset_class_head()

    changed = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert changed == {key for key in before if key.endswith(model._class_head_keys)}
    assert gradients == {key: value.requires_grad for key, value in model.named_parameters()}
    assert model(**tiny_batch(), labels=tiny_labels()).loss.isfinite()


def test_reset_keeps_what_scores_objects_of_any_class():
    model = build("deformable_detr", two_stage=True, with_box_refine=True)
    old = copies(model.model.heads[-1].class_head)

    model.reset_class_head()

    new = model.model.heads[-1].class_head
    assert torch.equal(new.weight[0], old["weight"][0])
    assert torch.equal(new.bias[0], old["bias"][0])
    assert not torch.equal(new.weight[1], old["weight"][1])
    assert new.bias[1:].tolist() == pytest.approx([-math.log(99)] * 2)


def test_reset_says_nothing_of_its_way(caplog):
    build("detr").reset_class_head()
    assert not caplog.records


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of a detector of three labels and an unused slot, and its model."""
    directory = tmp_path_factory.mktemp("detector")
    id2label = {0: "cat", 1: "N/A", 2: "dog", 3: "owl"}
    model = build("detr", num_labels=4, id2label=id2label)
    model.save_pretrained(directory)
    VARIANTS["detr"].image_processor().save_pretrained(directory)
    return directory, model


@pytest.mark.parametrize("names", [["cat", "dog", "owl"], ["owl", "cat", "dog"], ["dog"]])
def test_class_head_is_kept_where_the_model_has_every_name(saved, names):
    directory, model = saved
    loaded, processor, keeps_head = load_detector_for_labels(directory, dict(enumerate(names)))
    assert keeps_head
    assert loaded.config.id2label == model.config.id2label
    assert all(value.equal(loaded.state_dict()[key]) for key, value in copies(model).items())
    assert type(processor) is VARIANTS["detr"].image_processor


@pytest.mark.parametrize(
    "names",
    [["cat", "dog", "yak"], ["a", "b", "c", "d"], ["cat", "N/A"]],
    ids=["another number", "the same number", "an unused slot is no name"],
)
def test_class_head_is_new_where_the_model_lacks_a_name(saved, names):
    directory, model = saved
    id2label = dict(enumerate(names))
    loaded, _, keeps_head = load_detector_for_labels(directory, id2label)
    assert not keeps_head
    assert loaded.config.id2label == id2label
    assert loaded.config.label2id == {name: label for label, name in id2label.items()}
    rows = len(names)
    assert len(loaded.class_head.weight) == rows + 1
    old = model.class_head.weight[:rows]
    assert not torch.isclose(loaded.class_head.weight[: len(old)], old).all(1).any()
    others = {key: value for key, value in copies(model).items() if "class_head" not in key}
    assert all(value.equal(loaded.state_dict()[key]) for key, value in others.items())


def test_fields_reach_the_configuration(saved):
    loaded, *_ = load_detector_for_labels(saved[0], {0: "cat"}, dropout=0.25)
    assert loaded.config.dropout == 0.25


def test_detector_of_few_bits_is_trained_in_float32(tmp_path):
    build("conditional_detr").to(torch.bfloat16).save_pretrained(tmp_path)
    VARIANTS["conditional_detr"].image_processor().save_pretrained(tmp_path)
    labels = {0: "cat", 1: "owl"}

    model, *_ = load_detector_for_labels(tmp_path, labels)
    half, *_ = load_detector_for_labels(tmp_path, labels, dtype=torch.bfloat16)

    assert (model.dtype, half.dtype) == (torch.float32, torch.bfloat16)
