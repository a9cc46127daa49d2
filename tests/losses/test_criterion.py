from contextlib import ExitStack, contextmanager

import oracles
import pytest
import torch
import torch.multiprocessing as mp
import torchvision
from criterion_in_processes import (
    CLASSIFICATIONS,
    SPLITS,
    average_over_two_processes,
    gradients,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_querydet.losses import FocalClassification, SetCriterion, SoftmaxClassification
from hf_querydet.ops.boxes import boxes_cxcywh_to_xyxy
from hf_querydet.outputs import SetPredictions

LAYERS, QUERIES, LABELS = 3, 4, 5
COSTS = {"class_cost": 1.5, "bbox_cost": 4.0, "giou_cost": 2.5}
COEFFICIENTS = {
    "cls_loss_coefficient": 0.7,
    "bbox_loss_coefficient": 5.0,
    "giou_loss_coefficient": 1.3,
}
TERMS = dict(zip(("loss_ce", "loss_bbox", "loss_giou"), COEFFICIENTS.values(), strict=True))
# Not the defaults, so that a default in their place shows.
OPTIONS = {"softmax": {"no_object_weight": 0.3}, "focal": {"alpha": 0.4, "gamma": 1.5}}

both_classifications = pytest.mark.parametrize("classification", ["softmax", "focal"])


def build(classification: str) -> SetCriterion:
    kind = {"softmax": SoftmaxClassification, "focal": FocalClassification}[classification]
    return SetCriterion(kind(**OPTIONS[classification]), **COSTS, **COEFFICIENTS)


def random_labels(*counts: int) -> list[dict[str, torch.Tensor]]:
    return [
        {
            "class_labels": torch.randint(LABELS, (count,)),
            "boxes": torch.rand(count, 4) * 0.5 + 0.2,
        }
        for count in counts
    ]


def random_predictions(
    classification: str, *, layers: int = LAYERS, batch: int = 3, queries: int = QUERIES
) -> SetPredictions:
    num_classes = LABELS + 1 if classification == "softmax" else LABELS
    return SetPredictions(
        logits=(torch.randn(layers, batch, queries, num_classes) * 2).requires_grad_(),
        pred_boxes=(torch.rand(layers, batch, queries, 4) * 0.5 + 0.2).requires_grad_(),
    )


def to_device(predictions: SetPredictions, device: torch.device) -> SetPredictions:
    return SetPredictions(
        logits=predictions.logits.to(device), pred_boxes=predictions.pred_boxes.to(device)
    )


def expected_terms(
    classification: str, predictions: SetPredictions, labels, suffixes: list[str]
) -> dict[str, float]:
    terms = {}
    for layer, suffix in enumerate(suffixes):
        layer_terms = oracles.set_loss(
            predictions.logits[layer].double(),
            predictions.pred_boxes[layer].double(),
            labels,
            **COSTS,
            **OPTIONS[classification],
        )
        terms |= {name + suffix: value for name, value in layer_terms.items()}
    return terms


def assert_loss(result: tuple[torch.Tensor, dict[str, torch.Tensor]], expected: dict[str, float]):
    loss, loss_dict = result
    total = sum(
        value * next(weight for name, weight in TERMS.items() if key.startswith(name))
        for key, value in expected.items()
    )
    # Single precision sums of some dozens of terms.
    assert {key: value.item() for key, value in loss_dict.items()} == pytest.approx(
        expected, rel=1e-5
    )
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert loss.dtype == torch.float32


# Values


@both_classifications
def test_corners_are_used_in_matching_and_loss(classification):
    predictions, labels = random_predictions(classification, layers=1), random_labels(3, 1, 2)
    kind = {"softmax": SoftmaxClassification, "focal": FocalClassification}[classification]
    criterion = SetCriterion(
        kind(**OPTIONS[classification]),
        **COSTS,
        **COEFFICIENTS,
        box_coordinates=boxes_cxcywh_to_xyxy,
    )
    expected = oracles.set_loss(
        predictions.logits[0].double(),
        predictions.pred_boxes[0].double(),
        labels,
        **COSTS,
        **OPTIONS[classification],
        distance=oracles.corner_l1,
    )
    assert_loss(criterion(predictions, labels), expected)


@both_classifications
@pytest.mark.parametrize(
    "counts",
    [(2, 0, 3), (0, 0, 0), (5, 6, 1)],
    ids=["an empty picture", "no objects at all", "more objects than queries"],
)
def test_terms_of_every_layer_and_their_weighted_sum_equal_the_definition(
    classification, counts, device
):
    predictions, labels = random_predictions(classification), random_labels(*counts)
    expected = expected_terms(classification, predictions, labels, ["_0", "_1", ""])

    result = build(classification)(to_device(predictions, device), labels)

    assert_loss(result, expected)


@both_classifications
def test_single_layer_has_no_auxiliary_terms(classification):
    predictions, labels = random_predictions(classification, layers=1), random_labels(1, 2, 0)

    result = build(classification)(predictions, labels)

    assert_loss(result, expected_terms(classification, predictions, labels, [""]))


@both_classifications
def test_encoder_predictions_are_matched_to_the_labels(classification):
    predictions, labels = random_predictions(classification), random_labels(2, 0, 3)
    encoder_predictions = random_predictions(classification, layers=1, queries=7)
    expected = expected_terms(classification, predictions, labels, ["_0", "_1", ""])
    expected |= expected_terms(classification, encoder_predictions, labels, ["_enc"])

    result = build(classification)(predictions, labels, encoder_predictions=encoder_predictions)

    assert_loss(result, expected)


@both_classifications
def test_encoder_predictions_are_matched_to_labels_of_their_own(classification):
    predictions, labels = random_predictions(classification), random_labels(2, 0, 3)
    encoder_predictions = random_predictions(classification, layers=1, queries=7)
    encoder_labels = [label | {"class_labels": label["class_labels"] * 0} for label in labels]
    expected = expected_terms(classification, predictions, labels, ["_0", "_1", ""])
    expected |= expected_terms(classification, encoder_predictions, encoder_labels, ["_enc"])

    result = build(classification)(
        predictions,
        labels,
        encoder_predictions=encoder_predictions,
        encoder_labels=lambda _: encoder_labels,
    )

    assert_loss(result, expected)


def test_focal_classification_of_the_encoder_is_divided_by_its_own_objects():
    predictions, labels = random_predictions("focal"), random_labels(2, 0, 3)
    encoder_predictions = random_predictions("focal", layers=1, queries=7)
    # Every object twice.
    encoder_labels = [
        {name: values.repeat_interleave(2, dim=0) for name, values in label.items()}
        for label in labels
    ]
    expected = expected_terms("focal", encoder_predictions, encoder_labels, ["_enc"])

    _, loss_dict = build("focal")(
        predictions,
        labels,
        encoder_predictions=encoder_predictions,
        encoder_labels=lambda _: encoder_labels,
    )

    assert loss_dict["loss_ce_enc"].item() == pytest.approx(expected["loss_ce_enc"], rel=1e-5)


# Gradients


@both_classifications
@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 0, 0)], ids=["one empty", "all empty"])
def test_loss_is_finite_and_every_prediction_has_a_gradient(classification, counts):
    predictions = random_predictions(classification)
    encoder_predictions = random_predictions(classification, layers=1, queries=7)
    inputs = [*predictions.values(), *encoder_predictions.values()]

    loss, _ = build(classification)(
        predictions, random_labels(*counts), encoder_predictions=encoder_predictions
    )
    loss.backward()

    assert loss.isfinite()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in inputs)
    # Classes are learned from empty pictures too.
    assert (predictions.logits.grad != 0).any(-1).all()


def test_batch_without_weight_has_a_loss_of_zero():
    criterion = SetCriterion(SoftmaxClassification(no_object_weight=0.0), **COSTS, **COEFFICIENTS)
    predictions = random_predictions("softmax")

    loss, _ = criterion(predictions, random_labels(0, 0, 0))
    loss.backward()

    assert loss.item() == 0
    assert torch.equal(predictions.logits.grad, torch.zeros_like(predictions.logits))


@both_classifications
def test_gradient_of_the_logits_is_that_of_finite_differences(classification):
    # The box terms are not smooth; their gradient is tested with the boxes.
    predictions, labels = random_predictions(classification, layers=2), random_labels(2, 0, 3)
    criterion = build(classification)
    loss, _ = criterion(predictions, labels)
    loss.backward()
    # Small enough not to change the matching, large enough for single precision.
    step = torch.where(torch.rand_like(predictions.logits) < 0.7, 3e-3, -1e-3)
    step = step * predictions.logits.grad.sign()

    with torch.no_grad():
        ahead, behind = (
            criterion(
                SetPredictions(
                    logits=predictions.logits + sign * step, pred_boxes=predictions.pred_boxes
                ),
                labels,
            )[0]
            for sign in (1, -1)
        )

    change = (predictions.logits.grad * step).sum().item()
    # The losses, of about 10, are rounded to 1e-6.
    assert change == pytest.approx((ahead - behind).item() / 2, abs=5e-6)
    assert change > 1e-3


def test_gradient_of_the_boxes_is_that_of_l1_and_giou():
    target = torch.tensor([0.5, 0.5, 0.3, 0.2])
    pred_box = torch.tensor([0.57, 0.46, 0.41, 0.26], requires_grad=True)
    distance = (pred_box - target).abs().sum()
    corners = torchvision.ops.box_convert(torch.stack([pred_box, target]), "cxcywh", "xyxy")
    giou = torchvision.ops.generalized_box_iou(corners[:1], corners[1:]).sum()
    (expected,) = torch.autograd.grad(5.0 * distance + 1.3 * (1 - giou), pred_box)

    loss, _ = build("focal")(
        SetPredictions(logits=torch.zeros(1, 1, 1, LABELS), pred_boxes=pred_box.view(1, 1, 1, 4)),
        [{"class_labels": torch.tensor([2]), "boxes": target[None]}],
    )

    torch.testing.assert_close(torch.autograd.grad(loss, pred_box)[0], expected)


# Precision


@both_classifications
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_give_the_loss_of_the_rounded_numbers(classification, dtype):
    predictions, labels = random_predictions(classification), random_labels(2, 0, 3)
    half = SetPredictions(**{name: value.to(dtype) for name, value in predictions.items()})
    rounded = SetPredictions(**{name: value.float() for name, value in half.items()})
    expected, _ = build(classification)(rounded, labels)

    loss, _ = build(classification)(half, labels)

    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@both_classifications
def test_autocast_does_not_change_the_loss(classification, device):
    predictions = to_device(random_predictions(classification), device)
    labels = random_labels(2, 0, 3)
    expected, _ = build(classification)(predictions, labels)

    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss, _ = build(classification)(predictions, labels)

    assert torch.equal(loss, expected)


@both_classifications
def test_dtype_of_the_labels_does_not_matter(classification):
    predictions, labels = random_predictions(classification), random_labels(2, 0, 3)
    expected, _ = build(classification)(predictions, labels)
    converted = [
        {"class_labels": label["class_labels"].int(), "boxes": label["boxes"].double()}
        for label in labels
    ]
    # What torch.tensor([]) makes of a list without objects.
    converted[1]["class_labels"] = torch.tensor([])

    loss, _ = build(classification)(predictions, converted)

    assert torch.equal(loss, expected)


def test_predictions_that_are_not_numbers_show_in_the_loss():
    predictions = random_predictions("focal")
    predictions.logits.data[0, 1] = torch.nan
    predictions.pred_boxes.data[1, 2, 3] = torch.nan

    loss, _ = build("focal")(predictions, random_labels(2, 1, 3))

    assert loss.isnan()


# Transfers


class HostReads(TorchFunctionMode):
    """Record what would bring a tensor of a device to the host, as if the CPU were a device."""

    METHODS = (
        "item",
        "tolist",
        "numpy",
        "nonzero",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
    )

    def __init__(self) -> None:
        super().__init__()
        self.transfers = 0
        self.reads: list[str] = []
        self.on_host: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        result = func(*args, **(kwargs or {}))
        if name == "cpu" or (name == "to" and "cpu" in args[1:]):
            self.transfers += 1
            self.on_host.add(result.untyped_storage().data_ptr())
        elif name in self.METHODS and args[0].untyped_storage().data_ptr() not in self.on_host:
            self.reads.append(name)
        return result


class HiddenReads(TorchDispatchMode):
    """Record reads below the Python methods: scalars, and shapes that depend on values."""

    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads():
    with ExitStack() as stack:
        recorder = stack.enter_context(HostReads())
        stack.enter_context(HiddenReads(recorder.reads))
        yield recorder


@pytest.mark.parametrize(
    "read",
    [
        torch.Tensor.tolist,
        lambda values: values.sum().item(),
        lambda values: bool((values > 0).all()),
        lambda values: values[values > 0],
        torch.nonzero,
        torch.Tensor.numpy,
    ],
    ids=["tolist", "item", "bool", "mask", "nonzero", "numpy"],
)
def test_recorder_sees_a_read(read):
    with host_reads() as recorder:
        read(torch.ones(3))

    assert recorder.reads


@both_classifications
def test_costs_of_all_layers_and_pictures_reach_the_host_in_one_transfer(classification):
    predictions, labels = random_predictions(classification), random_labels(2, 0, 3)
    encoder_predictions = random_predictions(classification, layers=1, queries=7)
    criterion = build(classification)

    with host_reads() as recorder:
        criterion(predictions, labels, encoder_predictions=encoder_predictions)

    assert recorder.transfers == 1
    assert recorder.reads == []


@pytest.mark.cuda
@both_classifications
def test_device_copies_to_the_host_once(classification):
    predictions = to_device(random_predictions(classification), torch.device("cuda"))
    labels = [{n: v.cuda() for n, v in label.items()} for label in random_labels(2, 0, 3)]
    criterion = build(classification)
    criterion(predictions, labels)

    # acc_events: without it torch 2.11 warns that events of an earlier profile would be lost.
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        criterion(predictions, labels)

    copies = [event.name for event in profile.events() if "Memcpy DtoH" in event.name]
    assert len(copies) == 1


# Errors


def labels_with(**changes: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Labels of three pictures, of which the last, with two objects, is changed."""
    labels = random_labels(1, 0, 2)
    labels[2] |= changes
    return labels


ONE_BAD_BOX = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]])


@both_classifications
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (random_labels(1, 2), r"one entry per picture, got 2 for 3 pictures"),
        (
            [*random_labels(1, 2), {"boxes": torch.rand(1, 4)}],
            r"labels\[2\] has no 'class_labels'.*as the image processor makes them",
        ),
        (
            [*random_labels(1, 2), {"class_labels": torch.tensor([1])}],
            r"labels\[2\] has no 'boxes'",
        ),
        (
            labels_with(boxes=torch.rand(3, 4)),
            r"labels\[2\] needs class_labels \(targets,\) and boxes \(targets, 4\), "
            r"got \(2,\) and \(3, 4\)",
        ),
        (labels_with(boxes=torch.rand(2, 5)), r"got \(2,\) and \(2, 5\)"),
        (labels_with(class_labels=torch.ones(2, 1)), r"got \(2, 1\) and \(2, 4\)"),
        (labels_with(class_labels=torch.tensor(1)), r"got \(\) and \(2, 4\)"),
        (
            labels_with(class_labels=torch.tensor([0, LABELS])),
            r"labels\[2\]\['class_labels'\]\[1\] is 5, but the model has 5 labels, 0 to 4",
        ),
        (labels_with(class_labels=torch.tensor([-1, 0])), r"\['class_labels'\]\[0\] is -1"),
        (
            labels_with(boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2], [320.0, 240.0, 64.0, 48.0]])),
            r"labels\[2\]\['boxes'\]\[1\] is \[320.0, 240.0, 64.0, 48.0\]; boxes must be \(centre",
        ),
        (
            labels_with(boxes=ONE_BAD_BOX * torch.tensor([[1.0], [torch.nan]])),
            r"labels\[2\]\['boxes'\]\[1\] is \[nan",
        ),
        (
            labels_with(boxes=ONE_BAD_BOX * torch.tensor([[1, 1, 1, 1], [1, 1, -1, 1]])),
            r"labels\[2\]\['boxes'\]\[1\] is \[0.5, 0.5, -0.2",
        ),
    ],
    ids=[
        "count",
        "no classes",
        "no boxes",
        "unequal lengths",
        "five numbers a box",
        "classes in a column",
        "class without a dimension",
        "class too high",
        "negative class",
        "box in pixels",
        "box that is no number",
        "negative width",
    ],
)
def test_labels_that_do_not_fit_are_an_error(classification, labels, message):
    with pytest.raises(ValueError, match=message):
        build(classification)(random_predictions(classification), labels)


def test_labels_of_the_encoder_are_checked_too():
    predictions = random_predictions("focal")
    wrong = labels_with(class_labels=torch.tensor([0, LABELS]))

    with pytest.raises(ValueError, match=r"\[1\] is 5, but the model has 5 labels"):
        build("focal")(
            predictions,
            random_labels(1, 0, 2),
            encoder_predictions=predictions,
            encoder_labels=lambda _: wrong,
        )


def test_rounding_of_clipped_boxes_is_let_pass():
    boxes = torch.tensor([[0.5, 0.5, 1.0005, 1.0], [-0.0005, 0.5, 0.2, 0.2]])

    loss, _ = build("focal")(random_predictions("focal"), labels_with(boxes=boxes))

    assert loss.isfinite()


# Several processes


@pytest.fixture(scope="module")
def averaged_gradients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(average_over_two_processes, args=(str(folder),), nprocs=2)
    return torch.load(folder / "gradients.pt", weights_only=True)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("classification", CLASSIFICATIONS)
def test_gradient_averaged_over_processes_is_that_of_the_whole_batch(
    averaged_gradients, split, classification
):
    first, second = SPLITS[split]
    expected = gradients(classification, first + second, slice(None))

    for name, gradient in averaged_gradients[split, classification].items():
        # The loss is computed in float32, summed in another order.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@both_classifications
def test_predictions_that_are_not_usable_are_as_if_they_were_not_there(classification):
    predictions, labels = random_predictions(classification), random_labels(2, 3, 1)
    # Fewer usable queries than objects in the second picture, none in the third.
    is_usable = torch.tensor(
        [[True, False, True, True], [False, True, False, True], [False, False, False, False]]
    )
    marked = SetPredictions(
        logits=predictions.logits, pred_boxes=predictions.pred_boxes, is_usable=is_usable
    )

    loss, terms = build(classification)(marked, labels)
    loss.backward()

    for layer, suffix in enumerate(("_0", "_1", "")):
        expected = oracles.set_loss(
            [predictions.logits[layer, i, kept] for i, kept in enumerate(is_usable)],
            [predictions.pred_boxes[layer, i, kept] for i, kept in enumerate(is_usable)],
            labels,
            **COSTS,
            **OPTIONS[classification],
        )
        for name, value in expected.items():
            assert terms[name + suffix].item() == pytest.approx(value, rel=1e-4)
    for gradient in (predictions.logits.grad, predictions.pred_boxes.grad):
        assert not gradient[:, ~is_usable].any()
        assert gradient[:, is_usable].any()
