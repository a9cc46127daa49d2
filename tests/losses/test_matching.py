import itertools
import math

import numpy as np
import oracles
import pytest
import torch

from hf_querydet.losses.matching import assign, box_cost, focal_class_cost, softmax_class_cost
from hf_querydet.ops.boxes import boxes_cxcywh_to_xyxy

LAYERS, BATCH, QUERIES, CLASSES, OBJECTS = 2, 3, 4, 5, 3


def random_cxcywh(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, 4, dtype=torch.float64) * 0.4 + 0.2


def cost_by_loops(entry) -> torch.Tensor:
    """Cost matrix (L, B, Q, T) from a function of the four indices."""
    cost = torch.empty(LAYERS, BATCH, QUERIES, OBJECTS, dtype=torch.float64)
    for index in itertools.product(*map(range, cost.shape)):
        cost[index] = entry(*index)
    return cost


def test_softmax_cost_is_minus_the_probability_of_the_objects_class():
    logits = torch.randn(LAYERS, BATCH, QUERIES, CLASSES, dtype=torch.float64)
    class_labels = torch.randint(CLASSES - 1, (BATCH, OBJECTS))

    def entry(layer, picture, query, target):
        return -oracles.softmax(logits[layer, picture, query].tolist())[
            class_labels[picture, target]
        ]

    torch.testing.assert_close(softmax_class_cost(logits, class_labels), cost_by_loops(entry))


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.5)])
def test_focal_cost_is_the_gain_of_calling_the_query_the_object(alpha, gamma):
    logits = torch.randn(LAYERS, BATCH, QUERIES, CLASSES, dtype=torch.float64) * 3
    class_labels = torch.randint(CLASSES, (BATCH, OBJECTS))

    def entry(layer, picture, query, target):
        logit = logits[layer, picture, query, class_labels[picture, target]].item()
        return oracles.focal_class_cost(logit, alpha=alpha, gamma=gamma)

    cost = focal_class_cost(logits, class_labels, alpha=alpha, gamma=gamma)

    torch.testing.assert_close(cost, cost_by_loops(entry))


def test_focal_cost_is_finite_where_the_sigmoid_saturates():
    logits = torch.tensor([-200.0, 200.0]).view(1, 1, 2, 1)

    cost = focal_class_cost(logits, torch.zeros(1, 1, dtype=torch.int64)).flatten().tolist()

    # -0.25 log(1e-8), and 0.75 log of what float32 leaves of 1 - 1 + 1e-8.
    assert cost == pytest.approx([-0.25 * math.log(1e-8), 0.75 * math.log(1e-8)], rel=1e-5)


def test_box_cost_is_weighted_l1_minus_weighted_giou():
    pred_boxes, boxes = random_cxcywh(LAYERS, BATCH, QUERIES), random_cxcywh(BATCH, OBJECTS)

    def entry(layer, picture, query, target):
        predicted = pred_boxes[layer, picture, query].tolist()
        wanted = boxes[picture, target].tolist()
        return 5 * oracles.l1(predicted, wanted) - 2 * oracles.giou(predicted, wanted)

    cost = box_cost(pred_boxes, boxes, bbox_cost=5.0, giou_cost=2.0)

    torch.testing.assert_close(cost, cost_by_loops(entry))


def test_l1_of_box_cost_can_be_that_of_corners():
    pred_boxes, boxes = random_cxcywh(LAYERS, BATCH, QUERIES), random_cxcywh(BATCH, OBJECTS)

    def entry(layer, picture, query, target):
        predicted = pred_boxes[layer, picture, query].tolist()
        return 5 * oracles.corner_l1(predicted, boxes[picture, target].tolist())

    cost = box_cost(
        pred_boxes, boxes, bbox_cost=5.0, giou_cost=0.0, box_coordinates=boxes_cxcywh_to_xyxy
    )

    torch.testing.assert_close(cost, cost_by_loops(entry))


@pytest.mark.parametrize(
    ("num_queries", "counts"),
    [(5, [3, 0, 4]), (3, [5, 3, 1]), (1, [4, 0, 0]), (4, [0, 0, 0])],
    ids=["fewer objects", "more objects than queries", "one query", "no objects"],
)
def test_assignment_is_the_cheapest_of_all_permutations(num_queries, counts):
    generator = np.random.default_rng(0)
    # What fills the smaller pictures up is cheapest of all, and must not be chosen.
    cost = np.full((2, 3, num_queries, max([*counts, 1])), -100.0)
    for picture, count in enumerate(counts):
        cost[:, picture, :, :count] = generator.normal(size=(2, num_queries, count))

    layer, picture, query, target = assign(cost, counts)

    for index in itertools.product(range(2), range(3)):
        count = counts[index[1]]
        chosen = (layer == index[0]) & (picture == index[1])
        queries, targets = query[chosen], target[chosen]
        assert len(queries) == min(num_queries, count)
        assert len(set(queries)) == len(set(targets)) == len(queries)
        assert all(targets < count)
        expected = oracles.cheapest_pairs(cost[index].tolist(), count)
        assert sorted(zip(queries.tolist(), targets.tolist(), strict=True)) == sorted(expected)


def test_pairs_are_integers_also_when_nothing_is_matched():
    pairs = assign(np.empty((2, 3, 4, 0), dtype=np.float32), [0, 0, 0])

    assert [(array.dtype, array.shape) for array in pairs] == [(np.int64, (0,))] * 4


def test_costs_that_are_not_numbers_are_assigned_last():
    cost = np.array([[[[1.0, 5.0], [np.nan, np.inf], [7.0, 2.0]]]])

    _, _, query, target = assign(cost, [2])

    assert list(zip(query.tolist(), target.tolist(), strict=True)) == [(0, 0), (2, 1)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_costs_without_any_number_still_give_an_assignment(value):
    pairs = np.stack(assign(np.full((1, 1, 3, 2), value, dtype=np.float32), [2]))

    assert pairs.shape == (4, 2)
    assert sorted(pairs[3].tolist()) == [0, 1]


@pytest.mark.parametrize("cost", [softmax_class_cost, focal_class_cost])
def test_labels_out_of_range_do_not_read_beyond_the_classes(cost):
    # They are reported later, from the host.
    logits = torch.randn(1, 1, 2, 3)

    assert cost(logits, torch.tensor([[-1, 3, 1000]])).isfinite().all()


def test_queries_that_take_no_part_are_assigned_to_nothing():
    cost = np.random.default_rng(0).normal(size=(2, 2, 5, 3))
    is_usable = np.array([[False, True, True, False, True], [False, False, True, False, True]])
    cost[:, ~is_usable] = -100.0

    layer, picture, query, target = assign(cost, [2, 3], is_usable)

    for index in itertools.product(range(2), range(2)):
        usable = np.flatnonzero(is_usable[index[1]])
        count = [2, 3][index[1]]
        pairs = oracles.cheapest_pairs(cost[index][usable].tolist(), count)
        chosen = (layer == index[0]) & (picture == index[1])
        found = zip(query[chosen].tolist(), target[chosen].tolist(), strict=True)
        assert sorted(found) == sorted((usable[row], column) for row, column in pairs)
