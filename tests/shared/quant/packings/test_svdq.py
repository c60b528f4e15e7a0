"""SVDQuant in natural order: the formula, number by number, and comfy-kitchen's arithmetic."""

from __future__ import annotations

import pytest
import torch
from comfy_kitchen.backends.eager import svdquant as kitchen

from shared.quant.packing import Packed, join_rows
from shared.quant.packings.svdq import Kind, Svdq, decode
from tests.support.tiny_model import relative_error

GROUP: dict[Kind, int] = {"int4": 64, "fp4": 16}
KINDS: tuple[Kind, ...] = ("int4", "fp4")


def random_packed(kind: Kind, rows: int = 256, columns: int = 128, rank: int = 16, seed: int = 0) -> Packed:
    """Any codes, with scales and smoothing that are powers of two, so that float32 products of them are exact."""
    generator = torch.Generator().manual_seed(seed)

    def power(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 3, shape, generator=generator).float().exp2()

    groups = columns // GROUP[kind]
    scales = power(rows, groups)
    tensors = {
        "codes": torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8),
        "scales": scales.to(torch.float8_e4m3fn if kind == "fp4" else torch.bfloat16),
        "row_scale": power(rows, 1) if kind == "fp4" else torch.ones(rows, 1),
        "smooth": power(columns).bfloat16(),
        "down": torch.randn(rank, columns, generator=generator).bfloat16(),
        "up": torch.randn(rows, rank, generator=generator).bfloat16(),
    }
    return Packed(Svdq(kind), (rows, columns), tensors)


def number(kind: Kind, code: int) -> float:
    """One code, from the definitions of the two number systems."""
    if kind == "int4":
        return code - 16 if code & 8 else code
    sign, exponent, mantissa = -1 if code & 8 else 1, (code >> 1) & 3, code & 1
    return sign * (0.5 * mantissa if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa / 2))


def formula(packed: Packed) -> torch.Tensor:
    """The weight in float64, element by element, as formats.md 3.6 writes it."""
    t = {name: tensor.double().tolist() for name, tensor in packed.tensors.items() if name != "codes"}
    codes = packed.tensors["codes"].tolist()
    kind = packed.packing.kind
    rows, columns = packed.shape
    result = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        for k in range(columns):
            code = codes[n][k // 2] >> (4 if k % 2 else 0) & 15
            scale = t["scales"][n][k // GROUP[kind]] * t["row_scale"][n][0]
            branch = sum(up * down[k] for up, down in zip(t["up"][n], t["down"], strict=True))
            result[n, k] = number(kind, code) * scale / t["smooth"][k] + branch
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_the_formula_s(kind: Kind) -> None:
    packed = random_packed(kind, rows=32)
    expected = formula(packed)

    assert relative_error(packed.dequantize(torch.float32).double(), expected) < 1e-7
    branchless = Packed(packed.packing, packed.shape, {**packed.tensors, "up": torch.zeros(32, 16).bfloat16()})
    assert torch.equal(branchless.dequantize(torch.float32).double(), formula(branchless)), "exact but for the sums"


def test_the_example_in_the_module_s_text_holds() -> None:
    tensors = {
        "codes": torch.tensor([[0xD3]], dtype=torch.uint8),
        "scales": torch.tensor([[0.5]]),
        "row_scale": torch.ones(1, 1),
        "smooth": torch.tensor([2.0, 1.0]),
        "down": torch.tensor([[0.25, -1.0]]),
        "up": torch.tensor([[2.0]]),
    }

    assert Svdq("int4").dequantize(tensors, torch.float32).tolist() == [[1.25, -3.5]]
    assert decode(tensors["codes"], "fp4", torch.bfloat16).tolist() == [[1.5, -3.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_its_number_in_every_type(kind: Kind, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[:, None]

    expected = [[number(kind, byte & 15), number(kind, byte >> 4)] for byte in range(256)]
    assert decode(codes, kind, dtype).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_branch_sees_activations_that_were_not_smoothed(kind: Kind) -> None:
    packed = random_packed(kind)
    t = {name: tensor.double() for name, tensor in packed.tensors.items() if name != "codes"}
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).double()
    rounded = packed.packing.residual(packed.tensors, torch.float32).double()

    expected = (x / t["smooth"]) @ rounded.t() + (x @ t["down"].t()) @ t["up"].t()

    assert relative_error(x @ packed.dequantize(torch.float32).double().t(), expected) < 1e-7


def test_int4_multiplies_as_comfy_kitchen_does() -> None:
    packed = random_packed("int4")
    t = packed.tensors
    # comfy-kitchen rounds activations to -7..7 times a scale per group: these are such numbers already, scale 1.
    steps = torch.randint(-7, 8, (6, 128), generator=torch.Generator().manual_seed(1)).float()
    steps[:, ::64] = 7
    x = steps * t["smooth"].float()

    q_x, ascales, branch = kitchen.quantize_svdquant_w4a4(x, t["smooth"].float(), t["down"].t().float())
    theirs = kitchen.scaled_mm_svdquant_w4a4(
        q_x, t["codes"].view(torch.int8), ascales, t["scales"].t().float(), branch, t["up"].float()
    )[:6]

    ours = x @ packed.dequantize(torch.float32).t()
    assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_taken_and_joined_exactly(kind: Kind) -> None:
    packed = random_packed(kind)
    whole = packed.dequantize(torch.float32)
    cuts = [(0, 50), (50, 128), (128, 256)]

    parts = [packed.take_rows(*cut) for cut in cuts]

    for part, (start, stop) in zip(parts, cuts, strict=True):
        assert relative_error(part.dequantize(torch.float32), whole[start:stop]) < 1e-7
    swapped = join_rows([parts[2], parts[0], parts[1]])
    assert swapped is not None
    assert swapped.shape == (256, 128)
    assert relative_error(swapped.dequantize(torch.float32), torch.cat([whole[128:], whole[:128]])) < 1e-7


@pytest.mark.parametrize("name", ["smooth", "down"])
def test_rows_of_another_smoothing_or_branch_are_not_joined(name: str) -> None:
    one = random_packed("int4")
    other = Packed(one.packing, one.shape, {**one.tensors, name: one.tensors[name] * 2})

    assert join_rows([one, other]) is None
    assert join_rows([one, random_packed("fp4")]) is None
    assert join_rows([one, random_packed("int4", rank=32)]) is None
