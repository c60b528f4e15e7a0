"""Files made by peft, diffusers and LyCORIS change the network exactly as the library itself changes it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import nn

from models.z_image import lora
from models.z_image.loader import load_transformer
from models.z_image.transformer import ZImageTransformer
from tests.support.tiny_model import TINY, relative_error

# float32 products in another order; the adapters themselves must do a hundred times more.
TOLERANCE = 1e-5
EFFECT = 1e-3

# The linears of a block by diffusers' names, and one with a bias.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3", "adaLN_modulation.0"]


@pytest.fixture(scope="module")
def ours(model_folder: Path) -> ZImageTransformer:
    return load_transformer(model_folder / "transformer.safetensors", torch.float32)


@pytest.fixture
def theirs(reference_transformer: ZImageTransformer2DModel) -> ZImageTransformer2DModel:
    return copy.deepcopy(reference_transformer)


def draw_weights(module: nn.Module, is_adapter: Callable[[str], bool], seed: int = 3) -> None:
    """Adapters that matter: libraries begin with zeros. A DoRA magnitude is changed by a tenth, around what it is."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            noise = torch.randn(parameter.shape, generator=generator)
            magnitude = "magnitude" in name or "dora_scale" in name
            parameter.data = parameter.data * (1 + 0.1 * noise) if magnitude else noise * 0.08


def assert_same_effect(ours: ZImageTransformer, theirs: nn.Module, file: Path, modules: int) -> None:
    """Equal forwards with the file on, which differ from those without it. modules: how many the file changes."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 8, 12, generator=generator)
    captions = [torch.randn(12, TINY.cap_feat_dim, generator=generator)]
    time = torch.tensor([0.3])
    with torch.no_grad():
        plain = ours(latents, time, captions)
        expected = theirs(list(latents[:, :, None]), time, captions, return_dict=False)[0][0][None, :, 0]
        found = lora.read(file)
        (match,) = lora.apply(ours, [found], [1.0])
        changed = ours(latents, time, captions)
        lora.apply(ours, [], [])

    assert match.unmatched == ()
    assert len(found.transformer) == modules
    assert relative_error(changed, plain) > EFFECT
    assert relative_error(changed, expected) <= TOLERANCE


# 2 layers and a noise refiner of 8 linears, a context refiner of 7.
ALL_LINEARS = 3 * 8 + 7

PEFT = {
    "LoRA, alpha / rank": ("LoraConfig", {"r": 4, "lora_alpha": 10}),
    "rsLoRA": ("LoraConfig", {"r": 4, "lora_alpha": 3, "use_rslora": True}),
    "patterns of rank and alpha": (
        "LoraConfig",
        {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 6}, "alpha_pattern": {"layers.1.feed_forward.w2": 12}},
    ),
    "a bias on B": (
        "LoraConfig",
        {"r": 4, "lora_alpha": 8, "lora_bias": True, "target_modules": ["adaLN_modulation.0"]},
    ),
    "DoRA": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_dora": True}),
    "LoHa of small rank": ("LoHaConfig", {"r": 3, "alpha": 9}),
    "LoHa of high rank": ("LoHaConfig", {"r": 24, "alpha": 24}),
    "LoKr": ("LoKrConfig", {"r": 4, "alpha": 8, "decompose_factor": 8}),
    "LoKr, both factors small": ("LoKrConfig", {"r": 4, "alpha": 2, "decompose_both": True, "decompose_factor": 16}),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft takes its own bias for a damaged matrix
@pytest.mark.parametrize("kind", PEFT)
def test_a_file_made_by_peft(
    ours: ZImageTransformer, theirs: ZImageTransformer2DModel, tmp_path: Path, kind: str
) -> None:
    import peft

    name, options = PEFT[kind]
    # The final layer's adaLN_modulation.0 is an activation.
    options = {"target_modules": TARGETS, "exclude_modules": "all_final_layer.*", **options}
    model = peft.get_peft_model(theirs, getattr(peft, name)(**options))
    draw_weights(model, lambda n: any(part in n for part in ("lora_", "hada_", "lokr_")))
    model.save_pretrained(tmp_path)

    count = 3 if options["target_modules"] != TARGETS else ALL_LINEARS
    assert_same_effect(ours, model, tmp_path / "adapter_model.safetensors", count)


def test_a_file_saved_by_diffusers_has_alpha_in_its_header(
    ours: ZImageTransformer, theirs: ZImageTransformer2DModel, tmp_path: Path
) -> None:
    from diffusers import ZImagePipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    theirs.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_v"]))
    draw_weights(theirs, lambda n: "lora_" in n)
    ZImagePipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(theirs),
        **_collate_lora_metadata({"transformer": theirs}),
    )

    assert_same_effect(ours, theirs, tmp_path / "pytorch_lora_weights.safetensors", 8)


LYCORIS: dict[str, dict[str, Any]] = {
    "LoCon": {"network_module": "locon"},
    "LoHa": {"network_module": "loha"},
    "LoKr": {"network_module": "lokr", "factor": 8},
    "LoKr of whole factors": {"network_module": "lokr", "full_matrix": True},
    "LoKr, both factors small": {"network_module": "lokr", "factor": 16, "decompose_both": True},
    "full": {"network_module": "full"},
    "DoRA by rows": {"network_module": "locon", "weight_decompose": True},
    "DoRA by columns": {"network_module": "locon", "weight_decompose": True, "wd_on_out": False},
    "DoRA on LoKr by rows": {"network_module": "lokr", "factor": 8, "weight_decompose": True},
    "DoRA on LoKr by columns": {
        "network_module": "lokr",
        "factor": 8,
        "weight_decompose": True,
        "wd_on_out": False,
    },
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_a_file_made_by_lycoris(
    ours: ZImageTransformer, theirs: ZImageTransformer2DModel, tmp_path: Path, kind: str
) -> None:
    from lycoris import LycorisNetwork

    names = [f"*.{target}" for target in TARGETS]
    LycorisNetwork.apply_preset({"target_name": names, "target_module": [], "use_fnmatch": True})
    network = LycorisNetwork(theirs, lora_dim=4, alpha=6, **LYCORIS[kind])
    network.apply_to()
    draw_weights(network, lambda n: True)
    network.save_weights(str(tmp_path / "l.safetensors"), torch.float32, {})

    assert_same_effect(ours, theirs, tmp_path / "l.safetensors", ALL_LINEARS)
