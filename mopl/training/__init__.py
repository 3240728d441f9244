"""The thin training loop, checkpoints and logs."""

from mopl._files import discard_folder, write_file, write_folder
from mopl.training.batches import BatchSource, part_of_batch, shuffled_indices
from mopl.training.checkpoint import Checkpoint, CheckpointFolder
from mopl.training.logs import RunLog, read_log
from mopl.training.loop import (
    TrainingConfig,
    TrainingDiverged,
    TrainingInterrupted,
    TrainingResult,
    train,
)
from mopl.training.parallel import make_accelerator
from mopl.training.selection import Selection

__all__ = [
    "BatchSource",
    "Checkpoint",
    "CheckpointFolder",
    "RunLog",
    "Selection",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingInterrupted",
    "TrainingResult",
    "discard_folder",
    "make_accelerator",
    "part_of_batch",
    "read_log",
    "shuffled_indices",
    "train",
    "write_file",
    "write_folder",
]
