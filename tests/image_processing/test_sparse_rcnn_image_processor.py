import json
from types import SimpleNamespace

import pytest
import torch
from tiny import picture

from hf_querydet import SparseRCNNConfig, SparseRCNNImageProcessor
from hf_querydet.picture_sizes import shortest_edge_size


def outputs(num_proposals=7, num_classes=5):
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        logits=torch.randn(2, num_proposals, num_classes, generator=generator) * 3,
        pred_boxes=torch.rand(2, num_proposals, 4, generator=generator),
    )


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        # Neither side is rounded before the long one is limited.
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((200, 500), (533, 1333)),
        ((500, 200), (1333, 533)),
        ((427, 640), (800, 1199)),
        ((375, 500), (800, 1067)),
        ((2, 5000), (1, 1333)),
        ((300, 300), (800, 800)),
    ],
)
def test_both_sides_are_rounded_once_and_to_the_nearest(original, expected):
    assert SparseRCNNImageProcessor.shortest_edge_rule(original, 800, 1333) == expected


def test_long_side_is_free_without_a_limit():
    assert SparseRCNNImageProcessor.shortest_edge_rule((200, 501), 800) == (800, 2004)


def test_processor_resizes_by_that_rule():
    size = {"shortest_edge": 60, "longest_edge": 1333}
    pixel_values = SparseRCNNImageProcessor(size=size)(picture(71, 45), return_tensors="pt")
    # 60 / 45 * 71 is 94.67; the rule of the other detectors cuts it off.
    assert pixel_values["pixel_values"].shape[-2:] == (60, 95)
    assert shortest_edge_size((45, 71), 60, 1333) == (60, 94)


def test_as_many_pairs_are_returned_as_there_are_proposals():
    results = SparseRCNNImageProcessor().post_process_object_detection(outputs(), 0.0)
    assert [len(result["scores"]) for result in results] == [7, 7]
    best = outputs().logits.sigmoid().flatten(1).sort(descending=True).values[:, :7]
    torch.testing.assert_close(torch.stack([result["scores"] for result in results]), best)


def test_number_of_pairs_can_be_chosen():
    results = SparseRCNNImageProcessor().post_process_object_detection(outputs(), 0.0, top_k=20)
    assert [len(result["scores"]) for result in results] == [20, 20]


def test_without_focal_every_proposal_is_one_detection_of_a_real_class():
    processor = SparseRCNNImageProcessor(use_focal=False)
    results = processor.post_process_object_detection(outputs(), 0.0)
    for logits, result in zip(outputs().logits, results, strict=True):
        scores, labels = logits.softmax(-1)[:, :-1].max(-1)
        order = scores.argsort(descending=True)
        torch.testing.assert_close(result["scores"], scores[order])
        assert result["labels"].tolist() == labels[order].tolist()


@pytest.mark.parametrize("use_focal", [True, False])
def test_choice_of_scores_is_taken_from_a_configuration(use_focal):
    config = SparseRCNNConfig(use_focal=use_focal)
    assert SparseRCNNImageProcessor.for_config(config, do_resize=False).use_focal is use_focal


def test_choice_of_scores_is_saved(tmp_path):
    SparseRCNNImageProcessor(use_focal=False).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "SparseRCNNImageProcessor"
    assert not SparseRCNNImageProcessor.from_pretrained(tmp_path).use_focal
