"""--compute: from the flag or the configuration to the kernels of the loaded model, and into every record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.app.context import AppContext
from shared.app.plan import choose_compute
from shared.app.settings import GenerationSettings
from shared.quant.errors import UserError
from shared.quant.kernels import torch_int8
from shared.quant.linear import PackedLinear
from shared.quant.packings import int8
from tests.support.fake_family import FakeHandler, FakeProcessor, fake_context, write_preset

CPU = torch.device("cpu")


def with_a_packed_layer(processor: FakeProcessor) -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    layer = PackedLinear(int8.pack(*int8.quantize(weight)), None, torch.bfloat16)
    processor.transformer.add_module("packed", layer)


def order(ctx: AppContext) -> GenerationSettings:
    return GenerationSettings.build(ctx.presets.get("one"), {}, {"prompt": "fox", "seed": 1})


@pytest.fixture
def handler() -> FakeHandler:
    return FakeHandler(prepare=with_a_packed_layer)


def test_the_flag_comes_before_the_configuration(tmp_path: Path) -> None:
    ctx = fake_context(tmp_path, FakeHandler(), compute="")
    assert choose_compute(ctx).value == "auto"

    ctx.save_config(compute="int8")
    assert (choose_compute(ctx).value, choose_compute(ctx).reason) == ("int8", "from the configuration")

    ctx.args.compute = "BF16"
    assert (choose_compute(ctx).value, choose_compute(ctx).reason) == ("bf16", "asked for")


def test_an_unknown_kind_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Unknown kind of compute 'int4'. Choose from: auto, bf16, fp8, int8, native."):
        choose_compute(fake_context(tmp_path, FakeHandler(), compute="int4"))


def test_the_kernels_are_chosen_at_load_told_and_recorded(tmp_path: Path, handler: FakeHandler) -> None:
    write_preset(tmp_path, "one")
    ctx = fake_context(tmp_path, handler, compute="int8")

    result = ctx.session.generate("one", order(ctx))

    layer = handler.processors[0].transformer.packed
    assert layer.compute == "int8" and layer.kernel(torch.device("cpu")).name == "torch-int8"
    assert result.as_dict()["kernels"] == ["1 int8 layers by torch-int8"]
    assert result.images[0].record["provenance"]["kernels"] == result.kernels
    assert ctx.session.plan("one", order(ctx)).as_dict()["compute"] == {"value": "int8", "reason": "asked for"}


@pytest.mark.parametrize(("compute", "reading"), [("auto", "scale-after"), ("int8", "torch-int8")])
def test_a_text_encoders_activations_are_rounded_only_when_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: str, reading: str
) -> None:
    monkeypatch.setattr(torch_int8, "_LARGE", 16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})

    def prepare(processor: FakeProcessor) -> None:
        with_a_packed_layer(processor)
        processor.text_encoder.add_module("packed", processor.transformer.packed.twin(CPU))

    write_preset(tmp_path, "one")
    handler = FakeHandler(prepare=prepare)
    ctx = fake_context(tmp_path, handler, compute=compute)
    ctx.session.generate("one", order(ctx))

    (processor,) = handler.processors
    assert processor.transformer.packed.kernel(CPU).name == "torch-int8"
    assert processor.text_encoder.packed.kernel(CPU).name == reading


def test_another_kind_loads_the_model_anew(tmp_path: Path, handler: FakeHandler) -> None:
    write_preset(tmp_path, "one")
    ctx = fake_context(tmp_path, handler, compute="int8")
    ctx.session.generate("one", order(ctx))

    ctx.args.compute = "bf16"
    result = ctx.session.generate("one", order(ctx))

    assert len(handler.processors) == 2
    assert result.kernels == ["1 int8 layers by scale-after"]


def test_what_nothing_computes_is_said_before_a_picture_is_drawn(tmp_path: Path, handler: FakeHandler) -> None:
    write_preset(tmp_path, "one")
    ctx = fake_context(tmp_path, handler, compute="native")

    with pytest.raises(UserError, match=r"int8: no such kernel exists\. Use --compute auto\."):
        ctx.session.generate("one", order(ctx))
    assert handler.processors[0].calls == []
