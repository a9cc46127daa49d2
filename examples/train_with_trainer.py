"""Fine-tune a detector with transformers' Trainer.

    accelerate launch examples/train_with_trainer.py facebook/detr-resnet-50 path/to/dataset \
        --output_dir outputs/trainer --num_train_epochs 50 --learning_rate 1e-4

The first two words are a model (directory or Hub id) and a dataset (on the Hub, a picture folder
with metadata.jsonl, or a COCO json), with the splits train and validation. All options of
``TrainingArguments`` follow, ``--push_to_hub`` and ``--resume_from_checkpoint`` among them.
"""

import sys

from transformers import HfArgumentParser, TrainingArguments

from hf_querydet import load_detector_for_labels
from hf_querydet.data import (
    DetectionAugmentation,
    DetectionCollator,
    check_splits_differ,
    load_detection_dataset,
)
from hf_querydet.evaluation import DetectionTrainer, format_table


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    name, dataset, *options = sys.argv[1:]
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="map",
        max_grad_norm=0.1,  # as in the papers
        weight_decay=1e-4,
        remove_unused_columns=False,  # pictures are prepared when they are asked for
        dataloader_pin_memory=False,
    )
    (arguments,) = parser.parse_args_into_dataclasses(options)

    check_splits_differ(dataset, train_split="train", eval_split="validation")
    train = load_detection_dataset(dataset, split="train")
    table = train.label_table
    validation = load_detection_dataset(dataset, split="validation", label_table=table)
    model, processor, _ = load_detector_for_labels(name, train.id2label)
    # The model's labels rule: it keeps those that it has.
    train, validation = (data.with_labels(model.config.id2label) for data in (train, validation))
    trainer = DetectionTrainer(
        model=model,
        args=arguments,
        train_dataset=train.with_processor(processor, DetectionAugmentation(processor)),
        eval_dataset=validation.with_processor(processor),
        data_collator=DetectionCollator(processor),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    metrics = trainer.evaluate()
    print(format_table({key.removeprefix("eval_"): metrics[key] for key in metrics}))
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    if arguments.push_to_hub:
        trainer.push_to_hub(tags=["object-detection"])


if __name__ == "__main__":
    main()
