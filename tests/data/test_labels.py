import pytest

from hf_querydet.data import LabelTable


def test_numbers_are_ordered_as_numbers_and_keep_their_names():
    table = LabelTable.from_categories([18, 3, 100, 3], names={3: "car", 18: "dog", 100: "pan"})

    assert table.id2label == {0: "car", 1: "dog", 2: "pan"}
    assert table.label2id == {"car": 0, "dog": 1, "pan": 2}
    assert [table.label_of(category) for category in (100, 3, 18)] == [2, 0, 1]
    assert table.label_to_category == {0: 3, 1: 18, 2: 100}


def test_numbers_without_names_are_called_by_their_number():
    assert LabelTable.from_categories([7, 5]).id2label == {0: "5", 1: "7"}


def test_strings_are_sorted():
    table = LabelTable.from_categories(["zebra", "ant"])

    assert table.id2label == {0: "ant", 1: "zebra"}
    assert table.label_of("zebra") == 1


@pytest.mark.parametrize(
    ("categories", "label_names", "id2label"),
    [
        ([2, 0], ["a", "b", "c"], {0: "a", 1: "b", 2: "c"}),
        ([5, 9], {9: "nine", 5: "five", 7: "seven"}, {0: "five", 1: "seven", 2: "nine"}),
        (["x"], ["y", "x"], {0: "x", 1: "y"}),
    ],
)
def test_label_names_name_every_category_there_is(categories, label_names, id2label):
    assert LabelTable.from_categories(categories, label_names=label_names).id2label == id2label


def test_gaps_in_a_numbering_get_no_label():
    table = LabelTable.from_categories([1], label_names=["N/A", "person", "N/A", "car"])

    assert table.id2label == {0: "person", 1: "car"}
    assert table.category_to_label == {1: 0, 3: 1}


def test_a_model_with_other_numbers_is_joined_by_name_and_unused_slots_never_match():
    table = LabelTable.from_categories([4, 6], names={4: "cat", 6: "dog"})
    model = {0: "N/A", 1: "dog", 2: "N/A", 3: "bird", 4: "cat"}

    joined = table.for_model(model)

    assert joined.id2label == model
    assert joined.label2id == {"dog": 1, "bird": 3, "cat": 4}
    assert (joined.label_of(4), joined.label_of(6)) == (4, 1)
    assert joined.label_to_category == {4: 4, 1: 6}


def test_all_names_that_a_model_lacks_are_listed():
    table = LabelTable.from_categories(["cat", "dog", "owl"])

    expected = r"lacks 2 of the dataset's names: \['cat', 'owl'\]\. .*load_detector_for_labels"
    with pytest.raises(ValueError, match=expected):
        table.for_model({0: "dog", 1: "N/A"})


def test_another_split_with_other_ids_is_joined_by_name():
    train = LabelTable.from_categories([1, 2], names={1: "cat", 2: "dog"})

    validation = train.for_split({7: "dog", 8: "cat", 9: "owl"})

    assert validation.id2label == train.id2label
    assert validation.category_to_label == {7: 1, 8: 0}
    assert train.for_split(None) is train


def test_an_unknown_category_is_named():
    with pytest.raises(ValueError, match=r"category 'cow' is not among .*'cat', 'dog'"):
        LabelTable.from_categories(["cat", "dog"]).label_of("cow")


def test_a_long_list_of_categories_is_cut():
    with pytest.raises(ValueError, match=r"19, \.\.\. 300 in all\]"):
        LabelTable.from_categories(range(300)).label_of(300)


def test_a_list_that_may_have_to_start_at_one_is_mentioned(caplog):
    LabelTable.from_categories([1, 2], label_names=["cat", "dog", "owl"])
    assert "No object has category 0, 'cat' by label_names." in caplog.text
    caplog.clear()
    LabelTable.from_categories([1, 2], label_names=["N/A", "cat", "dog", "owl"])
    LabelTable.from_categories([0, 2], label_names=["cat", "dog", "owl"])
    LabelTable.from_categories(["dog"], label_names=["cat", "dog", "owl"])
    LabelTable.from_categories([1], label_names={0: "cat", 1: "dog"})
    assert caplog.text == ""


def test_a_category_without_a_place_in_label_names_is_an_error():
    with pytest.raises(ValueError, match=r"label_names has no name for the categories \[2\]"):
        LabelTable.from_categories([1, 2], label_names=["a", "b"])


def test_two_categories_of_one_name_are_an_error():
    with pytest.raises(ValueError, match=r"share one name: \['cell'\]"):
        LabelTable.from_categories([0, 1], names={0: "cell", 1: "cell"})
