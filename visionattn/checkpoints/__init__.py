"""Read, recognise, convert, load and save network weights.

Every family's file in `models/` knows both layouts of its weights, the authors' and ours (`LAYOUT`); here
stands what is common to all: reading without running code, saying which network a file belongs to and exactly
what does not fit.
"""

from visionattn.checkpoints.conversion import (
    convert_checkpoint,
    official_state_dict,
    save_folder,
    save_official,
)
from visionattn.checkpoints.identify import Identity, identify, load_network
from visionattn.checkpoints.loading import LoadReport, load_checkpoint, save_checkpoint
from visionattn.checkpoints.reading import CheckpointError, read_checkpoint, unwrap_state_dict

__all__ = [
    "CheckpointError",
    "Identity",
    "LoadReport",
    "convert_checkpoint",
    "identify",
    "load_checkpoint",
    "load_network",
    "official_state_dict",
    "read_checkpoint",
    "save_checkpoint",
    "save_folder",
    "save_official",
    "unwrap_state_dict",
]
