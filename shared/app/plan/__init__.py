"""What a generation will use, decided before anything is loaded: files, device, number type, offload, memory.

Every choice carries its reason. Planning needs no torch where the machine has no GPU, so `generate --dry-run` is quick.

Rooms, from what is asked to what is decided: requested.py (flags and configuration), machine.py (device and number
type), files.py (which, and where they are), download.py (what is not here), weighing.py (the memory it takes),
generation.py (the plan).
"""

from shared.app.plan.download import Download
from shared.app.plan.files import PlannedFile, beside_transformer, find_files, wanted_files
from shared.app.plan.generation import GenerationPlan, make_plan
from shared.app.plan.machine import DTYPE_BYTES, VAE_DTYPE, Machine, find_machine, find_machine_quickly, safer_type
from shared.app.plan.requested import Choice, choose_compute, requested_device, requested_profile
from shared.app.plan.weighing import published_shapes, quick_decode_bytes, weigh_files

__all__ = [
    "DTYPE_BYTES",
    "VAE_DTYPE",
    "Choice",
    "Download",
    "GenerationPlan",
    "Machine",
    "PlannedFile",
    "beside_transformer",
    "choose_compute",
    "find_files",
    "find_machine",
    "find_machine_quickly",
    "make_plan",
    "published_shapes",
    "quick_decode_bytes",
    "requested_device",
    "requested_profile",
    "safer_type",
    "wanted_files",
    "weigh_files",
]
