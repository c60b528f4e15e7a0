"""What the machine can do at best: the denominators of everything else."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from models.z_image.bench.stand import Stand

# (outputs, inputs) of a block's products: qkv, out, w1 and w3, w2; and adaLN's for one token.
LAYERS = ((11520, 3840), (3840, 3840), (20480, 3840), (3840, 10240))
ADALN = (15360, 256)
HEADS, HEAD = 30, 128


def cpu(stand: Stand) -> None:
    """One core: products of 512 and 1024 tokens in each type, attention, copying."""
    for tokens, (outputs, inputs) in ((512, (3840, 3840)), (1024, (3840, 10240))):
        x, weight = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
        flops = 2.0 * tokens * outputs * inputs
        contenders: dict[str, Callable[[], Tensor]] = {"raw bf16": _product(x.bfloat16(), weight.bfloat16())}
        contenders["raw int8"] = _int8_product(x, weight)
        contenders["raw float32"] = _product(x, weight)
        stand.compare(
            f"{tokens} x {outputs} x {inputs}", contenders, facts={who: {"gflop": flops / 1e9} for who in contenders}
        )
    q = torch.randn(1, HEADS, 1024, HEAD).bfloat16()
    flops_of = {"gflop": 4.0 * 1024 * 1024 * HEADS * HEAD / 1e9}
    contenders = {"raw sdpa": lambda: F.scaled_dot_product_attention(q, q, q), "raw bmm": lambda: _bmm_attention(q)}
    stand.compare("attention, 1024 tokens", contenders, facts=dict.fromkeys(contenders, flops_of))
    source, target = torch.ones(2**27, dtype=torch.uint8), torch.empty(2**27, dtype=torch.uint8)
    stand.compare("copy, 134 MB", {"raw": lambda: target.copy_(source)}, facts={"raw": {"gb": 2 * 2**27 / 1e9}})


def gpu(
    stand: Stand,
    lengths: tuple[int, ...] = (1152, 4224, 16512),
    layers: tuple[tuple[int, int], ...] = LAYERS,
    copied: int = 2**29,
) -> None:
    """Products at the real shapes, attention by all backends of torch, copies on and to the device, reading, launches.

    copied: bytes, at most.
    """
    device = stand.device
    for tokens in lengths:
        for outputs, inputs in layers:
            x = torch.randn(tokens, inputs, device=device)
            weight = torch.randn(outputs, inputs, device=device)
            flops = 2.0 * tokens * outputs * inputs
            contenders = {"raw bf16": _product(x.bfloat16(), weight.bfloat16()), "raw int8": _int8_product(x, weight)}
            if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9):
                contenders["raw fp8"] = _fp8_product(x, weight)
            facts = {who: {"gflop": flops / 1e9} for who in contenders}
            stand.compare(f"{tokens} x {outputs} x {inputs}", contenders, facts=facts)
        q = torch.randn(1, HEADS, tokens, HEAD, device=device, dtype=torch.bfloat16)
        attentions = _attentions(q)
        flops_of = {"gflop": 4.0 * tokens * tokens * HEADS * HEAD / 1e9}
        stand.compare(f"attention, {tokens} tokens", attentions, facts=dict.fromkeys(attentions, flops_of))
    vector, weight = torch.randn(1, ADALN[1], device=device).bfloat16(), torch.randn(*ADALN, device=device).bfloat16()
    stand.compare("1 x 15360 x 256", {"raw bf16": _product(vector, weight)})
    _copies(stand, copied)
    _page_cache(stand, copied)
    small = torch.zeros(1, device=device)
    launches = 1000
    began = time.perf_counter()
    for _ in range(launches):
        small.add_(1)
    if device.type == "cuda":
        torch.cuda.synchronize()
    per_second = launches / (time.perf_counter() - began)
    stand.record("launches", "raw", {"launches_per_s": round(per_second)})


def _copies(stand: Stand, size: int) -> None:
    on_device = torch.empty(size, dtype=torch.uint8, device=stand.device)
    twin = torch.empty_like(on_device)
    facts = {"raw": {"gb": 2 * size / 1e9}}
    stand.compare(f"copy on the device, {size / 1e6:.0f} MB", {"raw": lambda: twin.copy_(on_device)}, facts=facts)
    for megabytes in sorted({min(some, size // 2**20) for some in (16, 64, 512)}):
        pinned = torch.empty(megabytes * 2**20, dtype=torch.uint8, pin_memory=stand.device.type == "cuda")
        part = on_device[: pinned.numel()]
        ways: dict[str, Callable[[], Tensor]] = {
            "raw up": partial(part.copy_, pinned, non_blocking=True),
            "raw down": partial(pinned.copy_, part, non_blocking=True),
        }
        facts = {who: {"gb": pinned.numel() / 1e9} for who in ways}
        stand.compare(f"pinned copy, {megabytes} MiB", ways, facts=facts)


def _page_cache(stand: Stand, size: int) -> None:
    path, buffer = stand.folder / "read.bin", bytearray(size)
    path.write_bytes(buffer)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            file.readinto(buffer)

    stand.compare(f"page cache, {size / 1e6:.0f} MB", {"raw": read}, facts={"raw": {"gb": size / 1e9}})
    path.unlink()


def _product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: F.linear(x, weight)


def _int8_product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    codes_x = (x * 40).round().clamp(-127, 127).to(torch.int8)
    codes = (weight * 40).round().clamp(-127, 127).to(torch.int8)
    return lambda: torch._int_mm(codes_x, codes.t())


def _fp8_product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    codes_x, codes = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    scale_x = torch.ones(len(x), 1, device=x.device)
    scale = torch.ones(1, len(weight), device=x.device)
    return lambda: torch._scaled_mm(codes_x, codes.t(), scale_a=scale_x, scale_b=scale, out_dtype=torch.bfloat16)


def _bmm_attention(q: Tensor) -> Tensor:
    scores = (q @ q.transpose(-2, -1)).mul_(HEAD**-0.5)
    return scores.softmax(dim=-1) @ q


def _attentions(q: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The backends of torch that take this input on this device, by name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"raw flash": SDPBackend.FLASH_ATTENTION}
    if q.is_cuda:
        backends["raw cudnn"] = SDPBackend.CUDNN_ATTENTION
    found: dict[str, Callable[[], Tensor]] = {}
    for who, backend in backends.items():

        def attend(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, q, q)

        try:
            attend()
        except RuntimeError:  # torch was built without it, or it refuses this GPU
            continue
        found[who] = attend
    return found
