"""What the tests of pushing and loading run in a process that talks to the local Hub.

Every function takes and returns plain values, which travel between the processes.
"""

import hashlib
import os
import socket
import sys
import tempfile
import warnings

import torch
from huggingface_hub import constants
from huggingface_hub.cli import hf
from tiny import perturb, picture, tiny_batch, tiny_config, tiny_labels
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils.logging import disable_progress_bar
from typer.testing import CliRunner

from hf_querydet import VARIANTS, load_detector
from hf_querydet.cli import app
from hf_querydet.data import DetectionCollator
from hf_querydet.training import HubRepository


def start():
    """First call in the process: as strict as the tests."""
    warnings.simplefilter("error")
    # huggingface_hub 2.4 uploads large files so.
    warnings.filterwarnings("ignore", "Use 'content=<...>' to upload", DeprecationWarning)
    disable_progress_bar()
    torch.set_num_threads(1)


def digest(model):
    """One hash of all names and values."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + value.numpy().tobytes())
    return total.hexdigest()


def build(name, seed, shortest_edge):
    torch.manual_seed(seed)
    model = perturb(VARIANTS[name].detector(tiny_config(VARIANTS, name))).eval()
    size = {"shortest_edge": shortest_edge, "longest_edge": 100}
    return model, VARIANTS[name].image_processor(size=size)


def facts(model, processor):
    """What tells two detectors apart."""
    return {
        "config": type(model.config).__name__,
        "model": type(model).__name__,
        "processor": type(processor).__name__,
        "weights": digest(model),
        "shortest_edge": processor.size["shortest_edge"],
    }


def push(name, repo_id, seed=0, shortest_edge=64, **options):
    """Returns what was pushed."""
    model, processor = build(name, seed, shortest_edge)
    model.push_to_hub(repo_id, **options)
    processor.push_to_hub(repo_id, **options)
    return facts(model, processor)


def load_through_auto_classes(repo_id, **options):
    loaded = facts(
        AutoModelForObjectDetection.from_pretrained(repo_id, **options),
        AutoImageProcessor.from_pretrained(repo_id, **options),
    )
    config = AutoConfig.from_pretrained(repo_id, **options)
    return {**loaded, "config": type(config).__name__}


def load(repo_id, **options):
    return facts(*load_detector(repo_id, **options))


def load_without_own_token(repo_id, **options):
    token = os.environ.pop("HF_TOKEN")
    try:
        return load(repo_id, **options)
    finally:
        os.environ["HF_TOKEN"] = token


def detect_with_pushed(name):
    """Detections of the detector that `push` pushes, which never was on the Hub."""
    model, processor = build(name, seed=0, shortest_edge=64)
    detect = pipeline("object-detection", model=model, image_processor=processor)
    return detect(picture(90, 60), threshold=0.0)


def detect(repo_id):
    return pipeline("object-detection", model=repo_id)(picture(90, 60), threshold=0.0)


def train_and_push(name, repo_id):
    """One step of Trainer; returns what it trained."""
    model, processor = build(name, seed=0, shortest_edge=64)
    batch, labels = tiny_batch(), tiny_labels()
    examples = [
        {"pixel_values": pixel_values, "labels": label}
        for pixel_values, label in zip(batch["pixel_values"], labels, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=2,
            remove_unused_columns=False,
            push_to_hub=True,
            hub_model_id=repo_id,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=DetectionCollator(processor),
            processing_class=processor,
        )
        trainer.train()
        trainer.push_to_hub()
    return facts(model, processor)


def prepare_repository(**fields):
    return HubRepository(**fields).prepare()


def push_directory(directory, message, **fields):
    return HubRepository(**fields).push(directory, message)


def prepare_without_token(**fields):
    token = os.environ.pop("HF_TOKEN")
    try:
        return prepare_repository(**fields)
    finally:
        os.environ["HF_TOKEN"] = token


def prepare_without_network(**fields):
    """As if the Hub were at an address where nobody listens."""
    endpoint = constants.ENDPOINT
    with socket.socket() as closed:
        # Taken, so that no one else answers, but not listening.
        closed.bind(("127.0.0.1", 0))
        constants.ENDPOINT = f"http://127.0.0.1:{closed.getsockname()[1]}"
        try:
            return prepare_repository(**fields)
        finally:
            constants.ENDPOINT = endpoint


def run_command(words):
    """The command `hf`."""
    arguments = sys.argv
    sys.argv = words
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are those of the command
            hf.main()
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = arguments


def run_querydet(*arguments):
    """Exit code and output of `hf-querydet`."""
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def message(function, *args, **kwargs):
    """Type and text of what a call raises; exceptions of the Hub do not travel themselves."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
