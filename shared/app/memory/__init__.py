"""What a generation needs and what it used: a memory estimate before the run, peak figures after it.

All figures are in MiB (2**20 bytes). The estimate reads file headers only and needs no torch. Of a module whose files
are not here yet, the published sizes of its files and its family's shapes stand in for headers: blocks of equal size,
tensors outside them plain. Tested to be within a tenth for bf16 and int8 files.

    RAM of a stage on the CPU  = base + all weights used up to then + LoRAs + the stage's working memory; a text
                                 encoder's that are mapped from the file are let go of before drawing
    VRAM of a stage on a GPU   = its model's weights as they are placed + LoRAs + the stage's working memory

Rooms: sizes.py (a module by its headers), published.py (by what is published), workload.py (what a picture asks for),
estimate.py (the formula), decoding.py (of the decode), process.py (what this process holds). Where weights are placed
is memory_plan/'s.
"""

from shared.app.memory.decoding import TILES
from shared.app.memory.estimate import MemoryEstimate, estimate_memory
from shared.app.memory.process import (
    BASE_MB,
    free_ram_bytes,
    free_vram_bytes,
    give_freed_memory_back,
    peak_rss_mb,
    peak_vram_mb,
    reset_peak_vram,
)
from shared.app.memory.published import ModuleShapes, PublishedModule
from shared.app.memory.sizes import MIB, STAGES, ModuleSizes
from shared.app.memory.workload import Workload

__all__ = [
    "BASE_MB",
    "MIB",
    "STAGES",
    "TILES",
    "MemoryEstimate",
    "ModuleShapes",
    "ModuleSizes",
    "PublishedModule",
    "Workload",
    "estimate_memory",
    "free_ram_bytes",
    "free_vram_bytes",
    "give_freed_memory_back",
    "peak_rss_mb",
    "peak_vram_mb",
    "reset_peak_vram",
]
