"""One forward of the network beside diffusers': what dispatch costs, small sizes, and real ones on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from models.z_image.bench import twins
from models.z_image.bench.stand import Stand, Value
from models.z_image.bench.twins import Scene, Twins
from models.z_image.config import TransformerConfig

_COMPILED = "P2"


def dispatch(stand: Stand) -> None:
    """The real depth at a width where arithmetic is next to nothing: Python, torch's dispatcher and small kernels."""
    config = twins.sized(128, 30, heads=2)
    both = twins.make(config, torch.bfloat16, stand.device)
    given = twins.scene(config, width=128, height=64, caption=20, device=stand.device)
    contenders = _forwards(stand, both, given)
    del contenders["raw"]
    counted = {who: work for who, work in contenders.items() if who != _COMPILED and stand.wants(who)}
    for work in counted.values():
        work()  # what is kept from the first step on is made now
    counts = {who: stand.count(work) for who, work in counted.items()}
    facts: dict[str, dict[str, Value]] = {
        who: {"ops": found.ops, "views": found.views, "host_reads": found.host_reads} for who, found in counts.items()
    }
    reference = twins.their_forward(twins.in_float32(both.theirs), given)()
    stand.compare("one forward", contenders, reference=reference, facts=facts)

    loops = {"ours": twins.our_loop(both.ours, given), "P1": twins.their_loop(both.theirs, given)}
    reference = twins.their_loop(twins.in_float32(both.theirs), given)()
    stand.compare("all 8 steps", loops, reference=reference)


def small(stand: Stand, config_of: Callable[[int, int], TransformerConfig] | None = None) -> None:
    """Sizes at which people train and test: overhead and arithmetic weigh alike."""
    config_of = config_of or (lambda dim, layers: twins.sized(dim, layers, heads=dim // 64))
    for dim, layers, pixels, caption in ((256, 6, 128, 30), (256, 6, 256, 60), (512, 8, 256, 60), (768, 8, 256, 60)):
        for dtype in (torch.bfloat16, torch.float32):
            config = config_of(dim, layers)
            both = twins.make(config, dtype, stand.device)
            given = twins.scene(config, width=pixels, height=pixels, caption=caption, device=stand.device)
            reference = twins.their_forward(twins.in_float32(both.theirs), given)()
            name = "bf16" if dtype == torch.bfloat16 else "float32"
            stand.compare(
                f"dim {dim}, {given.tokens} tokens, {name}", _forwards(stand, both, given), reference=reference
            )


def on_gpu(
    stand: Stand, config: TransformerConfig | None = None, sides: tuple[int, ...] = (512, 768, 1024, 1536, 2048)
) -> None:
    """The real network in bf16: every resolution with a caption of 100 tokens, 1024x1024 with others too."""
    both = twins.make(config or TransformerConfig(), torch.bfloat16, stand.device)
    int8 = twins.packed(both.ours, "int8", stand.folder)
    cases = [(side, 100) for side in sides] + [(1024, 32), (1024, 512)]
    for side, caption in cases:
        given = twins.scene(both.config, width=side, height=side, caption=caption, device=stand.device)
        facts: dict[str, Value] = {"tokens": given.tokens, "gflop": twins.forward_flops(both.config, given) / 1e9}
        contenders = _forwards(stand, both, given) | {"ours int8": twins.our_forward(int8, given)}
        stand.compare(
            f"{side}x{side}, caption {caption}",
            contenders,
            reference="P1",  # in bf16: a float32 copy of the network would take 25 GB more
            facts=dict.fromkeys(contenders, facts),
        )


def _forwards(stand: Stand, both: Twins, given: Scene) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {
        "ours": twins.our_forward(both.ours, given),
        "P1": twins.their_forward(both.theirs, given),
        "raw": twins.raw(both.ours, given),
    }
    if stand.wants(_COMPILED):
        found[_COMPILED] = twins.lazily(lambda: twins.their_forward(compiled(both.theirs), given))
    return found


def compiled(theirs: Any) -> Any:
    """diffusers' regional compilation: each block is compiled, all blocks share the code."""
    import copy

    model = copy.deepcopy(theirs, {id(p): p for p in theirs.parameters()})
    model.compile_repeated_blocks(fullgraph=True)
    return model
