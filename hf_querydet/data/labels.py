"""One numbering of a dataset's categories, and the way to a model's labels and back."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers.utils import logging

from hf_querydet.configuration_utils import UNUSED_LABEL

logger = logging.get_logger(__name__)

CategoryId = int | str


@dataclass(frozen=True)
class LabelTable:
    """Which label a category has, and which category a label came from.

    A table is made once, from the training split, and passed on to the other splits, so that every
    split is numbered alike. :meth:`for_model` renumbers it for a model that already has labels.

    Attributes:
        id2label: Name of every label, label to name. All labels of the model, used here or not.
        category_to_label: The dataset's own category id (a number or a string) to the label.
    """

    id2label: dict[int, str]
    category_to_label: dict[CategoryId, int]

    @property
    def label2id(self) -> dict[str, int]:
        """Name to label; unused slots have no name to be found by."""
        return {name: label for label, name in self.id2label.items() if name != UNUSED_LABEL}

    @property
    def label_to_category(self) -> dict[int, CategoryId]:
        """Label to the dataset's own category id; labels that the dataset lacks are missing."""
        return {label: category for category, label in self.category_to_label.items()}

    def label_of(self, category: CategoryId) -> int:
        """Label of one category of the dataset.

        Raises:
            ValueError: If the category is not in the table.
        """
        if category not in self.category_to_label:
            raise ValueError(
                f"category {category!r} is not among the dataset's categories "
                f"{_shortened(self.category_to_label)}; repair the annotation, or name every "
                "category with label_names."
            )
        return self.category_to_label[category]

    def for_model(self, id2label: Mapping[int, str]) -> "LabelTable":
        """The same categories under the labels of a model, joined by name.

        Args:
            id2label: ``model.config.id2label``. Slots named "N/A" never match.

        Raises:
            ValueError: If the model lacks a name that the dataset has; all of them are listed.
        """
        model = LabelTable({int(label): name for label, name in id2label.items()}, {})
        names = {
            category: self.id2label[label] for category, label in self.category_to_label.items()
        }
        missing = [name for name in names.values() if name not in model.label2id]
        if missing:
            raise ValueError(
                f"id2label of the model lacks {len(missing)} of the dataset's names: {missing}. "
                "Rename them with label_names (--label-names), or give the model the dataset's "
                "labels and a new class head: load it with hf_querydet.load_detector_for_labels."
            )
        joined = {category: model.label2id[name] for category, name in names.items()}
        return LabelTable(model.id2label, joined)

    def for_split(self, names: Mapping[CategoryId, str] | None) -> "LabelTable":
        """The same labels for another split, whose own category ids may differ.

        Args:
            names: What the other split calls its category ids. They are joined by name, and a name
                that this table lacks gets no label. None: its ids mean what they mean here.
        """
        if names is None:
            return self
        label2id = self.label2id
        joined = {category: label2id[name] for category, name in names.items() if name in label2id}
        return LabelTable(self.id2label, joined)

    @classmethod
    def from_categories(
        cls,
        categories: Iterable[CategoryId],
        *,
        names: Mapping[CategoryId, str] | None = None,
        label_names: Sequence[str] | Mapping[CategoryId, str] | None = None,
    ) -> "LabelTable":
        """Number categories 0..K-1 in ascending order of their own ids.

        Categories named "N/A" are left out: they are gaps in somebody's numbering.

        Args:
            categories: The dataset's category ids; repetitions do not count.
            names: What the dataset calls them. A category without a name is called by its id.
            label_names: What the user calls them, and then these are all categories there are:
                a mapping from category id to name, or a list. In a list, the place is the category
                id where ids are numbers (the first is 0), and names are the ids where they are
                strings.

        Raises:
            ValueError: If a category has no place in ``label_names``, or two share one name.
        """
        found = set(categories)
        if label_names is not None:
            by_name = any(isinstance(category, str) for category in found)
            names = names_by_category(label_names, by_name=by_name)
            unnamed = found - set(names)
            if unnamed:
                raise ValueError(
                    f"label_names has no name for the categories {_shortened(unnamed)}; it names "
                    f"{_shortened(names)}. A list names numbers by their place, starting at 0; "
                    f"put {UNUSED_LABEL} in the places of numbers that are not there "
                    f"({UNUSED_LABEL},cat,dog), or use a mapping from category id to name."
                )
            if not by_name and not isinstance(label_names, Mapping):
                _mention_unused_zero(found, names)
            found = set(names)
        names = names or {}
        found = {category for category in found if names.get(category) != UNUSED_LABEL}
        # Numbers before strings, should both occur: they cannot be compared.
        ordered = sorted(found, key=lambda category: (isinstance(category, str), category))
        id2label = {
            label: str(names.get(category, category)) for label, category in enumerate(ordered)
        }
        repeated = [name for name, count in Counter(id2label.values()).items() if count > 1]
        if repeated:
            raise ValueError(
                f"Two categories share one name: {repeated}. Give each its own with "
                "label_names={category id: name}."
            )
        return cls(id2label, {category: label for label, category in enumerate(ordered)})


def names_by_category(
    label_names: Sequence[str] | Mapping[CategoryId, str], *, by_name: bool
) -> dict[CategoryId, str]:
    """The user's names as a mapping from category id.

    Args:
        label_names: See :meth:`LabelTable.from_categories`.
        by_name: Whether the dataset's categories are strings; a list then holds these, and
            otherwise the names of the ids 0, 1, 2, ...
    """
    if isinstance(label_names, Mapping):
        return dict(label_names)
    return {name: name for name in label_names} if by_name else dict(enumerate(label_names))


def _mention_unused_zero(found: set[CategoryId], names: Mapping[CategoryId, str]) -> None:
    """Warn where a list of names may have to start one place later."""
    if found and 0 not in found and names.get(0, UNUSED_LABEL) != UNUSED_LABEL:
        logger.warning(
            f"No object has category 0, {names[0]!r} by label_names. If categories are numbered "
            f"from 1, begin label_names with {UNUSED_LABEL}."
        )


def parse_label_names(text: str) -> list[str]:
    """Names from a comma-separated list, as a command line has it; blanks around them do not count.

    Raises:
        ValueError: If a name is empty: later ones would stand for other numbers than meant.
    """
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise ValueError(f"label_names must be names with commas between them, got {text!r}.")
    return names


def _shortened(values: Iterable[CategoryId], limit: int = 20) -> str:
    """The values in order, as text that stays readable with a thousand of them."""
    ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
    shown = ", ".join(repr(value) for value in ordered[:limit])
    return f"[{shown}, ... {len(ordered)} in all]" if len(ordered) > limit else f"[{shown}]"
