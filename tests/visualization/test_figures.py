"""Figures of explanations."""

import sys

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from PIL import Image
from tiny import TINY_CONFIGS, perturb, picture, tiny_config

from hf_querydet import VARIANTS
from hf_querydet.recording import CellAttention, Region, SampledPoints
from hf_querydet.visualization import Explanation, LayerExplanation, explain

PICTURE = Image.new("RGB", (200, 100), "gray")
BOX = torch.tensor([20.0, 30.0, 120.0, 80.0])


def explanation(evidence, num_layers=2, **reference):
    reference = {"reference_point": None, "reference_box": None} | reference
    layer = LayerExplanation(evidence=evidence, box=BOX, score=0.5, label="cat", **reference)
    return Explanation(PICTURE, 7, (layer,) * num_layers)


def visible(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def titles(figure):
    return [axes.get_title() for axes in visible(figure)]


@pytest.mark.parametrize("name", list(TINY_CONFIGS))
def test_every_variant_has_a_figure(name, tmp_path):
    model = perturb(VARIANTS[name].detector(tiny_config(VARIANTS, name))).eval()
    processor = VARIANTS[name].image_processor(size={"shortest_edge": 64, "longest_edge": 100})
    explain(model, processor, picture(90, 60)).save(tmp_path / "why.png")
    with Image.open(tmp_path / "why.png") as drawn:
        assert min(drawn.size) > 300


def test_one_panel_per_layer_and_one_of_all():
    figure = explanation(Region(BOX, 8), num_layers=6).figure()
    assert titles(figure) == [
        "from layer to layer",
        *(f"layer {number}: cat 0.50" for number in range(1, 7)),
    ]
    assert figure.get_suptitle() == "query 7: cat 0.50"


def test_parts_of_an_attention_have_a_row_each_with_its_weights():
    generator = np.random.default_rng(0)
    maps = {
        "total": torch.from_numpy(generator.random((2, 1, 3, 5))),
        "row": torch.from_numpy(generator.random((2, 1, 1, 5))),
        "column": torch.from_numpy(generator.random((2, 1, 3, 1))),
    }
    figure = explanation(CellAttention(maps, (210.0, 100.0))).figure()
    panels = [axes for axes in visible(figure) if len(axes.images) == 2]
    assert len(panels) == 6
    for axes, name in zip(panels, ["total"] * 2 + ["row"] * 2 + ["column"] * 2, strict=True):
        weights = axes.images[1]
        np.testing.assert_allclose(weights.get_array(), maps[name].mean((0, 1)))
        assert weights.get_extent() == [0, 210, 100, 0]
        # What the last cells have beyond the picture is not shown.
        assert axes.get_xlim() == (0, 200)


def test_one_head_can_be_shown():
    maps = {"total": torch.rand(3, 1, 2, 2)}
    figure = explanation(CellAttention(maps, (200.0, 100.0)), num_layers=1).figure(head=2)
    np.testing.assert_allclose(visible(figure)[1].images[1].get_array(), maps["total"][2, 0])


def scatter(axes):
    return [each for each in axes.collections if isinstance(each, PathCollection)]


def test_points_are_drawn_in_their_places_as_large_as_their_weights():
    points = torch.rand(2, 3, 4, 2) * torch.tensor([200.0, 100.0])
    weights = torch.rand(2, 3, 4)
    figure = explanation(SampledPoints(points, weights), num_layers=1).figure()
    groups = scatter(visible(figure)[1])
    assert len(groups) == 6
    drawn = np.concatenate([group.get_offsets() for group in groups])
    np.testing.assert_allclose(drawn, points.view(-1, 2), rtol=1e-6)
    areas = np.concatenate([group.get_sizes() for group in groups])
    np.testing.assert_allclose(areas / areas.max(), weights.flatten() / weights.max(), rtol=1e-5)
    only = scatter(visible(explanation(SampledPoints(points, weights), 1).figure(head=1))[1])
    np.testing.assert_allclose(
        np.concatenate([group.get_offsets() for group in only]), points[1].view(-1, 2), rtol=1e-6
    )


def test_share_of_the_weight_outside_the_picture_is_said():
    points = torch.tensor([[10.0, 10.0], [190.0, 90.0], [-5.0, 10.0], [10.0, 101.0]])
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1])
    figure = explanation(SampledPoints(points.view(1, 1, 4, 2), weights.view(1, 1, 4)), 1).figure()
    assert visible(figure)[1].get_xlabel() == "30% of the weight is outside"


def test_small_part_of_the_picture_is_enlarged_and_keeps_its_shape():
    box = torch.tensor([150.0, 20.0, 170.0, 30.0])
    points = torch.tensor([[150.0, 20.0], [170.0, 30.0]]).view(1, 1, 2, 2)
    layer = LayerExplanation(SampledPoints(points, torch.ones(1, 1, 2)), None, None, box, 0.5, "a")
    figure = Explanation(PICTURE, 0, (layer,)).figure()
    overview, panel = visible(figure)
    assert overview.get_xlim() == (0, 200)
    left, right = panel.get_xlim()
    bottom, top = panel.get_ylim()
    assert (left, right, top, bottom) == pytest.approx((147, 173, 18.5, 31.5))


def test_region_says_which_level_is_read():
    for stride, text in ((16, "read at stride 16"), (0, "nothing is read")):
        assert visible(explanation(Region(BOX, stride), 1).figure())[1].get_xlabel() == text


def test_references_are_drawn_where_they_are():
    evidence = Region(BOX, 8)
    point = torch.tensor([60.0, 40.0])
    overview = visible(explanation(evidence, reference_point=point).figure())[0]
    np.testing.assert_allclose(overview.lines[0].get_xydata(), [[60, 40]])
    box = torch.tensor([-10.0, 10.0, 50.0, 400.0])
    frame = visible(explanation(evidence, 1, reference_box=box).figure())[0].patches[0]
    assert frame.get_bbox().extents.tolist() == [0, 10, 50, 100]


@pytest.mark.parametrize("size", [(3000, 2000), (10, 500), (500, 10), (8, 6)])
def test_picture_of_any_size_is_drawn(size, tmp_path):
    layer = LayerExplanation(Region(BOX, 8), None, None, BOX, 0.5, "cat")
    Explanation(Image.new("RGB", size), 0, (layer,)).save(tmp_path / "why.png")
    with Image.open(tmp_path / "why.png") as drawn:
        assert max(drawn.size) < 2000


def test_head_that_there_is_not_is_an_error():
    maps = {"total": torch.rand(3, 1, 2, 2)}
    with pytest.raises(ValueError, match="head must be from 0 to 2, got 3"):
        explanation(CellAttention(maps, (200.0, 100.0))).figure(head=3)
    with pytest.raises(ValueError, match="head is 0, but a region is read as a whole"):
        explanation(Region(BOX, 8)).figure(head=0)


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "why.png"
    explanation(Region(BOX, 8)).save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Format 'what' is not supported"):
        explanation(Region(BOX, 8)).save(path.with_suffix(".what"))
    assert [each.name for each in path.parent.iterdir()] == ["why.png"]
    assert path.read_bytes() == before


def test_missing_matplotlib_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_querydet\[plots\]'"):
        explanation(Region(BOX, 8)).figure()
