import math

import pytest
import torch
import torchvision
from torch.nn import functional as F

from hf_querydet.losses.detection_losses import no_object_cross_entropy, sigmoid_focal_loss

NO_OBJECT = 4
TARGET_CLASSES = torch.tensor([[0, NO_OBJECT, 3], [NO_OBJECT, NO_OBJECT, 1]])


def test_cross_entropy_weighs_queries_without_an_object_less():
    logits = torch.randn(2, 3, NO_OBJECT + 1, dtype=torch.float64)
    expected = torch.empty(2, 3, dtype=torch.float64)
    for picture in range(2):
        for query in range(3):
            values = logits[picture, query].tolist()
            target = TARGET_CLASSES[picture, query].item()
            loss = math.log(sum(math.exp(value) for value in values)) - values[target]
            expected[picture, query] = 0.3 * loss if target == NO_OBJECT else loss

    loss = no_object_cross_entropy(logits, TARGET_CLASSES, no_object_weight=0.3)

    torch.testing.assert_close(loss, expected)


def test_cross_entropy_over_the_weight_sum_is_pytorchs_weighted_mean():
    logits = torch.randn(2, 3, NO_OBJECT + 1, dtype=torch.float64)
    weight = torch.tensor([1, 1, 1, 1, 0.1], dtype=torch.float64)
    expected = F.cross_entropy(logits.transpose(1, 2), TARGET_CLASSES, weight)

    loss = no_object_cross_entropy(logits, TARGET_CLASSES, no_object_weight=0.1)

    # Three queries have an object, three do not.
    torch.testing.assert_close(loss.sum() / (3 + 0.3), expected)


def test_cross_entropy_takes_any_leading_shape():
    logits = torch.randn(2, 1, 3, NO_OBJECT + 1)
    targets = torch.randint(NO_OBJECT + 1, (2, 1, 3))

    loss = no_object_cross_entropy(logits, targets, no_object_weight=0.1)

    flat = no_object_cross_entropy(logits.view(6, -1), targets.view(6), no_object_weight=0.1)
    assert torch.equal(loss, flat.view(2, 1, 3))


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.5), (0.5, 0.0)])
def test_focal_loss_is_its_formula(alpha, gamma):
    logits = torch.randn(2, 3, 5, dtype=torch.float64) * 3
    targets = (torch.rand(2, 3, 5) < 0.3).double()
    expected = []
    for logit, target in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        p_target, weight = (p, alpha) if target == 1 else (1 - p, 1 - alpha)
        expected.append(-weight * (1 - p_target) ** gamma * math.log(p_target))

    loss = sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma)

    torch.testing.assert_close(loss.flatten(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.5)])
def test_focal_loss_is_that_of_torchvision(alpha, gamma):
    logits = torch.randn(3, 5, requires_grad=True)
    targets = (torch.rand(3, 5) < 0.3).float()
    expected = torchvision.ops.sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)

    loss = sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_focal_loss_of_extreme_logits_is_finite_and_so_is_its_gradient(target, gamma):
    logits = torch.tensor([-1e4, -200.0, -50.0, 0.0, 50.0, 200.0, 1e4], requires_grad=True)

    loss = sigmoid_focal_loss(logits, torch.full_like(logits, target), gamma=gamma)
    loss.sum().backward()

    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_focal_loss_of_a_hopeless_miss_is_its_logit():
    # At logit -200 the probability is below every float: alpha * 200, with slope -alpha.
    logits = torch.tensor([-200.0], requires_grad=True)

    loss = sigmoid_focal_loss(logits, torch.ones(1), alpha=0.25)
    loss.backward()

    assert loss.item() == pytest.approx(50)
    assert logits.grad.item() == pytest.approx(-0.25)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_cross_entropy_of_extreme_logits_is_finite_and_so_is_its_gradient(logit):
    logits = torch.tensor([[logit, 0.0, -logit]], requires_grad=True)

    loss = no_object_cross_entropy(logits, torch.tensor([0]), no_object_weight=0.1)
    loss.sum().backward()

    assert loss.item() == (0.0 if logit > 0 else 2e4)
    assert logits.grad.isfinite().all()
