"""nunchaku's SVDQuant files: every number where its tile order says, written, read, and refused when damaged.

The places below are written from formats.md 3.3 to 3.5 as loops over single numbers; nothing here uses our packers to
check our packers. (They were also compared with nunchaku's own nunchaku/lora/flux/packer.py, byte for byte.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError, UnknownFormatError, UserError
from shared.quant.formats import Layer, format_of, layers_of, read_checked, svdq
from shared.quant.kernels.svdq import in_order
from shared.quant.mapping import is_mapped
from shared.quant.packing import Packed
from shared.quant.packings.svdq import Kind, Svdq
from shared.quant.svdq_tiling import unpack_scales
from tests.support.tiny_model import relative_error

State = dict[str, torch.Tensor]
GROUP: dict[Kind, int] = {"int4": 64, "fp4": 16}
KINDS: tuple[Kind, ...] = ("int4", "fp4")


def code_place(n: int, k: int, columns: int) -> tuple[int, int]:
    """Byte of the code of (n, k), and by how much it is shifted in it."""
    nt, r = divmod(n, 128)
    a, r = divmod(r, 16)
    d, b = divmod(r, 8)
    kt, c0 = divmod(k, 64)
    e, c0 = divmod(c0, 32)
    c, i = divmod(c0, 8)
    word = (((((nt * (columns // 64) + kt) * 8 + a) * 8 + b) * 4 + c) * 2 + d) * 2 + e
    return 4 * word + i // 2, 4 * (i % 2)


def scale_place(n: int, g: int, groups: int) -> int:
    u, r = divmod(n % 128, 16)
    w, r = divmod(r, 8)
    v, x = divmod(r, 2)
    return ((n // 128) * groups + g) * 128 + u * 16 + v * 4 + w * 2 + x


def micro_scale_place(n: int, g: int, groups: int) -> int:
    r32, r = divmod(n % 128, 32)
    r4, r8 = divmod(r, 8)
    return (((n // 128) * (groups // 4) + g // 4) * 8 + r8) * 64 + r4 * 16 + r32 * 4 + g % 4


def up_place(n: int, r: int, rank: int) -> int:
    nb, nh, nl = n // 16, n // 8 % 2, n % 8
    rb, rh, rl, ri = r // 16, r // 8 % 2, r // 2 % 4, r % 2
    return (nb * (rank // 16) + rb) * 256 + nl * 32 + rl * 8 + nh * 4 + rh * 2 + ri


def down_place(r: int, k: int, rank: int) -> int:
    rb, rh, rl = r // 16, r // 8 % 2, r % 8
    kb, kh, kl, ki = k // 16, k // 8 % 2, k // 2 % 4, k % 2
    return (kb * (rank // 16) + rb) * 256 + rl * 32 + kl * 8 + rh * 4 + kh * 2 + ki


def random_packed(kind: Kind, rows: int, columns: int, rank: int) -> Packed:
    generator = torch.Generator().manual_seed(rows + columns)

    def numbers(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) + 0.5).bfloat16()

    scales = numbers(rows, columns // GROUP[kind])
    tensors = {
        "codes": torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8),
        "scales": scales.to(torch.float8_e4m3fn) if kind == "fp4" else scales,
        "row_scale": numbers(rows, 1).float() if kind == "fp4" else torch.ones(rows, 1),
        "smooth": numbers(columns),
        "down": numbers(rank, columns),
        "up": numbers(rows, rank),
    }
    return Packed(Svdq(kind), (rows, columns), tensors)


def check_places(packed: Packed, file: State, positions: Callable[[int, int], Iterable[tuple[int, int]]]) -> None:
    """Numbers of `packed` at positions(rows, columns) of each of its tensors are in `file` where they belong."""
    t = packed.tensors
    rows, columns = packed.shape
    rank, groups = len(t["down"]), t["scales"].shape[1]
    flat = {name: tensor.flatten() for name, tensor in file.items()}
    code_bytes = flat["qweight"].view(torch.uint8)
    for n, k in positions(rows, columns):
        byte, shift = code_place(n, k, columns)
        assert int(code_bytes[byte]) >> shift & 15 == int(t["codes"][n, k // 2]) >> 4 * (k % 2) & 15, (n, k)
    place = micro_scale_place if packed.packing.kind == "fp4" else scale_place
    for n, g in positions(rows, groups):
        assert flat["wscales"][place(n, g, groups)].float() == t["scales"][n, g].float(), (n, g)
    for n, r in positions(rows, rank):
        assert flat["proj_up"][up_place(n, r, rank)] == t["up"][n, r], (n, r)
    for r, k in positions(rank, columns):
        assert flat["proj_down"][down_place(r, k, rank)] == t["down"][r, k], (r, k)
    for k, _ in positions(columns, 1):
        assert flat["smooth_factor"][scale_place(k, 0, 1)] == t["smooth"][k], k
    if "wcscales" in file:
        for n, _ in positions(rows, 1):
            assert flat["wcscales"][scale_place(n, 0, 1)] == t["row_scale"][n, 0], n


def every(rows: int, columns: int) -> Iterable[tuple[int, int]]:
    return ((i, j) for i in range(rows) for j in range(columns))


def some(rows: int, columns: int) -> Iterable[tuple[int, int]]:
    generator = torch.Generator().manual_seed(rows * columns)
    places = torch.randint(0, rows * columns, (200,), generator=generator).tolist()
    return (divmod(place, columns) for place in places)


def saved(path: Path, tensors: State) -> Layer:
    save_file({f"layers.0.attention.to_out.0.{suffix}": t for suffix, t in tensors.items()}, path)
    checkpoint = Checkpoint.open(path)
    return layers_of(checkpoint, checkpoint.tensors)["layers.0.attention.to_out.0"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "svdq.safetensors"


@pytest.mark.parametrize(("rows", "columns", "rank", "positions"), [(128, 128, 16, every), (384, 640, 48, some)])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_lie_where_the_tile_order_says(
    file: Path,
    kind: Kind,
    rows: int,
    columns: int,
    rank: int,
    positions: Callable[[int, int], Iterable[tuple[int, int]]],
) -> None:
    packed = random_packed(kind, rows, columns, rank)

    check_places(packed, svdq.pack(packed), positions)

    # The other way round: a file of arbitrary numbers, read.
    generator = torch.Generator().manual_seed(5)
    arbitrary = {
        name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape)
        if tensor.dtype != torch.float8_e4m3fn
        else tensor.view(torch.uint8).roll(1).view(tensor.dtype)
        for name, tensor in svdq.pack(packed).items()
    }
    read = in_order(svdq.read(saved(file, arbitrary)))
    assert (read.packing, read.shape) == (Svdq(kind), (rows, columns))
    check_places(read, arbitrary, positions)


def test_the_example_in_the_module_s_text_holds() -> None:
    assert code_place(13, 50, 128) == (365, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_read_undoes_pack(file: Path, kind: Kind) -> None:
    packed = random_packed(kind, 256, 384, 32)

    read = svdq.read(saved(file, svdq.pack(packed)))

    assert read.packing == packed.packing
    read = in_order(read)
    for name, tensor in packed.tensors.items():
        assert torch.equal(read.tensors[name].float(), tensor.float()), name
        assert read.tensors[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("kind", KINDS)
def test_reading_leaves_every_large_tensor_in_the_file(file: Path, kind: Kind) -> None:
    read = svdq.read(saved(file, svdq.pack(random_packed(kind, 256, 384, 32))))

    assert {name for name, tensor in read.tensors.items() if not is_mapped(tensor)} <= {"row_scale"}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_from_the_unpacked_scales_and_not_from_a_slice_of_the_file_s(file: Path, kind: Kind) -> None:
    packed = random_packed(kind, 384, 256, 16)
    tensors = svdq.pack(packed)

    part = in_order(svdq.read(saved(file, tensors)).take_rows(128, 256))

    assert torch.equal(part.tensors["scales"].float(), packed.tensors["scales"][128:256].float())
    naive = unpack_scales(tensors["wscales"][:, 128:256].contiguous(), 128, packed.tensors["scales"].shape[1])
    assert not torch.equal(naive.float(), part.tensors["scales"].float()), "the trap is still a trap"


@pytest.mark.parametrize(
    ("extra", "factor"),
    [
        ({}, 1.0),
        ({"wtscale": torch.tensor(0.25)}, 0.25),
        ({"wtscale": torch.tensor([0.25]).bfloat16()}, 0.25),
        ({"wcscales": torch.full((128,), 0.5).bfloat16()}, 0.5),
        ({"wcscales": torch.full((128,), 0.5).bfloat16(), "wtscale": torch.tensor([0.25])}, 0.125),
    ],
)
def test_tensor_and_channel_scales_may_be_there_or_not(file: Path, extra: State, factor: float) -> None:
    tensors = svdq.pack(random_packed("fp4", 128, 128, 16))
    del tensors["wcscales"]

    read = svdq.read(saved(file, tensors | extra))

    assert read.tensors["row_scale"].tolist() == [[factor]] * 128
    assert read.tensors["row_scale"].dtype == torch.float32


# Relative errors of a Gaussian weight 256 x 256, whose spectrum is flat: as large as they get. formats.md names .13
# for int4 and .09 for fp4 at rank 32 with one pass; the turns of svdquant.py find better pairs.
@pytest.mark.parametrize(
    ("kind", "rank", "iterations", "worst"),
    [
        ("int4", 32, 0, 0.090), ("int4", 32, 5, 0.068), ("int4", 128, 5, 0.020), ("int4", 256, 5, 0.002),
        ("fp4", 32, 0, 0.080), ("fp4", 32, 5, 0.057), ("fp4", 128, 5, 0.015), ("fp4", 256, 5, 0.002),
    ],
)  # fmt: skip
def test_what_is_written_is_read_back_near_the_weight(
    file: Path, kind: Kind, rank: int, iterations: int, worst: float
) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))

    layer = saved(file, svdq.quantize(weight, kind=kind, rank=rank, iterations=iterations))

    assert format_of(layer) is svdq
    assert svdq.shape(layer) == (256, 256)
    assert svdq.describe(layer) == {"format": f"SVDQ {kind}", "rank": rank, "group": GROUP[kind]}
    assert 0.75 * worst < relative_error(svdq.read(layer).dequantize(torch.float32), weight) < worst or rank == 256


def test_the_branch_found_is_nearly_the_best_there_is() -> None:
    from shared.quant.svdquant import largest_directions

    weight = torch.randn(384, 512, generator=torch.Generator().manual_seed(0))
    lost = torch.linalg.svdvals(weight)[32:].square().sum().sqrt()

    up, down, _ = largest_directions(weight, 32, None)

    assert (weight - up @ down).norm() < 1.005 * lost


@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_spends_precision_where_activations_are_large(file: Path, kind: Kind) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 256, generator=generator)
    x = torch.randn(512, 256, generator=generator)
    x[:, ::16] *= 30
    smooth = x.abs().amax(dim=0).sqrt()

    def output_error(smooth: torch.Tensor | None) -> float:
        layer = saved(file, svdq.quantize(weight, kind=kind, rank=16, smooth=smooth))
        return relative_error(x @ svdq.read(layer).dequantize(torch.float32).t(), x @ weight.t())

    assert output_error(smooth) < 0.8 * output_error(None)


def test_stacked_matrices_have_channel_scales_and_single_ones_a_tensor_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.cat([torch.randn(128, 128, generator=generator) * size for size in (1.0, 0.01, 5.0)])

    stacked = svdq.quantize(weight, kind="fp4", rank=16, parts=3)
    single = svdq.quantize(weight, kind="fp4", rank=16)

    assert "wcscales" in stacked and "wtscale" not in stacked
    assert stacked["wcscales"].view(3, 128).std(dim=1).eq(0).all()
    assert "wtscale" in single and "wcscales" not in single
    assert svdq.quantize(weight, kind="int4", rank=16).keys() == stacked.keys() - {"wcscales"}


def test_a_rank_that_fills_no_tile_is_padded(file: Path) -> None:
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))

    layer = saved(file, svdq.quantize(weight, rank=20))

    assert svdq.describe(layer)["rank"] == 32


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_packed_without_nan(file: Path, kind: Kind) -> None:
    weight = torch.zeros(128, 128)
    weight[3, 5] = 1.0

    layer = saved(file, svdq.quantize(weight, kind=kind, rank=16, iterations=0))

    assert torch.allclose(svdq.read(layer).dequantize(torch.float32), weight, atol=0.01)


@pytest.mark.parametrize(
    ("weight", "smooth", "says"),
    [
        (torch.zeros(128, 192), None, "128 x 192 cannot become SVDQuant"),
        (torch.full((128, 128), math.nan), None, "NaN"),
        (torch.zeros(128, 128), torch.zeros(128), "128 columns takes that many positive"),
        (torch.zeros(128, 128), torch.ones(64), "128 columns takes that many positive"),
    ],
)
def test_weights_that_cannot_be_packed_are_named(weight: torch.Tensor, smooth: torch.Tensor | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        svdq.quantize(weight, smooth=smooth)


def test_the_header_says_what_nunchaku_s_loader_asks_for() -> None:
    header = svdq.header({"dim": 384}, kind="fp4", rank=100, skip_refiners=True)

    assert json.loads(header["config"]) == {"dim": 384}
    assert header["model_class"] == "NunchakuZImageTransformer2DModel"
    assert json.loads(header["quantization_config"]) == {
        "method": "svdquant",
        "weight": {"dtype": "fp4_e2m1_all", "scale_dtype": [None, "fp8_e4m3_nan"], "group_size": 16},
        "activation": {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16},
        "rank": 112,
        "skip_refiners": True,
    }
    int4 = json.loads(svdq.header({}, kind="int4", rank=256)["quantization_config"])
    assert int4["weight"] == {"dtype": "int4", "scale_dtype": None, "group_size": 64}


def without(name: str) -> Callable[[State], None]:
    return lambda t: t.__delitem__(name)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    return lambda t: t.update({name: change(t[name])})


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.float().clone()
        tensor.flatten()[7] = value
        return tensor

    return change


DAMAGES: dict[str, tuple[Callable[[State], None], str]] = {
    "no scales": (without("wscales"), "no wscales"),
    "no smoothing": (without("smooth_factor"), "has no smooth_factor"),
    "half a branch": (without("proj_up"), "has no proj_up"),
    "codes of another type": (put("qweight", lambda t: t.short()), r"qweight is I16 \[256, 64\], expected I8"),
    "codes in one row": (put("qweight", lambda t: t.flatten()), "expected I8 of two axes"),
    "rows that fill no tile": (put("qweight", lambda t: t[:100].contiguous()), "is 100 x 128, but nunchaku's tiles"),
    "columns that fill no tile": (put("qweight", lambda t: t[:, :31].contiguous()), "is 256 x 62, but nunchaku's"),
    "scales of another type": (put("wscales", lambda t: t.float()), "wscales is F32, expected BF16"),
    "scales of the other kind": (put("wscales", lambda t: t.to(torch.float8_e4m3fn)), r"expected \[8, 256\] for fp4"),
    "too few scales": (put("wscales", lambda t: t[:1].contiguous()), r"wscales is \[1, 256\], expected \[2, 256\]"),
    "another rank": (put("proj_up", lambda t: t[:, :16].contiguous()), r"proj_up is \[256, 16\], expected \[256, 32\]"),
    "a rank that fills no tile": (put("proj_down", lambda t: t[:, :9].contiguous()), "rank a multiple of 16"),
    "no rank": (put("proj_down", lambda t: t[:, 0].contiguous()), r"proj_down is \[128\]"),
    "a branch in 32 bits": (put("proj_up", lambda t: t.float()), "proj_up is F32"),
    "too little smoothing": (put("smooth_factor", lambda t: t[:64].contiguous()), r"smooth_factor is \[64\]"),
    "NaN scales": (put("wscales", lambda t: with_value(math.nan)(t).bfloat16()), "its scales holds NaN"),
    "infinite smoothing": (put("smooth_factor", lambda t: with_value(math.inf)(t).bfloat16()), "its smooth holds NaN"),
    "zero smoothing": (put("smooth_factor", lambda t: with_value(0)(t).bfloat16()), "its smooth holds zeros"),
    "zero scales": (put("wscales", lambda t: with_value(0)(t).bfloat16()), "1 of 512 groups hold numbers but"),
    "a NaN branch": (put("proj_down", lambda t: with_value(math.nan)(t).bfloat16()), "its down holds NaN"),
    "a zero tensor scale": (lambda t: t.update(wtscale=torch.zeros(1)), "its row_scale holds zeros"),
    "two tensor scales": (lambda t: t.update(wtscale=torch.ones(2)), r"wtscale is F32 \[2\], expected one"),
    "short channel scales": (lambda t: t.update(wcscales=torch.ones(128).bfloat16()), r"wcscales is \[128\]"),
    "a bias in tiles": (lambda t: t.update(bias=torch.ones(256)), "has a bias"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_layers_are_named(file: Path, damage: str) -> None:
    change, says = DAMAGES[damage]
    tensors = svdq.quantize(torch.randn(256, 128, generator=torch.Generator().manual_seed(0)), rank=32, iterations=0)
    change(tensors)
    layer = saved(file, tensors)

    assert svdq.claims(layer)
    with pytest.raises(CheckpointError, match=says) as error:
        read_checked(svdq, layer)
    assert "svdq.safetensors: layers.0.attention.to_out.0" in str(error.value)
    if " holds " not in str(error.value) and " hold " not in str(error.value):  # seen in the header already
        with pytest.raises(CheckpointError, match=says):
            svdq.describe(layer)


def test_nan_in_fp4_scales_is_named(file: Path) -> None:
    tensors = svdq.quantize(torch.eye(128), kind="fp4", rank=16, iterations=0)
    tensors["wscales"].view(torch.uint8)[0, 0] = 0x7F

    with pytest.raises(CheckpointError, match="its scales holds NaN"):
        read_checked(svdq, saved(file, tensors))


def test_comfy_kitchen_s_untiled_tensors_are_not_taken_for_these(file: Path) -> None:
    tensors = svdq.quantize(torch.eye(128), rank=16, iterations=0)
    marker = torch.frombuffer(bytearray(b'{"format": "svdquant_w4a4"}'), dtype=torch.uint8)

    with pytest.raises(UnknownFormatError, match="svdquant_w4a4"):
        format_of(saved(file, tensors | {"comfy_quant": marker}))
