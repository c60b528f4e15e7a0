"""Triton kernels compile for every generation of card, with the launch options of its table, without a GPU.

They are compiled as they are launched: Triton looks at the arguments, and addresses and sizes that are multiples of 16
make other code, which reads 16 bytes at a time and several tiles ahead. Shared memory is compared with what the
generation has, and no number may spill out of the registers; time is for a GPU to tell.

Usually some kernels for some generations: seconds. ZIMAGE_COMPILE=all in the environment takes every kernel for every
generation: a minute or two, after a change of kernels, tiles or Triton.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shared.ops import tuning
from tests.support.triton_process import needs_triton

pytestmark = [needs_triton, pytest.mark.slow, pytest.mark.timeout(1800)]

# Bytes of shared memory that one program may have: CUDA C++ programming guide, technical specifications.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

ALL = os.environ.get("ZIMAGE_COMPILE") == "all"
ROWS_FOR = tuple(SHARED_MEMORY) if ALL else (89,)  # the first with 8-bit floats
PRODUCTS_FOR = tuple(SHARED_MEMORY) if ALL else (80, 90)  # units that a warp drives, and four warps together

BF16, F32, I32 = "*bf16", "*fp32", "i32"
# The published network: rows of 3840, heads of 128, 10240 in the feed-forward.
ROW = {"columns": I32, "tokens_per_item": I32, "eps": "fp32"}


def element_wise() -> list[tuple[str, dict[str, str], dict[str, Any], int]]:
    """(kernel, types of its pointers and numbers, its constants, width of a row)."""
    rows = dict.fromkeys(("x_stride", "y_stride", "gate_stride", "scale_stride"), I32)
    flags = {"HAS_SCALE": True, "EXACT": False, "WIDTH": 4096}
    cases: list[tuple[str, dict[str, str], dict[str, Any], int]] = []
    for rounding, out in ((0, BF16), (1, "*i8"), (2, "*fp8e4nv"))[0 if ALL else 2 :]:
        types = {"x": BF16, "weight": BF16, "scale": BF16, "out": out, "codes_scale": F32, **ROW}
        types |= {"x_stride": I32, "scale_stride": I32}
        cases.append(("rms_norm_modulate", types, {**flags, "ROUND": rounding}, 4096))
        types = {"x": BF16, "y": BF16, "gate": BF16, "weight": BF16, "next_weight": BF16, "next_scale": BF16}
        types |= {"stream_out": BF16, "out": out, "codes_scale": F32, **ROW, **rows}
        cases.append(("gate_residual_norm", types, {**flags, "HAS_GATE": True, "ROUND": rounding}, 4096))
        if rounding:
            types = {"w13": BF16, "codes": out, "codes_scale": F32, "columns": I32}
            cases.append(("swiglu_rounded", types, {"ROUND": rounding, "WIDTH": 16384}, 16384))
            types = {"x": BF16, "smooth": BF16, "codes": out, "codes_scale": F32, "columns": I32, "x_stride": I32}
            cases.append(("round_rows", types, {"HAS_SMOOTH": True, "ROUND": rounding, "WIDTH": 4096}, 4096))
    types = {"x": BF16, "y": BF16, "gate": BF16, "weight": BF16, "out": BF16, **ROW}
    types |= dict.fromkeys(("x_stride", "y_stride", "gate_stride"), I32)
    cases.append(("gate_residual", types, {"HAS_GATE": True, "EXACT": True, "WIDTH": 4096}, 4096))
    types = {"qkv": BF16, "q_weight": BF16, "k_weight": BF16, "rope": F32, "tokens_per_item": I32, "heads": I32}
    types |= {"eps": "fp32", "rope_item_stride": I32, "rope_token_stride": I32}
    cases.append(("qk_norm_rope", types, {"EXACT": False, "HEADS": 32, "HEAD_WIDTH": 128}, 4096))
    return cases


# Of the real network's sizes all but these are multiples of 16.
ODD = frozenset({"heads", "tokens_per_item", "tokens"})


def built(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, launch: dict[str, int]
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, **{name: value for name, value in launch.items() if name.isupper()}}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    even = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name] not in ("constexpr", "fp32") and name not in ODD
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=even)
    options = {name: value for name, value in launch.items() if not name.isupper()}
    try:
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except FileNotFoundError as missing:  # Triton brings ptxas along; a build without the one for this card
        pytest.skip(f"no assembler for capability {capability}: {missing}")


def check(compiled: Any, capability: int, folder: Path) -> None:
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    assert stack_bytes(compiled.asm["cubin"], folder) == 0


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Memory that a thread takes beside its registers: what was spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    told = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return sum(int(found) for found in re.findall(r"STACK:(\d+)", told))


@pytest.mark.parametrize("capability", ROWS_FOR)
def test_element_wise_kernels_compile(capability: int, tmp_path: Path) -> None:
    from shared.ops import triton_kernels

    for name, types, constants, width in element_wise():
        if constants.get("ROUND") == 2 and capability < 89:
            continue  # cards without 8-bit floats are never asked for them
        launch = tuning.launch("row", capability, width)
        check(built(getattr(triton_kernels, name), types, constants, capability, launch), capability, tmp_path)
    types = {"w13": BF16, "out": BF16, "columns": I32}
    launch = tuning.launch("stretch", capability, 10240)
    check(built(triton_kernels.swiglu, types, {}, capability, launch), capability, tmp_path)


@pytest.mark.parametrize("capability", SHARED_MEMORY if ALL else (90,))
def test_kernels_of_maps_compile(capability: int, tmp_path: Path) -> None:
    from shared.ops.maps import kernels

    widths = (128, 256, 512) if ALL else (256,)  # the published decoder's, of 32 groups
    for channels in widths:
        launch = tuning.launch("map", capability, channels)
        launch = {"PIXELS": launch.pop("NUMBERS") // channels, **launch}
        shape: dict[str, Any] = {"CHANNELS": channels, "GROUPS": 32}
        types = {"x": BF16, "bias": F32, "skip": BF16, "out": BF16, "sums": F32, "pixels": I32, "width": I32}
        for doubled in (False, True):
            flags = {"HAS_BIAS": True, "HAS_SKIP": True, "KEEP": True, "DOUBLED": doubled}
            check(built(kernels.settle, types, shape | flags, capability, launch), capability, tmp_path)
        types = {"total": "*fp64", "weight": F32, "bias": F32, "before": F32, "factor": F32, "summand": F32}
        types |= {"count": I32, "eps": "fp32"}
        check(built(kernels.factors, types, shape | {"HAS_BEFORE": True}, capability, {}), capability, tmp_path)
        types = {"x": BF16, "factor": F32, "summand": F32, "out": BF16, "pixels": I32}
        one = {"CHANNELS": channels, "SILU": True}
        check(built(kernels.normalise, types, one, capability, launch), capability, tmp_path)


@pytest.mark.parametrize("capability", PRODUCTS_FOR)
def test_products_compile_with_the_tiles_of_the_table(capability: int, tmp_path: Path) -> None:
    from shared.quant.kernels import triton_matmul

    pointers = {"a_scale": F32, "scale": F32, "left": BF16, "right": BF16, "bias": BF16, "out": BF16}
    numbers = dict.fromkeys(("tokens", "rows", "columns", "rank", "left_stride", "right_stride"), I32)
    for kind, codes in (("int8", "*i8"), ("fp8", "*fp8e4nv")):
        if kind == "fp8" and capability < 89:
            continue
        tiles = [launch for _, launch in tuning.read()[str(capability)][f"{kind} matmul"]]
        largest = max(tiles, key=lambda launch: launch["BLOCK_M"] * launch["BLOCK_N"])
        for launch in tiles if ALL else [largest]:
            constants = {"WHOLE": kind == "int8", "HAS_BIAS": False, "HAS_BRANCH": True, "EVEN": True}
            constants |= {"WIDEN": False, "BLOCK_R": 32}
            types = {"a": codes, "codes": codes, **pointers, **numbers}
            check(built(triton_matmul._scaled_matmul, types, constants, capability, launch), capability, tmp_path)


@pytest.mark.parametrize("capability", ROWS_FOR)
def test_expanding_compiles(capability: int, tmp_path: Path) -> None:
    from shared.quant.kernels import triton_expand

    numbers = {"codes": "*u8", "row_scale": F32, "smooth": BF16, "columns": I32, "rows": I32, "tiles": I32}
    for coding, scales, group, swizzled in ((0, BF16, 64, False), (1, "*u8", 16, False), (2, "*u8", 16, True)):
        constants = {"CODING": coding, "SWIZZLED": swizzled, "HAS_SMOOTH": coding < 2, "GROUP": group}
        launch = tuning.launch("expand", capability, 3840)
        types = {**numbers, "scales": scales, "out": BF16}
        check(built(triton_expand._expand, types, constants, capability, launch), capability, tmp_path)
        for rounding, out in ((1, "*i8"), (2, "*fp8e4nv")):
            if rounding == 2 and capability < 89:
                continue
            types = {**numbers, "scales": scales, "out": out, "out_scale": F32}
            launch = tuning.launch("row", capability, 4096)
            whole_row = {**constants, "ROUND": rounding, "WIDTH": 4096}
            check(built(triton_expand._expand_rounded, types, whole_row, capability, launch), capability, tmp_path)
