"""One block of real width in every kind of weight, and the whole network in every format on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.z_image.bench import forwards, twins
from models.z_image.bench.stand import Stand, Value
from models.z_image.bench.twins import Scene, Twins
from models.z_image.config import TransformerConfig

# 640 x 384 pixels are 960 image tokens, with 64 of the caption 1024.
_WIDTH, _HEIGHT, _CAPTION = 640, 384, 64

# A call takes a second or more, so it is repeated less often than others.
_REPEATS = 5
# Sides of square pictures, and repeats.
_GROWTH = ((256, 5), (512, 3), (768, 2), (1024, 2))
_LONG_CAPTION = 100

# Those that goals speak of first, for a run may be cut short.
FORMATS = ("int8", "svdq_int4", "svdq_fp4", "fp8_scaled", "nvfp4", "mxfp8")
_E2M1_TIMES_E4M3 = 6.0 * 448.0


def real_block() -> TransformerConfig:
    """The published network cut down to one of its main blocks, embeddings and last layer around it."""
    return TransformerConfig(n_layers=1, n_refiner_layers=0)


def on_cpu(stand: Stand, config: TransformerConfig | None = None) -> None:
    """bf16, int8 and 4 bits at 1024 tokens; then bf16 and int8 over the sizes of pictures."""
    both = twins.make(config or real_block(), torch.bfloat16, stand.device)
    given = twins.scene(both.config, width=_WIDTH, height=_HEIGHT, caption=_CAPTION, device=stand.device)
    reference = twins.their_forward(twins.in_float32(both.theirs), given)()
    contenders = _plain(stand, both, given)
    _measure(stand, "bf16, 1024 tokens", contenders, reference, both, {"ours": both.ours})

    int8 = twins.packed(both.ours, "int8", stand.folder)
    contenders = {"ours int8": twins.our_forward(int8, given), "ours bf16": twins.our_forward(both.ours, given)}
    contenders["P1"] = twins.their_forward(both.theirs, given)
    if stand.wants("P3"):
        contenders["P3"] = _changed(quanto_int8, both, given)
    contenders["raw int8"] = _raw_int8(both.config, given)
    _measure(stand, "int8, 1024 tokens", contenders, reference, both, {"ours int8": int8})

    nvfp4 = twins.packed(both.ours, "nvfp4", stand.folder)
    int4 = twins.packed(both.ours, "svdq_int4", stand.folder, rank=128)
    contenders = {
        "ours nvfp4": twins.our_forward(nvfp4, given),
        "ours int4 r128": twins.our_forward(int4, given),
        "ours int8": twins.our_forward(int8, given),
    }
    if stand.wants("P7"):
        contenders["P7"] = _changed(comfy_nvfp4, both, given)
    kinds = {"ours nvfp4": nvfp4, "ours int4 r128": int4, "ours int8": int8}
    _measure(stand, "4-bit, 1024 tokens", contenders, reference, both, kinds)
    del nvfp4, int4

    for side, repeats in _GROWTH:
        given = twins.scene(both.config, width=side, height=side, caption=_LONG_CAPTION, device=stand.device)
        contenders = {"ours": twins.our_forward(both.ours, given), "ours int8": twins.our_forward(int8, given)}
        contenders["P1"] = twins.their_forward(both.theirs, given)
        _measure(stand, f"growth, {side}x{side}", contenders, "P1", both, {}, given, repeats)


def on_gpu(stand: Stand, config: TransformerConfig | None = None, side: int = 1024) -> None:
    """The whole network at 1024x1024: our bf16 beside each format, and the peers that keep packed weights."""
    both = twins.make(config or TransformerConfig(), torch.bfloat16, stand.device)
    given = twins.scene(both.config, width=side, height=side, caption=_LONG_CAPTION, device=stand.device)
    reference = twins.our_forward(both.ours, given)()
    ranks = {"svdq_int4": (256, 32, 128), "svdq_fp4": (128,)}
    for kind in FORMATS:
        for rank in ranks.get(kind, (0,)):
            model = twins.packed(both.ours, kind, stand.folder, rank=rank)
            who = f"ours {kind} r{rank}" if rank else f"ours {kind}"
            contenders: dict[str, Callable[[], Any]] = {who: twins.our_forward(model, given)}
            contenders["ours bf16"] = twins.our_forward(both.ours, given)
            if kind == "int8" and stand.wants("P3"):
                contenders["P3"] = _changed(quanto_int8, both, given)
            if kind == "fp8_scaled" and stand.wants("P4"):
                contenders["P4"] = _changed(dynamic_fp8, both, given)
                if stand.wants("P2"):
                    contenders["P4 compiled"] = _changed(lambda m: forwards.compiled(dynamic_fp8(m)), both, given)
            if kind == "nvfp4" and stand.wants("P7"):
                contenders["P7"] = _changed(comfy_nvfp4, both, given)
            _measure(
                stand, f"{who.removeprefix('ours ')}, {side}x{side}", contenders, reference, both, {who: model}, given
            )
            del model, contenders
            if stand.device.type == "cuda":
                torch.cuda.empty_cache()


def quanto_int8(theirs: Any) -> Any:
    """diffusers' network with quanto's int8 linears."""
    from optimum.quanto import freeze, qint8, quantize  # type: ignore[import-untyped]

    model = copy.deepcopy(theirs)
    quantize(model, weights=qint8)
    freeze(model)
    return model


def dynamic_fp8(theirs: Any) -> Any:
    """diffusers' network whose blocks' linears multiply FP8: weights by rows, activations by tokens at every call.

    What torchao's dynamic FP8 does with rows as its granularity, by the same product of torch.
    """
    return _with_linears(theirs, _DynamicFp8)


def comfy_nvfp4(theirs: Any) -> Any:
    """diffusers' network whose blocks' linears are expanded from NVFP4 by comfy-kitchen at every call."""
    return _with_linears(theirs, _ExpandedAtEveryCall)


def _with_linears(theirs: Any, kind: Callable[[nn.Linear], nn.Module]) -> Any:
    """The network with others in place of its blocks' linears, all else shared."""
    model = copy.deepcopy(theirs, {id(p): p for p in theirs.parameters()})
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (".attention." in name or ".feed_forward." in name):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, kind(module))
    return model


class _DynamicFp8(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.codes, scale = _rows_to_fp8(linear.weight.detach())
        self.scale = scale.t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        codes, scale = _rows_to_fp8(rows)
        found = torch._scaled_mm(codes, self.codes.t(), scale_a=scale, scale_b=self.scale, out_dtype=x.dtype)
        return found.reshape(*x.shape[:-1], -1)


def _rows_to_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(codes in E4M3, scales (rows, 1) float32)."""
    scale = matrix.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (matrix.float() / scale).to(torch.float8_e4m3fn), scale


class _ExpandedAtEveryCall(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        import comfy_kitchen  # type: ignore[import-untyped]

        weight = linear.weight
        self.scale = weight.abs().amax().float() / _E2M1_TIMES_E4M3
        self.codes, self.blocks = comfy_kitchen.quantize_nvfp4(weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        import comfy_kitchen

        weight = comfy_kitchen.dequantize_nvfp4(self.codes, self.scale, self.blocks, output_type=x.dtype)
        return F.linear(x, weight)


def _changed(change: Callable[[Any], Any], both: Twins, given: Scene) -> Callable[[], Tensor]:
    return twins.lazily(lambda: twins.their_forward(change(both.theirs), given))


def _plain(stand: Stand, both: Twins, given: Scene) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {
        "ours": twins.our_forward(both.ours, given),
        "P1": twins.their_forward(both.theirs, given),
        "raw": twins.raw(both.ours, given),
    }
    if stand.wants("P2"):
        found["P2"] = _changed(forwards.compiled, both, given)
    return found


def _measure(
    stand: Stand,
    row: str,
    contenders: dict[str, Callable[[], Any]],
    reference: Tensor | str,
    both: Twins,
    packed: dict[str, Any],
    given: Scene | None = None,
    repeats: int = _REPEATS,
) -> None:
    """Compare, and say of each what it weighs and multiplies with."""
    facts: dict[str, dict[str, Value]] = {who: {} for who in contenders}
    for who, model in packed.items():
        facts[who] = {"weight_bytes": twins.weight_bytes(model), "kernels": twins.kernels_of(model, stand.device)}
    if given is not None:
        for values in facts.values():
            values |= {"tokens": given.tokens, "gflop": twins.forward_flops(both.config, given) / 1e9}
    stand.compare(row, contenders, reference=reference, repeats=repeats, facts=facts)


def _raw_int8(config: TransformerConfig, given: Scene) -> Callable[[], None]:
    """The products in int8 with nothing rounded or scaled around them, and attention in bf16."""
    tokens = given.tokens
    dim, ffn = config.dim, config.ffn_dim
    shapes = ((3 * dim, dim), (dim, dim), (2 * ffn, dim), (dim, ffn))
    codes = [torch.randint(-127, 128, shape, dtype=torch.int8) for shape in shapes]
    inputs = {columns: torch.randint(-127, 128, (tokens, columns), dtype=torch.int8) for _, columns in shapes}
    q = torch.randn(1, config.n_heads, tokens, config.head_dim).bfloat16()

    def forward() -> None:
        for code in codes:
            torch._int_mm(inputs[code.shape[1]], code.t())
        F.scaled_dot_product_attention(q, q, q)

    return forward
