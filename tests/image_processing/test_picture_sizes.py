import pytest
from transformers.image_utils import SizeDict

from hf_querydet.picture_sizes import resized_size, shortest_edge_size


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ((480, 640), (800, 1066)),  # 800 * 640 / 480 = 1066.67, cut off
        ((640, 480), (1066, 800)),
        ((500, 500), (800, 800)),
        ((800, 1200), (800, 1200)),  # the short side is right already
        ((200, 500), (533, 1332)),  # 1333 * 200 / 500 = 533.2; 533 * 500 / 200 = 1332.5
        ((500, 200), (1332, 533)),
        ((427, 640), (800, 1199)),
        ((1000, 3000), (444, 1332)),
        ((801, 1335), (800, 1333)),
        ((300, 749), (534, 1333)),  # 533.9 rounds up; 534 * 749 / 300 = 1333.2
        ((1, 1), (800, 800)),
        ((1, 3000), (1, 1333)),
        ((3000, 1), (1333, 1)),
        ((1, 2), (666, 1332)),
    ],
)
def test_authors_rule_gives_the_size(original, expected):
    assert shortest_edge_size(original, 800, 1333) == expected


def test_rounded_short_side_may_push_the_long_side_past_its_limit():
    # 33 * 5 / 88 = 1.875 rounds to 2; 2 * 88 / 5 = 35.2.
    assert shortest_edge_size((5, 88), 20, 33) == (2, 35)


def test_short_side_alone_has_no_limit():
    assert shortest_edge_size((200, 500), 800) == (800, 2000)


@pytest.mark.parametrize("height", range(1, 60, 7))
@pytest.mark.parametrize("width", range(1, 200, 13))
def test_no_side_vanishes(height, width):
    assert min(shortest_edge_size((height, width), 20, 33)) >= 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"height": 31, "width": 17}, (31, 17)),
        ({"max_height": 50, "max_width": 50}, (25, 50)),
        ({"max_height": 200, "max_width": 500}, (200, 400)),
        ({"shortest_edge": 50}, (50, 100)),
        ({"shortest_edge": 50, "longest_edge": 60}, (30, 60)),
    ],
)
def test_each_form_of_size_is_understood(size, expected):
    assert resized_size((100, 200), SizeDict(**size)) == expected


def test_frame_is_met_exactly():
    # 49 * (1 / 49) is less than 1 in floating point.
    assert resized_size((49, 49), SizeDict(max_height=1, max_width=1)) == (1, 1)
    assert resized_size((61, 61), SizeDict(max_height=107, max_width=200)) == (107, 107)


def test_frame_never_takes_the_last_pixel():
    assert resized_size((1, 3000), SizeDict(max_height=40, max_width=40)) == (1, 40)
    assert resized_size((3000, 1), SizeDict(max_height=40, max_width=40)) == (40, 1)


def test_other_forms_of_size_are_an_error():
    with pytest.raises(ValueError, match=r"size must have the keys.*got \{'longest_edge': 50\}"):
        resized_size((100, 200), SizeDict(longest_edge=50))


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ((480, 640), (800, 1066)),  # fits already
        ((640, 480), (800, 600)),  # alone it would be 1066 high
        ((300, 749), (532, 1330)),  # alone 534x1333; 300 * 1330 / 749 = 532.7, cut off
        ((1, 3000), (1, 1330)),
    ],
)
def test_picture_is_resized_to_fit_pad_size(original, expected):
    size = SizeDict(shortest_edge=800, longest_edge=1333)

    assert resized_size(original, size, SizeDict(height=800, width=1330)) == expected


def test_fixed_size_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"\(31, 17\).*does not fit into pad_size \(30, 40\)"):
        resized_size((9, 9), SizeDict(height=31, width=17), SizeDict(height=30, width=40))
