"""`inspect`: ask each family what a weights file is; what none knows is described by what it looks like."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from importlib import import_module, util
from pathlib import Path
from typing import Any

from shared.quant.checkpoint import INDEX_SUFFIX, SUFFIXES, Checkpoint, TensorInfo
from shared.quant.errors import CheckpointError
from shared.quant.formats import Layer, format_of, layers_of

# A tensor's name, or the end of one -> the model it gives away.
_LOOKS_LIKE = (
    ("double_blocks.0.img_attn.qkv.weight", "a FLUX or Chroma transformer"),
    ("transformer_blocks.0.attn.add_q_proj.weight", "an SD3 or FLUX transformer in diffusers naming"),
    ("joint_blocks.0.context_block.attn.qkv.weight", "a Stable Diffusion 3 transformer"),
    ("input_blocks.0.0.weight", "a Stable Diffusion 1, 2 or XL U-Net"),
    ("down_blocks.0.resnets.0.conv1.weight", "a Stable Diffusion U-Net in diffusers naming"),
    ("blocks.0.cross_attn.q.weight", "a Wan video transformer"),
    ("self_attn.q_proj.weight", "a language model"),
    ("text_model.embeddings.token_embedding.weight", "a CLIP text encoder"),
    ("lora_A.weight", "a LoRA for another model"),
    ("lora_down.weight", "a LoRA for another model"),
)

# Tensors of ComfyUI's files that hold what a layer's inputs were seen to reach, newer and older spelling.
_INPUT_SCALES = (".input_scale", ".scale_input")


def inspect_path(path: Path, families: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One description per checkpoint at `path`; of a folder, of every one in it and below.

    families: family id -> anything; models/<id>/inspection.py's describe() is asked where it exists. Reads headers
    only. For a single file errors are raised (CheckpointError); in a folder they are that file's `problems`.
    """
    if not path.is_dir():
        return [describe_checkpoint(Checkpoint.open(path), families)]
    found = []
    sharded = {shard for index in path.rglob(f"*{INDEX_SUFFIX}") for shard in _members(index)}
    files = [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p not in sharded]
    for file in sorted([*files, *path.rglob(f"*{INDEX_SUFFIX}")]):
        try:
            found.append(describe_checkpoint(Checkpoint.open(file), families))
        except CheckpointError as error:
            found.append(unreadable(file, error))
    if not found:
        raise CheckpointError(f"{path}: no {' and no '.join(sorted(SUFFIXES))} file in this folder or below.")
    return found


def unreadable(path: Path, error: CheckpointError) -> dict[str, Any]:
    """The description of a file that is no checkpoint."""
    return {"file": str(path), "kind": "unreadable", "summary": error.message, "problems": [str(error)]}


def describe_checkpoint(checkpoint: Checkpoint, families: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able: file, bytes, parameters, tensors, calibration, and what the family that knows it says."""
    description = next((d for f in families if (d := _ask(f, checkpoint)) is not None), None)
    return {
        "file": str(checkpoint.path),
        "files": [str(f) for f in checkpoint.files],
        "bytes": checkpoint.nbytes,
        "tensors": len(checkpoint.tensors),
        "parameters": _parameters(checkpoint),
        "metadata": {k: v if len(v) <= 200 else f"{v[:200]}..." for k, v in checkpoint.metadata.items()},
        "calibration": _calibration(checkpoint),
    } | (description or _unknown(checkpoint.tensors))


def _calibration(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the file says of how its packing was fitted to inputs: by this program, llama.cpp, or scales for inputs."""
    said: dict[str, Any] = {
        key.removeprefix("quantize."): value
        for key, value in checkpoint.metadata.items()
        if key.startswith("quantize.imatrix.")
    }
    if (ours := checkpoint.metadata.get("calibration")) is not None:
        said["drawn with"] = ours
    # quanto writes input scales of 1 into every file; they say nothing.
    modules = [name.removesuffix(end) for name in checkpoint.tensors for end in _INPUT_SCALES if name.endswith(end)]
    if scaled := [m for m in modules if f"{m}.weight._data" not in checkpoint.tensors]:
        said["layers with a scale for their inputs"] = len(scaled)
    return said


def _parameters(checkpoint: Checkpoint) -> int:
    """Numbers of the model, however they are packed: scales, codes and markers are none."""
    try:
        layers = layers_of(checkpoint, checkpoint.tensors).values()
    except CheckpointError:  # a marker that cannot be read
        return sum(t.numel for t in checkpoint.tensors.values())
    return sum(_numbers(layer) for layer in layers)


def _numbers(layer: Layer) -> int:
    try:
        packed = format_of(layer)
        matrix = math.prod(packed.shape(layer)) if packed else 0
    except CheckpointError:  # damaged, or packed in an unknown way: what is stored is all there is to count
        packed, matrix = None, 0
    return matrix + sum(t.numel for suffix, t in layer.tensors.items() if packed is None or suffix == "bias")


def _ask(family: str, checkpoint: Checkpoint) -> dict[str, Any] | None:
    name = f"models.{family}.inspection"
    if util.find_spec(name) is None:
        return None
    answer: dict[str, Any] | None = import_module(name).describe(checkpoint)
    return answer


def _unknown(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    looks = next((words for mark, words in _LOOKS_LIKE if any(n.endswith(mark) for n in tensors)), None)
    first = ", ".join(list(tensors)[:3]) or "no tensors"
    return {
        "kind": "other",
        "summary": f"looks like {looks}" if looks else f"unknown; its tensors begin with {first}",
        "formats": dict(Counter(t.dtype for t in tensors.values())),
        "problems": [],
    }


def _members(index: Path) -> list[Path]:
    try:
        return list(Checkpoint.open(index).files)
    except CheckpointError:
        return []
