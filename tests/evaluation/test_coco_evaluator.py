"""pycocotools is the oracle: another program, fed with the annotations and not with our labels."""

import contextlib
import io
import json
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hf_querydet.data import LabelTable
from hf_querydet.evaluation import CocoEvaluator
from hf_querydet.image_processing_utils import DetectionImageProcessor

ID2LABEL = {0: "cat", 1: "N/A", 2: "dog", 3: "owl", 4: "never seen"}
CLASSES = [0, 2, 3, 4]
SIZES = [(211, 307), (333, 128), (97, 401), (250, 251)]  # (height, width)


class SceneMaker:
    """Pictures with objects, crowds, masks' areas, ties, misses and false alarms."""

    def __init__(self, seed=0, num_pictures=14):
        self.random = np.random.default_rng(seed)
        self.pictures = [self._picture(number) for number in range(num_pictures)]

    def _picture(self, number):
        height, width = SIZES[number % len(SIZES)]
        count = 0 if number == 3 else int(self.random.integers(1, 9))
        annotations = [self._annotation(height, width) for _ in range(count)]
        detections = []
        for annotation in annotations:
            for _ in range(self.random.integers(0, 3)):
                noise = self.random.normal(0, 0.04, 4) * annotation["bbox"][2]
                label = annotation["category_id"] if self.random.random() < 0.9 else 2
                detections.append((np.array(annotation["bbox"]) + noise, label))
            if self.random.random() < 0.3:  # exactly the annotation
                detections.append((np.array(annotation["bbox"]), annotation["category_id"]))
        for _ in range(self.random.integers(0, 5)):
            detections.append((self._bbox(height, width), int(self.random.choice([0, 2, 3]))))
        # One decimal only: many equal scores.
        scores = self.random.random(len(detections)).round(1).astype(np.float32)
        # Image ids start at 0 and are not in order.
        return {
            "image_id": (number * 5) % 14,
            "size": (height, width),
            "annotations": annotations,
            "detections": [(*each, score) for each, score in zip(detections, scores, strict=True)],
        }

    def _bbox(self, height, width):
        w, h = self.random.uniform(4, 0.6 * width), self.random.uniform(4, 0.6 * height)
        x, y = self.random.uniform(0, width - w), self.random.uniform(0, height - h)
        return np.array([x, y, w, h]).round(2)

    def _annotation(self, height, width):
        bbox = self._bbox(height, width)
        if self.random.random() < 0.25:  # on COCO's border between small and medium
            bbox[2:] = 32.0
            bbox[:2] = self.random.integers(0, [width - 32, height - 32])
            area = 1024.0
        else:
            area = float((bbox[2] * bbox[3] * self.random.uniform(0.5, 1)).round(2))
        return {
            "bbox": bbox.tolist(),
            "category_id": int(self.random.choice([0, 2, 3], p=[0.5, 0.3, 0.2])),
            "area": area,
            "iscrowd": int(self.random.random() < 0.2),
        }

    def predictions(self, picture):
        """As post_process_object_detection returns them; not sorted."""
        bboxes = np.array([each[0] for each in picture["detections"]]).reshape(-1, 4)
        boxes_xyxy = np.concatenate([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], axis=1)
        return {
            "boxes": torch.tensor(boxes_xyxy, dtype=torch.float32),
            "labels": torch.tensor([each[1] for each in picture["detections"]], dtype=torch.int64),
            "scores": torch.tensor([float(each[2]) for each in picture["detections"]]),
        }


def labels_of(picture):
    """Labels through the image processor, which resizes the picture to another size."""
    height, width = picture["size"]
    processor = DetectionImageProcessor(size={"shortest_edge": 70, "longest_edge": 99})
    annotations = {"image_id": picture["image_id"], "annotations": picture["annotations"]}
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    return dict(processor(images=image, annotations=annotations)["labels"][0])


def evaluate_with_pycocotools(scenes, pictures=None):
    """The twelve numbers, and the precision array of every class."""
    pictures = scenes.pictures if pictures is None else pictures
    annotations, results = [], []
    for picture in pictures:
        for annotation in picture["annotations"]:
            identity = {"id": len(annotations) + 1, "image_id": picture["image_id"]}
            annotations.append({**annotation, **identity})
        prediction = scenes.predictions(picture)
        bboxes = prediction["boxes"].double()
        bboxes[:, 2:] -= bboxes[:, :2]
        for label, bbox, score in zip(
            prediction["labels"].tolist(),
            bboxes.tolist(),
            prediction["scores"].tolist(),
            strict=True,
        ):
            results.append(
                {
                    "image_id": picture["image_id"],
                    "category_id": label,
                    "bbox": bbox,
                    "score": score,
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [
                {"id": each["image_id"], "height": each["size"][0], "width": each["size"][1]}
                for each in pictures
            ],
            "annotations": annotations,
            "categories": [{"id": label, "name": ID2LABEL[label]} for label in CLASSES],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"][..., 0, -1]


def feed(evaluator, scenes, pictures=None, batch_size=3):
    pictures = scenes.pictures if pictures is None else pictures
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        evaluator.update(
            [scenes.predictions(picture) for picture in batch],
            [labels_of(picture) for picture in batch],
        )
    return evaluator


def twelve(metrics):
    return list(metrics.values())[:12]


@pytest.mark.parametrize(
    ("bboxes", "detected", "ours", "theirs"),
    [
        # The fourth object is not counted here; there it is a miss: 76 of the 101 recalls.
        (
            [[10, 10, 30, 40], [60, 20, 30, 30], [20, 70, 50, 20], [80, 80, 0, 12]],
            [[10, 10, 30, 40], [60, 20, 30, 30], [20, 70, 50, 20]],
            1.0,
            76 / 101,
        ),
        # Its visible part is the object here; there its IoU with the whole is 2/3: four of the ten
        # thresholds. For a detection of the whole it is the other way round.
        ([[-20, 10, 60, 40]], [[0, 10, 40, 40]], 1.0, 0.4),
        ([[-20, 10, 60, 40]], [[-20, 10, 60, 40]], 0.4, 1.0),
    ],
    ids=["without-area", "visible-part", "whole"],
)
def test_boxes_without_area_and_parts_outside_do_not_count_unlike_in_pycocotools(
    bboxes, detected, ours, theirs
):
    scenes = SceneMaker(num_pictures=0)
    annotations = [
        {"bbox": bbox, "category_id": 0, "area": bbox[2] * bbox[3], "iscrowd": 0} for bbox in bboxes
    ]
    detections = [(np.array(bbox), 0, 0.9) for bbox in detected]
    picture = {"image_id": 1, "size": (100, 120)}
    scenes.pictures = [{**picture, "annotations": annotations, "detections": detections}]

    metrics = feed(CocoEvaluator(ID2LABEL), scenes).compute()

    assert metrics["map"] == pytest.approx(ours)
    assert evaluate_with_pycocotools(scenes)[0][0] == pytest.approx(theirs)


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_pycocotools(seed):
    scenes = SceneMaker(seed)
    expected, precision = evaluate_with_pycocotools(scenes)
    assert any(each["iscrowd"] for picture in scenes.pictures for each in picture["annotations"])

    metrics = feed(CocoEvaluator(ID2LABEL), scenes).compute()

    assert list(metrics)[:12] == [
        "map",
        "map_50",
        "map_75",
        "map_small",
        "map_medium",
        "map_large",
        "mar_1",
        "mar_10",
        "mar_100",
        "mar_small",
        "mar_medium",
        "mar_large",
    ]
    assert 0.05 < metrics["map"] < 0.95
    np.testing.assert_allclose(twelve(metrics), expected, rtol=0, atol=1e-6)
    for index, label in enumerate(CLASSES[:3]):
        name = ID2LABEL[label]
        assert metrics[f"map/{name}"] == pytest.approx(precision[:, :, index].mean(), abs=1e-6)
        assert metrics[f"map_50/{name}"] == pytest.approx(precision[0, :, index].mean(), abs=1e-6)
    assert metrics["map/never seen"] == -1
    assert "map/N/A" not in metrics
    assert all(type(value) is float for value in metrics.values())


def test_the_order_of_the_pictures_does_not_matter():
    scenes = SceneMaker()

    forwards = feed(CocoEvaluator(ID2LABEL), scenes).compute()
    backwards = feed(CocoEvaluator(ID2LABEL), scenes, scenes.pictures[::-1]).compute()

    assert forwards == backwards


def test_perfect_predictions_reach_one():
    scenes = SceneMaker()
    for picture in scenes.pictures:
        picture["detections"] = [
            (np.array(each["bbox"]), each["category_id"], np.float32(0.5))
            for each in picture["annotations"]
            if not each["iscrowd"]
        ]

    metrics = feed(CocoEvaluator(ID2LABEL), scenes).compute()

    assert metrics["map"] == pytest.approx(1)
    assert metrics["mar_100"] == pytest.approx(1)


def test_an_overlap_of_exactly_one_half_counts_at_one_half():
    """Boxes go through normalised float32 labels; the border must not move on the way."""
    pictures = []
    for number in range(12):
        left, top, width, height = 3.0 + number, 7.0, 14.0 + 2 * number, 19.0 + number
        pictures.append(
            {
                "image_id": number,
                "size": (97 + number, 131),
                "annotations": [{"bbox": [left, top, width, height], "category_id": 0}],
                "detections": [(np.array([left, top, width / 2, height]), 0, np.float32(0.5))],
            }
        )

    metrics = feed(CocoEvaluator(ID2LABEL), SceneMaker(num_pictures=0), pictures).compute()

    assert metrics["map_50"] == pytest.approx(1)
    assert metrics["map"] == pytest.approx(0.1)


def test_annotation_zero_counts_like_the_others():
    """A match to an annotation of id 0 is none in COCO's programs; one object is enough to see."""
    picture = {
        "image_id": 0,
        "size": (100, 120),
        "annotations": [{"bbox": [10, 10, 50, 40], "category_id": 2, "id": 0}],
        "detections": [(np.array([10.0, 10, 50, 40]), 2, np.float32(0.9))],
    }
    scenes = SceneMaker(num_pictures=0)

    assert feed(CocoEvaluator(ID2LABEL), scenes, [picture]).compute()["map"] == 1


def test_a_picture_given_twice_counts_once():
    scenes = SceneMaker()
    once = feed(CocoEvaluator(ID2LABEL), scenes).compute()

    evaluator = feed(CocoEvaluator(ID2LABEL), scenes, [*scenes.pictures, *scenes.pictures[:5]])

    assert len(evaluator) == 14
    assert evaluator.compute() == once


def test_newest_detections_of_a_picture_count():
    scenes = SceneMaker()
    nothing_found = [{**picture, "detections": []} for picture in scenes.pictures]

    evaluator = feed(CocoEvaluator(ID2LABEL), scenes, [*nothing_found, *scenes.pictures])

    assert evaluator.compute() == feed(CocoEvaluator(ID2LABEL), scenes).compute()


def test_boxes_in_pixels_are_an_error():
    labels = {
        "image_id": torch.tensor([7]),
        "orig_size": torch.tensor([60, 80]),
        "class_labels": torch.tensor([1]),
        "boxes": torch.tensor([[40.0, 30.0, 20.0, 10.0]]),
    }
    nothing = {"scores": torch.zeros(0), "labels": torch.zeros(0), "boxes": torch.zeros(0, 4)}

    with pytest.raises(ValueError, match=r"labels of image 7 have boxes that are not .* relative"):
        CocoEvaluator(ID2LABEL).update([nothing], [labels])


def test_compute_can_be_called_again_and_reset_forgets():
    scenes = SceneMaker()
    evaluator = feed(CocoEvaluator(ID2LABEL), scenes)

    assert evaluator.compute() == evaluator.compute()
    evaluator.reset()
    assert len(evaluator) == 0
    assert set(evaluator.compute().values()) == {-1}


def test_nothing_found_is_zero_and_nothing_to_find_is_undefined():
    scenes = SceneMaker()
    nothing_found = [{**picture, "detections": []} for picture in scenes.pictures]
    nothing_to_find = [{**picture, "annotations": []} for picture in scenes.pictures]

    found = feed(CocoEvaluator(ID2LABEL), scenes, nothing_found).compute()
    to_find = feed(CocoEvaluator(ID2LABEL), scenes, nothing_to_find).compute()

    assert found["map"] == found["mar_100"] == found["map/cat"] == 0
    assert set(to_find.values()) == {-1}
    assert set(CocoEvaluator(ID2LABEL).compute().values()) == {-1}
    assert set(CocoEvaluator({0: "N/A"}).compute().values()) == {-1}


def test_detections_of_unused_slots_do_not_matter():
    scenes = SceneMaker()
    before = feed(CocoEvaluator(ID2LABEL), scenes).compute()
    for picture in scenes.pictures:
        picture["detections"].append((np.array([1.0, 1, 30, 30]), 1, np.float32(1)))

    assert feed(CocoEvaluator(ID2LABEL), scenes).compute() == before


def test_only_the_best_detections_of_a_picture_are_kept():
    scenes = SceneMaker(num_pictures=1)
    picture = scenes.pictures[0]
    picture["detections"] = [
        (np.array([1.0 + number, 2, 5, 5]), 0, np.float32((number * 7 % 250) / 250))
        for number in range(250)
    ]

    results = feed(CocoEvaluator(ID2LABEL, max_detections=40), scenes).coco_results()

    scores = [row["score"] for row in results]
    assert scores == pytest.approx([(249 - rank) / 250 for rank in range(40)])


def test_equal_scores_keep_the_order_of_the_model():
    scenes = SceneMaker(num_pictures=1)
    scenes.pictures[0]["detections"] = [
        (np.array([float(number), 2, 5, 5]), 0, np.float32(0.5)) for number in range(300)
    ]

    results = feed(CocoEvaluator(ID2LABEL), scenes).coco_results()

    assert [row["bbox"][0] for row in results] == list(range(100))


def test_results_are_in_the_terms_of_the_dataset():
    table = LabelTable.from_categories([18, 3], names={18: "dog", 3: "bird"}).for_model(
        {0: "bird", 1: "N/A", 2: "dog", 3: "owl"}
    )
    picture = {
        "image_id": 77,
        "size": (100, 120),
        "annotations": [],
        "detections": [
            (np.array([10.0, 20, 30, 40]), 2, np.float32(0.75)),
            (np.array([1.0, 2, 3, 4]), 3, np.float32(0.5)),  # an owl, which the dataset lacks
        ],
    }
    evaluator = CocoEvaluator(table.id2label, label_to_category=table.label_to_category)

    feed(evaluator, SceneMaker(num_pictures=0), [picture])

    assert evaluator.coco_results() == [
        {"image_id": 77, "category_id": 18, "bbox": [10.0, 20.0, 30.0, 40.0], "score": 0.75}
    ]


def test_detections_of_a_picture_can_be_had_back():
    scenes = SceneMaker(num_pictures=1)
    picture = scenes.pictures[0]
    evaluator = CocoEvaluator(ID2LABEL, max_detections=2)
    prediction = {
        "scores": torch.tensor([0.25, 0.75, 0.5]),
        "labels": torch.tensor([0, 2, 3]),
        "boxes": torch.arange(12.0).view(3, 4),
    }
    labels = labels_of(picture)
    evaluator.update([prediction], [labels])

    found = evaluator.detections(int(labels["image_id"]))

    assert found["scores"].tolist() == [0.75, 0.5]
    assert found["labels"].tolist() == [2, 3]
    assert found["boxes"].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(KeyError, match="no picture with image_id -1 was collected"):
        evaluator.detections(-1)


def test_results_have_the_own_ids_of_pictures_and_are_written_as_they_are(tmp_path):
    scenes = SceneMaker(num_pictures=3)
    evaluator = feed(CocoEvaluator(ID2LABEL, own_image_id="scan {}".format), scenes)
    plain = feed(CocoEvaluator(ID2LABEL), scenes).coco_results()

    evaluator.write_coco_results(tmp_path / "new" / "results.json")

    expected = [{**row, "image_id": f"scan {row['image_id']}"} for row in plain]
    assert len(expected) > 0
    assert evaluator.coco_results() == expected
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == expected


def test_memory_is_that_of_the_detections_kept():
    """What a picture leaves behind is 24 bytes per detection and its objects, no model output."""
    num_pictures, num_detections = 60, 3000
    target = labels_of(SceneMaker(num_pictures=1).pictures[0])
    evaluator = CocoEvaluator(ID2LABEL)

    def update(image_id):
        # Slices of one large output, as batches of a model are.
        output = torch.rand(num_detections, 6)
        prediction = {
            "boxes": output[:, :4],
            "scores": output[:, 4],
            "labels": torch.zeros(num_detections, dtype=torch.int64),
        }
        evaluator.update([prediction], [{**target, "image_id": torch.tensor([image_id])}])

    update(-1)
    tracemalloc.start()
    for image_id in range(num_pictures):
        update(image_id)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrays = [
        value
        for picture in evaluator._pictures.values()
        for value in vars(picture).values()
        if isinstance(value, np.ndarray)
    ]
    # A tensor's storage may be larger than what the array shows of it.
    storage = sum(
        array.base.untyped_storage().nbytes()
        if isinstance(array.base, torch.Tensor)
        else array.nbytes
        for array in arrays
    )
    assert storage < (num_pictures + 1) * (100 * 24 + 1000)
    assert kept < num_pictures * 12_000


def test_ground_truth_of_another_picture_under_the_same_id_is_an_error():
    scenes = SceneMaker()
    first, second = scenes.pictures[0], scenes.pictures[1]

    with pytest.raises(ValueError, match="image_id 0 belongs to two pictures with different"):
        feed(CocoEvaluator(ID2LABEL), scenes, [first, {**second, "image_id": 0}])


@pytest.mark.parametrize("part", ["predictions", "labels"])
def test_labels_outside_id2label_are_named(part):
    scenes = SceneMaker(num_pictures=1)
    picture = scenes.pictures[0]
    prediction, labels = scenes.predictions(picture), labels_of(picture)
    wrong = torch.full((1,), 9)
    if part == "predictions":
        prediction = {
            "labels": wrong,
            "scores": torch.ones(1),
            "boxes": torch.ones(1, 4),
        }
    else:
        labels["class_labels"] = labels["class_labels"].clone().fill_(9)

    with pytest.raises(ValueError, match=rf"{part} of image 0 have the labels \[9\]"):
        CocoEvaluator(ID2LABEL).update([prediction], [labels])


def test_predictions_and_labels_must_belong_together():
    with pytest.raises(ValueError, match="one entry per picture, got 0 and 1"):
        CocoEvaluator(ID2LABEL).update([], [{}])


def test_max_detections_must_be_positive():
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        CocoEvaluator(ID2LABEL, max_detections=0)


def test_nothing_is_printed(capfd):
    feed(CocoEvaluator(ID2LABEL), SceneMaker()).compute()

    sys.stdout.flush()
    assert capfd.readouterr() == ("", "")
