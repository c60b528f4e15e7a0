"""What is measured of Z-Image: a function for each case of the measuring program, which finds them here by CASES.

Each is given a stand that compares callables, counts operations and keeps figures (see stand.py for what it is asked).
Only that program imports this package: it brings the peers in, diffusers and quanto among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from models.z_image.bench import blocks, counting, forwards, loras, opening, peer_program, pictures, roofs, stages
from models.z_image.bench.stand import Stand
from models.z_image.bench.streamed import variants

CASES: Mapping[str, Callable[[Stand], None]] = {
    "B0": roofs.gpu,
    "B1": forwards.on_gpu,
    "B2": blocks.on_gpu,
    "B3": pictures.warm,
    "B4": pictures.batches,
    "B7": stages.text_on_gpu,
    "B8": stages.decode_on_gpu,
    "B9": pictures.growth,
    "B10": loras.on_gpu,
    "C0": roofs.cpu,
    "C1": forwards.dispatch,
    "C2": forwards.small,
    "C3": blocks.on_cpu,
    "C5": opening.opening,
    "C7": counting.counters,
    "C8": stages.text_on_cpu,
    "C9": stages.decode_on_cpu,
    "C10": loras.on_cpu,
}

# Diffusers' whole program, for the cases that start processes.
PEER_PROGRAM = {
    "module": "models.z_image.bench.peer_program",
    "whole": peer_program.WHOLE,
    "offloading": [place for place in peer_program.PLACES if place != peer_program.WHOLE],
}

# Kinds of weight for the simulation of streaming: bytes of each block, GPU -> milliseconds of computing.
STREAMED = variants
