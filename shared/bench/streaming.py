"""The schedule of streamed weights, simulated for links and GPUs that are not here (shared/app/stream_schedule.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shared.app.stream_schedule import Block, choose_resident, held_bytes, simulate
from shared.bench.stand import Stand

# Bytes per second from page-locked memory: PCIe 5.0 and 4.0 with 16 lanes, a laptop's 8 lanes. Taken, not measured.
LINKS = {"50 GB/s": 50e9, "25 GB/s": 25e9, "12 GB/s": 12e9}

# Bytes for blocks and ring on the GPU.
CAPS = {"everything streamed": 0.0, "in 3 GB": 3e9}

# Weights of a variant: bytes of each block, and for each GPU named the milliseconds that all blocks compute.
Variant = tuple[Sequence[int], Mapping[str, float]]


def streaming(stand: Stand, variants: Mapping[str, Variant]) -> None:
    """For every variant, GPU, link and cap a pass in the steady state. Floor: the longer of copying and computing."""
    stand.how = "computed from copy rates and computing times that are taken as given"
    for name, (sizes, computing) in variants.items():
        for gpu, compute_ms in computing.items():
            for link, rate in LINKS.items():
                for cap, room in CAPS.items():
                    resident = choose_resident(sizes, int(room))
                    if all(resident):
                        continue
                    if all(resident):
                        continue
                    seconds = compute_ms / 1e3 / len(sizes)
                    blocks = [Block(n, seconds, stays) for n, stays in zip(sizes, resident, strict=True)]
                    last = simulate(blocks, rate)[-1]
                    copy_ms = last.copied_bytes / rate * 1e3
                    floor = max(compute_ms, copy_ms)
                    figures = {
                        "ms": last.seconds * 1e3,
                        "compute_ms": compute_ms,
                        "copy_ms": copy_ms,
                        "exposed_ms": last.exposed_seconds * 1e3,
                        "over_floor": last.seconds * 1e3 / floor,
                        "held_gb": held_bytes(sizes, resident) / 1e9,
                    }
                    rounded = {key: round(value, 3) for key, value in figures.items()}
                    stand.record(f"{name}, {gpu}, {link}, {cap}", "ours", rounded)
