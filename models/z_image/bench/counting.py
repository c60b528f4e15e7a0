"""Counts that are exact on every machine: forwards of a picture, operations and bytes of a forward.

The network has its real size and the picture 1024x1024, but its tensors are fake: torch works out their shapes and
nothing is computed, so the whole takes seconds and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from models.z_image.bench import twins
from models.z_image.bench.stand import Stand
from models.z_image.config import TransformerConfig
from models.z_image.guidance import ClassifierFreeGuidance, NormalizedAttentionGuidance
from models.z_image.pipeline import ZImagePipeline
from models.z_image.request import GenerateRequest
from models.z_image.transformer import ZImageTransformer

_SIDE, _CAPTION = 1024, 100

# Kinds of pictures by name: what differs from Turbo's 8 steps.
REQUESTS: Mapping[str, Mapping[str, Any]] = {
    "Turbo, 8 steps": {},
    "Turbo, 8 steps, NAG": {"nag": NormalizedAttentionGuidance(scale=4.0)},
    "Base, 30 steps, guided": {"steps": 30, "shift": 6.0, "guidance": ClassifierFreeGuidance(scale=4.0)},
    **{f"Turbo, 8 steps, {name}": {"sampler": name} for name in ("heun", "dpmpp_2m", "lcm")},
}


def counters(stand: Stand) -> None:
    """Forwards by kind of picture; then the real network's forward and its whole loop."""
    stand.how = "counted"
    small = twins.make(twins.sized(128, 1, heads=2, refiners=1, features=64), torch.float32, torch.device("cpu")).ours
    for name, changes in REQUESTS.items():
        stand.record(name, "ours", {"forwards": _forwards(small, changes)})
    loop = twins.our_loop(small, twins.scene(small.config, width=64, height=64, caption=20, device=torch.device("cpu")))
    loop()
    stand.record("the loop of 8 steps", "ours", {"host_reads": stand.count(loop).host_reads})
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        stand.record(f"one forward, {_SIDE}x{_SIDE}, {name}", "ours", stand.count(fake_forward(dtype)).gated())


def fake_forward(dtype: torch.dtype, config: TransformerConfig | None = None) -> Callable[[], Any]:
    """A forward of the real network on fake tensors of the CPU, called once before so that its tables are there."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake parameters cannot be cast afterwards
    try:
        with mode:
            model = ZImageTransformer(config or TransformerConfig()).eval()
    finally:
        torch.set_default_dtype(before)
    with mode, torch.no_grad():
        device = torch.device("cpu")
        given = twins.scene(model.config, width=_SIDE, height=_SIDE, caption=_CAPTION, device=device)
        forward = twins.our_forward(model, given)
        forward()

    def work() -> Any:
        with mode, torch.no_grad():
            return forward()

    return work


def _forwards(model: ZImageTransformer, changes: Mapping[str, Any]) -> int:
    """Calls of the network for one picture, as its record says."""
    pipeline = ZImagePipeline(model, twins.no_encoder(), None, torch.device("cpu"))
    request = GenerateRequest(**{"prompt": "", "width": 32, "height": 32, **changes})
    features = torch.randn(4, model.config.cap_feat_dim)
    for _ in pipeline.denoise(request, features, features if request.needs_negative else None):
        pass
    return pipeline.report.forwards
