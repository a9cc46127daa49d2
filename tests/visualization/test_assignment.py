"""Which query is assigned to which object."""

from itertools import permutations

import numpy as np
import pytest
import torch
from tiny import TINY_CONFIGS, perturb, picture, tiny_config

from hf_querydet import VARIANTS
from hf_querydet.visualization import explain, explain_assignment

SIZE = {"shortest_edge": 64, "longest_edge": 100}
ANNOTATIONS = {
    "image_id": 3,
    "annotations": [
        {"bbox": [10, 5, 30, 40], "category_id": 2},
        {"bbox": [0, 0, 90, 60], "category_id": 1, "iscrowd": 1},
        {"bbox": [50, 20, 35, 30], "category_id": 0},
    ],
}
ID2LABEL = {0: "cat", 1: "dog", 2: "owl"}


def detector(name, **changes):
    model = VARIANTS[name].detector(tiny_config(VARIANTS, name, id2label=ID2LABEL, **changes))
    return perturb(model).eval(), VARIANTS[name].image_processor(size=SIZE)


@pytest.mark.parametrize("name", list(TINY_CONFIGS))
def test_loss_of_the_assigned_pairs_is_the_loss_of_the_model(name):
    model, processor = detector(name)
    image = picture(90, 60)
    assignment = explain_assignment(model, processor, image, ANNOTATIONS)
    assert assignment.names == ["owl", "cat"]
    assert assignment.boxes.tolist() == [[10, 5, 40, 45], [50, 20, 85, 50]]
    with torch.no_grad():
        inputs = processor(image, annotations=ANNOTATIONS, return_tensors="pt")
        loss_dict = model(**inputs).loss_dict

    # The generalised IoU loss is a sum over the pairs of the training's own assignment.
    for number, layer in enumerate(assignment.layers):
        suffix = "" if number == len(assignment.layers) - 1 else f"_{number}"
        giou = [-each.costs["giou"] / model.config.giou_cost for each in layer]
        expected = sum(1 - value for value in giou) / 2
        assert loss_dict["loss_giou" + suffix].item() == pytest.approx(expected, rel=1e-4)


def test_boxes_are_those_that_the_queries_predict():
    model, processor = detector("deformable_detr")
    assignment = explain_assignment(model, processor, picture(90, 60), ANNOTATIONS)
    for number, layer in enumerate(assignment.layers):
        for each in layer:
            explained = explain(model, processor, picture(90, 60), each.query).layers[number]
            torch.testing.assert_close(each.box, explained.box)


def test_objects_without_a_query_have_none():
    model, processor = detector("detr", num_queries=1)
    (row, *_) = explain_assignment(model, processor, picture(90, 60), ANNOTATIONS).layers
    assert sorted(each is None for each in row) == [False, True]


def test_table_shows_query_and_cost_of_every_object_and_layer(tmp_path):
    model, processor = detector("detr")
    assignment = explain_assignment(model, processor, picture(90, 60), ANNOTATIONS)
    table = assignment.figure().axes[1]
    assert [label.get_text() for label in table.get_yticklabels()] == ["owl", "cat"]
    expected = {
        (column, row): f"query {each.query}\n{each.cost:.2f}"
        for column, layer in enumerate(assignment.layers)
        for row, each in enumerate(layer)
    }
    assert {text.get_position(): text.get_text() for text in table.texts} == expected
    assignment.save(tmp_path / "assignment.png")
    assert (tmp_path / "assignment.png").stat().st_size > 5000


def test_picture_without_objects_has_a_figure():
    model, processor = detector("detr")
    nothing = {"image_id": 1, "annotations": []}
    assignment = explain_assignment(model, processor, picture(90, 60), nothing)
    assert assignment.layers == [[], [], []]
    assert np.isfinite(assignment.figure().get_size_inches()).all()


def test_training_mode_is_an_error():
    model, processor = detector("detr")
    with pytest.raises(ValueError, match="model is in training mode"):
        explain_assignment(model.train(), processor, picture(90, 60), ANNOTATIONS)


def test_costs_add_up_to_the_least_of_all_assignments():
    model, processor = detector("conditional_detr")
    assignment = explain_assignment(model, processor, picture(90, 60), ANNOTATIONS)
    with torch.no_grad():
        inputs = processor(picture(90, 60), annotations=ANNOTATIONS, return_tensors="pt")
        outputs = model(**inputs)
    config, label = model.config, inputs["labels"][0]

    def cost(query, target):
        """From the definition, one number after the other."""
        score = outputs.logits[0, query, label["class_labels"][target]].sigmoid().item()
        positive = 0.25 * (1 - score) ** 2 * -np.log(score + 1e-8)
        negative = 0.75 * score**2 * -np.log(1 - score + 1e-8)
        ours, theirs = outputs.pred_boxes[0, query].tolist(), label["boxes"][target].tolist()
        distance = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        (x0, y0, x1, y1), (u0, v0, u1, v1) = (
            (x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (ours, theirs)
        )
        common = max(min(x1, u1) - max(x0, u0), 0) * max(min(y1, v1) - max(y0, v0), 0)
        union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - common
        hull = (max(x1, u1) - min(x0, u0)) * (max(y1, v1) - min(y0, v0))
        giou = common / union - (hull - union) / hull
        return (
            config.class_cost * (positive - negative)
            + config.bbox_cost * distance
            - config.giou_cost * giou
        )

    best = min(permutations(range(5), 2), key=lambda pair: cost(pair[0], 0) + cost(pair[1], 1))
    last = assignment.layers[-1]
    assert tuple(each.query for each in last) == best
    for target, each in enumerate(last):
        assert each.cost == pytest.approx(cost(each.query, target), rel=1e-4)
