from hf_querydet.evaluation import CocoEvaluator, format_table


def metrics(**values):
    empty = CocoEvaluator({0: "cat", 1: "a very long name", 2: "owl"}).compute()
    return {**empty, **values}


def test_numbers_stand_beside_their_names_and_undefined_ones_are_a_dash():
    table = format_table(metrics(map=0.41237, map_50=1.0), per_class=False).splitlines()

    assert table[:3] == ["AP           0.412", "AP50         1.000", "AP75             -"]
    assert len(table) == 12


def test_classes_that_occur_are_listed():
    values = {"map/cat": 0.25, "map_50/cat": 0.5, "map/a very long name": 0.0}
    table = format_table(metrics(**values)).splitlines()[13:]

    assert table == [
        "class                 AP    AP50",
        "cat                0.250   0.500",
        "a very long name   0.000       -",
    ]
