import pytest
from detection_data import write_image_folder
from saved_detector import ID2LABEL, build_detector

from hf_querydet.data import load_detection_dataset
from hf_querydet.evaluation import CocoEvaluator, evaluate_detector, evaluation_loader
from hf_querydet.inference import detect

# Near some boxes of the detector.
OBJECTS = [
    {"bbox": [[12.0, 4.0, 30.0, 20.0]], "category": ["dog"]},
    {"bbox": [[6.0, 6.0, 21.0, 27.0]], "category": ["cat"]},
    {"bbox": [], "category": []},
    {"bbox": [[13.0, 5.0, 26.0, 22.0]], "category": ["dog"]},
]


@pytest.fixture
def dataset(tmp_path):
    folder = write_image_folder(tmp_path / "pets", OBJECTS)
    return load_detection_dataset(folder, split="train").with_labels(ID2LABEL)


def test_numbers_are_those_of_detections_and_ground_truth(dataset):
    model, processor = build_detector("conditional_detr", scale=0.1)
    by_hand = CocoEvaluator(ID2LABEL)
    pictures = [item["image"] for item in dataset]
    labels = [item["labels"] for item in dataset.with_processor(processor)]
    by_hand.update(list(detect(model, processor, pictures, batch_size=3, threshold=0.0)), labels)

    evaluator = CocoEvaluator(ID2LABEL)
    loader = evaluation_loader(dataset, processor, batch_size=3)
    metrics = evaluate_detector(model, processor, loader, evaluator)

    assert metrics == by_hand.compute()
    assert 0 < metrics["map"] < 1
    assert evaluator.coco_results() == by_hand.coco_results()


@pytest.mark.parametrize("training", [True, False])
def test_model_is_in_evaluation_mode_meanwhile(dataset, training):
    model, processor = build_detector()
    modes = []
    model.train(training)
    model.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))

    loader = evaluation_loader(dataset, processor, batch_size=4)
    evaluate_detector(model, processor, loader, CocoEvaluator(ID2LABEL))

    assert modes == [False]
    assert model.training is training


def test_evaluator_of_an_earlier_model_forgets_it(dataset):
    earlier, processor = build_detector("detr", scale=0.1)
    model, _ = build_detector("conditional_detr", scale=0.1)
    loader = evaluation_loader(dataset, processor, batch_size=3)
    evaluator = CocoEvaluator(ID2LABEL)
    evaluate_detector(earlier, processor, loader, evaluator)

    metrics = evaluate_detector(model, processor, loader, evaluator)

    assert metrics == evaluate_detector(model, processor, loader, CocoEvaluator(ID2LABEL))


def test_other_order_of_labels_is_an_error(dataset):
    model, processor = build_detector()
    swapped = {0: ID2LABEL[1], 1: ID2LABEL[0], **{k: v for k, v in ID2LABEL.items() if k > 1}}
    loader = evaluation_loader(dataset.with_labels(swapped), processor)

    with pytest.raises(ValueError, match=r"use dataset.with_labels\(model.config.id2label\)"):
        evaluate_detector(model, processor, loader, CocoEvaluator(ID2LABEL))


@pytest.mark.cuda
def test_batches_go_to_the_model(dataset):
    model, processor = build_detector("conditional_detr", scale=0.1)
    loader = evaluation_loader(dataset, processor, batch_size=3)
    expected = evaluate_detector(model, processor, loader, CocoEvaluator(ID2LABEL))
    metrics = evaluate_detector(model.to("cuda"), processor, loader, CocoEvaluator(ID2LABEL))
    assert metrics == pytest.approx(expected, abs=1e-3)
