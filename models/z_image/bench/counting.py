"""Counts that are exact on every machine: forwards of a picture, operations and bytes of a forward.

Pictures are drawn by a tiny network. Operations and bytes are those of a network of real width at 1024x1024, whose
tensors are fake: torch works out their shapes and nothing is computed. It has one refiner block and two layers, which
is enough: the other blocks do the same again, and memory is given back after each. All of it takes seconds, so that CI
counts with every change.
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
from shared import ops
from shared.ops import eager
from shared.ops.attention import Backend

_SIDE, _CAPTION = 1024, 100
_CUT = TransformerConfig(n_layers=2, n_refiner_layers=1)
_BLOCKS = "3 of 34 blocks"

# Kinds of pictures by name: what differs from Turbo's 8 steps.
REQUESTS: Mapping[str, Mapping[str, Any]] = {
    "Turbo, 8 steps": {},
    "Turbo, 8 steps, NAG": {"nag": NormalizedAttentionGuidance(scale=4.0)},
    "Base, 30 steps, guided": {"steps": 30, "shift": 6.0, "guidance": ClassifierFreeGuidance(scale=4.0)},
    **{f"Turbo, 8 steps, {name}": {"sampler": name} for name in ("heun", "dpmpp_2m", "lcm")},
}


def counters(stand: Stand) -> None:
    """Forwards and host reads by kind of picture; then a forward of real width, and a whole loop."""
    stand.how = "counted"
    _try_kernels()
    small = ZImageTransformer(twins.sized(128, 1, heads=2, refiners=1, features=64)).eval().requires_grad_(False)
    twins.randomise(small, 0)
    for name, changes in REQUESTS.items():
        picture = _Picture(small, changes)
        reads = stand.count(picture).host_reads
        stand.record(name, "ours", {"forwards": picture.forwards, "host_reads": reads})
    loop = twins.our_loop(small, twins.scene(small.config, width=64, height=64, caption=20, device=torch.device("cpu")))
    loop()
    stand.record("the loop of 8 steps", "ours", {"host_reads": stand.count(loop).host_reads})
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        stand.record(f"{_BLOCKS}, {_SIDE}x{_SIDE}, {name}", "ours", stand.count(fake_forward(dtype)).gated())


def fake_forward(dtype: torch.dtype, config: TransformerConfig | None = None) -> Callable[[], Any]:
    """A forward of real width on fake tensors of the CPU, called once before so that its tables are there.

    Attention is one operation, as on a GPU; what a CPU has in its place depends on the CPU.
    """
    _try_kernels()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake parameters cannot be cast afterwards
    try:
        with mode:
            model = ZImageTransformer(config or _CUT).eval()
    finally:
        torch.set_default_dtype(before)
    with mode, torch.no_grad():
        model.use_attention(Backend("counted", torch.nn.functional.scaled_dot_product_attention))
        device = torch.device("cpu")
        given = twins.scene(model.config, width=_SIDE, height=_SIDE, caption=_CAPTION, device=device)
        forward = twins.our_forward(model, given)
        forward()

    # torch's operations keep a constant for each width, which no fake tensor can be: made here, it never counts.
    with torch.no_grad():
        for width in (model.config.dim, model.config.head_dim):
            ones = torch.ones(1, 1, width)
            eager.gate_residual(eager.rms_norm_modulate(ones, ones[0, 0], None, model.config.norm_eps), ones, None,
                                ones[0, 0], model.config.norm_eps)  # fmt: skip

    def work() -> Any:
        with mode, torch.no_grad():
            return forward()

    return work


def _try_kernels() -> None:
    """Compiled operations are tried out when first asked for: no work of a forward's, and none for fake tensors."""
    with torch.no_grad():
        ops.implementation(torch.empty(0))


class _Picture:
    """Draws a picture when called. forwards: calls of the network that it took, as its record says."""

    def __init__(self, model: ZImageTransformer, changes: Mapping[str, Any]) -> None:
        self.forwards = 0
        self._model = model
        self._request = GenerateRequest(**{"prompt": "", "width": 32, "height": 32, **changes})
        self._features = torch.randn(4, model.config.cap_feat_dim)

    def __call__(self) -> None:
        pipeline = ZImagePipeline(self._model, twins.no_encoder(), None, torch.device("cpu"))
        negative = self._features if self._request.needs_negative else None
        for _ in pipeline.denoise(self._request, self._features, negative):
            pass
        self.forwards = pipeline.report.forwards
