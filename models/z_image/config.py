"""Sizes of a Z-Image transformer, read off a checkpoint's tensor shapes (never off a file's name)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

# What no tensor shape shows. Values of the published 6B model: Tongyi-MAI/Z-Image src/config/model.py.
AXES_LENS = (1536, 512, 512)
AXES_DIMS = (32, 48, 48)
ROPE_THETA = 256.0
TIME_SCALE = 1000.0
NORM_EPS = 1e-5

# Both streams are padded to a multiple of this with learned, attended pad tokens.
SEQUENCE_MULTIPLE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """Sizes of one S3-DiT; the defaults are the published 6B model (6,154,908,736 parameters)."""

    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    in_channels: int = 16
    patch_size: int = 2
    cap_feat_dim: int = 2560
    ffn_dim: int = 10240
    time_dim: int = 256
    time_hidden_dim: int = 1024
    axes_dims: tuple[int, ...] = AXES_DIMS
    axes_lens: tuple[int, ...] = AXES_LENS
    rope_theta: float = ROPE_THETA
    t_scale: float = TIME_SCALE
    norm_eps: float = NORM_EPS
    has_second_time: bool = False  # TwinFlow: an embedding of the time that a step is for
    siglip_feat_dim: int = 0  # Omni and Edit: width of SigLIP's features; 0 in all others

    def __post_init__(self) -> None:
        sizes = ("dim", "n_layers", "n_heads", "in_channels", "cap_feat_dim", "ffn_dim", "time_dim", "time_hidden_dim")
        if empty := [name for name in sizes if getattr(self, name) < 1]:
            raise ValueError(f"{empty[0]} above 0")
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if sum(self.axes_dims) != self.head_dim:
            raise ValueError(f"axes_dims {self.axes_dims} must sum to the head size {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one image token: patch height x patch width x channels."""
        return self.patch_size * self.patch_size * self.in_channels

    def with_json(self, text: str) -> TransformerConfig:
        """Overlay what a header's `config` JSON (diffusers' config.json) says and no tensor shape can.

        Raises ValueError or TypeError for a text or values that cannot be used.
        """
        try:
            given: dict[str, Any] = json.loads(text)
        except RecursionError as error:
            raise ValueError("its JSON is nested too deeply") from error
        known = ("axes_dims", "axes_lens", "rope_theta", "t_scale", "norm_eps")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values.update({k: tuple(given[k]) if isinstance(given[k], list) else given[k] for k in known if k in given})
        return TransformerConfig(**values)

    def as_diffusers(self) -> dict[str, Any]:
        """The same sizes as diffusers' ZImageTransformer2DModel config.json spells them."""
        return {
            "_class_name": "ZImageTransformer2DModel",
            "all_patch_size": [self.patch_size],
            "all_f_patch_size": [1],
            "in_channels": self.in_channels,
            "dim": self.dim,
            "n_layers": self.n_layers,
            "n_refiner_layers": self.n_refiner_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_heads,
            "norm_eps": self.norm_eps,
            "qk_norm": True,
            "cap_feat_dim": self.cap_feat_dim,
            "rope_theta": self.rope_theta,
            "t_scale": self.t_scale,
            "axes_dims": list(self.axes_dims),
            "axes_lens": list(self.axes_lens),
            **({"siglip_feat_dim": self.siglip_feat_dim} if self.siglip_feat_dim else {}),
        }


_HEAD_NORM = "layers.0.attention.q_norm.weight"
_MATRICES = (
    "x_embedder.weight",
    "cap_embedder.1.weight",
    "layers.0.feed_forward.w2.weight",
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.2.weight",
)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> TransformerConfig:
    """Read the sizes from tensor shapes under our names (see keys.py).

    Raises KeyError when a tensor that every Z-Image transformer has is absent, ValueError when it has another form.
    """
    for name in _MATRICES:
        if len(shapes[name]) != 2:
            raise ValueError(f"{name} as a matrix")
    if not shapes[_HEAD_NORM]:
        raise ValueError(f"{_HEAD_NORM} as a vector")
    dim, patch_dim = shapes["x_embedder.weight"]
    head_dim = shapes[_HEAD_NORM][0]
    axes_dims = AXES_DIMS if head_dim == sum(AXES_DIMS) else _split_head(head_dim)
    return TransformerConfig(
        dim=dim,
        n_layers=_count(shapes, "layers."),
        n_refiner_layers=_count(shapes, "noise_refiner."),
        n_heads=dim // head_dim,
        in_channels=patch_dim // 4,
        cap_feat_dim=shapes["cap_embedder.1.weight"][1],
        ffn_dim=shapes["layers.0.feed_forward.w2.weight"][1],
        time_dim=shapes["t_embedder.mlp.2.weight"][0],
        time_hidden_dim=shapes["t_embedder.mlp.0.weight"][0],
        axes_dims=axes_dims,
        has_second_time="t_embedder_2.mlp.0.weight" in shapes,
        siglip_feat_dim=_siglip_width(shapes),
    )


def _siglip_width(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """0 where no tensor is of the parts for reference pictures."""
    if not any(name.startswith("siglip_") for name in shapes):
        return 0
    if len(shapes["siglip_embedder.1.weight"]) != 2:
        raise ValueError("siglip_embedder.1.weight as a matrix")
    return shapes["siglip_embedder.1.weight"][1]


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return 1 + max((int(k[len(prefix) :].split(".")[0]) for k in shapes if k.startswith(prefix)), default=-1)


def _split_head(head_dim: int) -> tuple[int, ...]:
    """Axes of a head that is not 128 wide, in the published proportion 2 : 3 : 3, each even."""
    first = head_dim // 4 // 2 * 2
    second = (head_dim - first) // 2 // 2 * 2
    return (first, second, head_dim - first - second)
