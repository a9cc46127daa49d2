"""What training loops share: optimizer settings, averages, checkpoints, pushing to the Hub."""

from hf_querydet.file_writing import write_directory, write_json
from hf_querydet.training.batch_statistics import average_statistics
from hf_querydet.training.finite_loss import NonFiniteLossError, mean_loss_terms
from hf_querydet.training.hub import HubError, HubRepository, prepare_repository
from hf_querydet.training.optimization import (
    continue_schedule,
    learning_rate_schedule,
    parameter_groups,
)
from hf_querydet.training.options import (
    NO_SPLIT,
    fill_from_recipe,
    parse_options,
    shown_command,
    shown_options,
)
from hf_querydet.training.progress import ThroughputMeter, TrainingProgress
from hf_querydet.training.run_directory import (
    check_facts,
    checkpoint_name,
    list_checkpoints,
    open_run_directory,
    rename_checkpoint,
    run_facts,
    save_checkpoint,
)
from hf_querydet.training.weight_average import weight_average

__all__ = [
    "NO_SPLIT",
    "HubError",
    "HubRepository",
    "NonFiniteLossError",
    "ThroughputMeter",
    "TrainingProgress",
    "average_statistics",
    "check_facts",
    "checkpoint_name",
    "continue_schedule",
    "fill_from_recipe",
    "learning_rate_schedule",
    "list_checkpoints",
    "mean_loss_terms",
    "open_run_directory",
    "parameter_groups",
    "parse_options",
    "prepare_repository",
    "rename_checkpoint",
    "run_facts",
    "save_checkpoint",
    "shown_command",
    "shown_options",
    "weight_average",
    "write_directory",
    "write_json",
]
