"""Model cards: what the Hub reads, what people read, and what stays at home."""

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from tiny import tiny_config

from hf_querydet import VARIANTS
from hf_querydet.evaluation import CocoEvaluator
from hf_querydet.evaluation.coco_evaluator import METRIC_NAMES
from hf_querydet.model_card import CardFacts, model_card, write_model_card

METRICS = {
    **dict.fromkeys(METRIC_NAMES, 0.25),
    "map": 0.123456,
    "map_75": -1.0,
    "map/cat": 0.5,
    "map_50/cat": 0.75,
}
NAMES = {0: "N/A", 1: "cat", 2: "dog"}


def config(name="detr"):
    return tiny_config(VARIANTS, name, num_labels=3, id2label=NAMES)


def card(facts, name="detr", **options):
    return model_card(config(name), facts, **options)


def test_metrics_are_where_the_hub_reads_them(tmp_path):
    facts = CardFacts(dataset="me/pets", eval_split="validation", repo_id="me/finder")
    card(facts, metrics=METRICS).save(tmp_path / "README.md")

    data = ModelCard.load(tmp_path / "README.md").data

    found = [(each.metric_name, each.metric_type, each.metric_value) for each in data.eval_results]
    # An undefined AP75 is none.
    assert found == [("AP", "map", 0.1235), ("AP50", "map_50", 0.25)]
    assert {each.dataset_type for each in data.eval_results} == {"me/pets"}
    assert {each.dataset_split for each in data.eval_results} == {"validation"}
    assert data.model_name == "finder"
    assert data.datasets == ["me/pets"] or data.datasets == "me/pets"
    assert (data.library_name, data.pipeline_tag) == ("hf_querydet", "object-detection")


def test_people_read_how_it_was_made_and_is_used():
    facts = CardFacts(
        dataset="me/pets",
        eval_split="test",
        repo_id="me/finder",
        base_model="facebook/detr-resnet-50",
        command="accelerate launch train_detector.py",
        license="mit",
    )
    text = card(facts, metrics=METRICS, pictures=["a.jpg"]).content
    assert "base_model: facebook/detr-resnet-50" in text
    assert "license: mit" in text
    assert "`DETRForObjectDetection`" in text
    assert "fine-tuned from `facebook/detr-resnet-50` on `me/pets`" in text
    assert 'pipeline("object-detection", model="me/finder")' in text
    assert "the split `test`" in text
    assert "cat          0.500   0.750" in text
    assert "![detections](a.jpg)" in text
    assert "```bash\naccelerate launch train_detector.py\n```" in text
    assert "1: cat, 2: dog" in text
    assert "0: N/A" not in text


@pytest.mark.parametrize(
    ("dataset", "shown"),
    [
        ("/home/me/pets", "pets"),
        ("/home/me/pets/{split}/instances.json", "pets"),
        ("/home/me/pets/train.json", "pets"),
        ("/home/me/pets/{split}.json", "pets"),
    ],
)
def test_folders_of_the_machine_are_not_published(dataset, shown):
    text = card(CardFacts(dataset=dataset, base_model="/home/me/run/best")).content
    assert f"fine-tuned from `best` on `{shown}`." in text
    assert "/home" not in text
    assert "datasets:" not in text
    assert "base_model:" not in text


def test_local_folder_is_not_taken_for_a_dataset_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/pets").mkdir(parents=True)
    facts = CardFacts(dataset="data/pets", eval_split="validation")
    data = card(facts, metrics=METRICS).data
    assert data.datasets is None
    assert {(each.dataset_type, each.dataset_name) for each in data.eval_results} == {
        ("imagefolder", "pets")
    }


@pytest.mark.parametrize("name", list(VARIANTS))
def test_what_padding_does_is_said(name):
    exception = VARIANTS[name].padding_exception
    text = card(CardFacts(dataset="pets"), name).content
    assert (exception in text) if exception else ("Padding" not in text)


def test_without_metrics_there_are_none():
    text = card(CardFacts(dataset="pets")).content
    assert "Results" not in text
    assert "model-index" not in text


class Pictures:
    """Two grey pictures, as a dataset without a processor gives them."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        image = Image.new("RGB", (600, 500), (128, 128, 128))
        return {"image": image, "annotations": {"image_id": 7 + index, "annotations": []}}


def test_pictures_show_what_was_found_above_the_threshold(tmp_path):
    evaluator = CocoEvaluator(NAMES)
    target = {
        "class_labels": torch.tensor([1]),
        "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]]),
        "area": torch.tensor([48000.0]),
        "iscrowd": torch.tensor([0]),
        "orig_size": torch.tensor([500, 600]),
        "size": torch.tensor([500, 600]),
    }
    for image_id, score in ((7, 0.9), (8, 0.1)):
        prediction = {
            "scores": torch.tensor([score]),
            "labels": torch.tensor([1]),
            "boxes": torch.tensor([[180.0, 150.0, 420.0, 350.0]]),
        }
        evaluator.update([prediction], [{**target, "image_id": torch.tensor([image_id])}])

    write_model_card(
        tmp_path, config(), CardFacts(dataset="pets"), dataset=Pictures(), evaluator=evaluator
    )

    pixels = [np.asarray(Image.open(tmp_path / f"detections_{i}.jpg")) for i in range(2)]
    assert np.abs(pixels[0].astype(int) - 128).max() > 60
    assert np.abs(pixels[1].astype(int) - 128).max() < 10
    assert "Pictures" not in (tmp_path / "README.md").read_text()  # without metrics
