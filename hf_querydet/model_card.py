"""The page of a detector on the Hub: what it is, how good, how it was made, how to use it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_querydet.configuration_utils import UNUSED_LABEL, DetectorConfig
from hf_querydet.data import DetectionDataset
from hf_querydet.evaluation import CocoEvaluator, format_table
from hf_querydet.registration import MODEL_TYPE_PREFIX, variant_of
from hf_querydet.visualization import draw_detections

LIBRARY = "hf_querydet"
TASK = "object-detection"
# What the Hub shows beside the model; the others stand in the text.
METRICS_IN_METADATA = {"map": "AP", "map_50": "AP50", "map_75": "AP75"}
DRAWN_ABOVE = 0.3
PICTURE_SIZE = (1024, 1024)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card says that the model itself does not know.

    Attributes:
        dataset: Hub id, or a path, of which only the last part is shown.
        eval_split: Split that the metrics are from; None without metrics.
        repo_id: Where the model will be on the Hub; None if that is not known.
        base_model: Hub id or path of the model that it was fine-tuned from; None if it is new.
        command: Command that trained it.
        license: Identifier in the Hub's list, "apache-2.0"; None leaves the field out.
    """

    dataset: str
    eval_split: str | None = None
    repo_id: str | None = None
    base_model: str | None = None
    command: str | None = None
    license: str | None = None


def model_card(
    config: DetectorConfig,
    facts: CardFacts,
    *,
    metrics: Mapping[str, float] | None = None,
    pictures: Sequence[str] = (),
) -> ModelCard:
    """Write the card; ``save(directory / "README.md")`` puts it where the Hub looks for it.

    Args:
        config: Of the detector.
        facts: See there.
        metrics: What :meth:`CocoEvaluator.compute` returned. AP, AP50 and AP75 are also in the
            metadata, from where the Hub shows them.
        pictures: File names of pictures with predictions, in the directory of the card.
    """
    variant = config.model_type.removeprefix(MODEL_TYPE_PREFIX)
    data = ModelCardData(
        model_name=_last_part(facts.repo_id or variant),
        library_name=LIBRARY,
        pipeline_tag=TASK,
        tags=[TASK, variant, LIBRARY],
        license=facts.license,
        base_model=_hub_id(facts.base_model),
        datasets=_hub_id(facts.dataset),
        eval_results=_eval_results(facts, metrics) or None,
    )
    sections = [
        f"# {data.model_name}",
        _introduction(config, facts),
        _usage(facts.repo_id),
        _results(facts, metrics, pictures),
        _training(facts),
        _labels(config),
        _limits(config),
    ]
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def write_model_card(
    directory: Path,
    config: DetectorConfig,
    facts: CardFacts,
    *,
    metrics: Mapping[str, float] | None = None,
    dataset: DetectionDataset | None = None,
    evaluator: CocoEvaluator | None = None,
    num_pictures: int = 3,
) -> None:
    """Write the card of :func:`model_card` as README.md, and pictures with predictions beside it.

    Args:
        directory: Of the saved detector.
        config: Of the detector.
        facts: See there.
        metrics: See :func:`model_card`.
        dataset: That was evaluated, as loaded, without a processor; None for no pictures.
        evaluator: That has seen it.
        num_pictures: How many of the dataset's first pictures are shown.
    """
    pictures = []
    if dataset is not None and evaluator is not None:
        pictures = _save_pictures(directory, dataset, evaluator, num_pictures)
    card = model_card(config, facts, metrics=metrics, pictures=pictures)
    card.save(directory / "README.md")


def _save_pictures(
    directory: Path, dataset: DetectionDataset, evaluator: CocoEvaluator, count: int
) -> list[str]:
    names = []
    for index in range(min(count, len(dataset))):
        item = dataset[index]
        found = evaluator.detections(item["annotations"]["image_id"])
        sure = found["scores"] >= DRAWN_ABOVE
        shown = {key: values[sure] for key, values in found.items()}
        drawn = draw_detections(item["image"], shown, id2label=evaluator.id2label)
        drawn.thumbnail(PICTURE_SIZE)
        names.append(f"detections_{index}.jpg")
        drawn.save(directory / names[-1], quality=90)
    return names


def _introduction(config: DetectorConfig, facts: CardFacts) -> str:
    origin = "trained"
    if facts.base_model is not None:
        origin = f"fine-tuned from {_mention(facts.base_model)}"
    return (
        f"An object detector, `{variant_of(config).detector.__name__}` of the library "
        f"`{LIBRARY}`, {origin} on {_mention(facts.dataset)}."
    )


def _usage(repo_id: str | None) -> str:
    return f"""## Use

```python
import {LIBRARY}  # makes the detector known to transformers
from transformers import pipeline

detect = pipeline("{TASK}", model="{repo_id or "path/to/this/directory"}")
for found in detect("picture.jpg", threshold=0.5):
    print(found["label"], round(found["score"], 2), found["box"])
```"""


def _results(
    facts: CardFacts, metrics: Mapping[str, float] | None, pictures: Sequence[str]
) -> str | None:
    if metrics is None:
        return None
    parts = [
        f"## Results\n\nCOCO metrics on the split `{facts.eval_split}` of "
        f"{_mention(facts.dataset)}:",
        f"```text\n{format_table(metrics)}\n```",
    ]
    if pictures:
        parts.append(
            "Pictures of that split, with what the detector finds in them above a score of "
            f"{DRAWN_ABOVE}:"
        )
        parts += [f"![detections]({name})" for name in pictures]
    return "\n\n".join(parts)


def _training(facts: CardFacts) -> str | None:
    if facts.command is None:
        return None
    return f"## Training\n\n```bash\n{facts.command}\n```"


def _labels(config: DetectorConfig) -> str:
    names = [
        f"{label}: {name}"
        for label, name in sorted(config.id2label.items())
        if name != UNUSED_LABEL
    ]
    return f"## Labels\n\n{', '.join(names)}"


def _limits(config: DetectorConfig) -> str | None:
    exception = variant_of(config).padding_exception
    if not exception:
        return None
    return f"## Batches of unlike pictures\n\nPadding can change predictions. {exception}"


def _eval_results(facts: CardFacts, metrics: Mapping[str, float] | None) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=_hub_id(facts.dataset) or "imagefolder",
            dataset_name=_last_part(facts.dataset),
            dataset_split=facts.eval_split,
            metric_type=key,
            metric_name=name,
            metric_value=round(metrics[key], 4),
        )
        for key, name in METRICS_IN_METADATA.items()
        if metrics is not None and metrics[key] >= 0  # -1 where there is no ground truth
    ]


def _mention(name_or_path: str) -> str:
    return f"`{_hub_id(name_or_path) or _last_part(name_or_path)}`"


def _hub_id(name_or_path: str | None) -> str | None:
    """The name, if it is one of the Hub and not that of something on this machine."""
    if name_or_path is None or Path(name_or_path).exists():
        return None
    return name_or_path if HUB_ID.fullmatch(name_or_path) else None


def _last_part(name_or_path: str) -> str:
    """Nobody else need know the folders of the machine that trained."""
    path = Path(name_or_path).absolute()
    folder = path.parent if path.suffix == ".json" else path
    return [part for part in folder.parts if "{split}" not in part][-1]
