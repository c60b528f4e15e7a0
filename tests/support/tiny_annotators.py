"""Tiny networks in the files that preprocessors read: made with the libraries that make the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

POINTS = 133
DETECTOR_SIDE = 64  # pixels: grids of 8, 4 and 2 cells a side
POSE_ROWS, POSE_COLUMNS = 64, 48


def write_hed(path: Path, size: int | None = None) -> Path:
    """Edges are 1 where the picture is bright: the mean of its channels. size: of a file that takes one size only."""
    sides = ["height", "width"] if size is None else [size, size]
    node = helper.make_node("ReduceMean", ["input"], ["output"], axes=[1], keepdims=1)
    return _write(path, [node], ("input", [1, 3, *sides]), {"output": [1, 1, *sides]}, {})


def write_detector(path: Path, box: tuple[float, float, float, float], sure: float = 0.9) -> Path:
    """Finds one person in the box (left, top, right, bottom in pixels of its square of DETECTOR_SIDE), and a cat."""
    cells = [(x, y, s) for s in (8, 16, 32) for y in range(DETECTOR_SIDE // s) for x in range(DETECTOR_SIDE // s)]
    answer = np.zeros((1, len(cells), 85), np.float32)
    column, row, stride = cells[17]
    left, top, right, bottom = box
    answer[0, 17, :2] = (left + right) / 2 / stride - column, (top + bottom) / 2 / stride - row
    answer[0, 17, 2:4] = np.log([(right - left) / stride, (bottom - top) / stride])
    answer[0, 17, 4:6] = sure, 1
    answer[0, 40, 4] = answer[0, 40, 5 + 15] = 1  # the cat
    shape = [1, 3, DETECTOR_SIDE, DETECTOR_SIDE]
    return _write(path, _constant("output"), ("images", shape), {"output": list(answer.shape)}, {"output": answer})


def write_estimator(path: Path, points: dict[int, tuple[int, int]], sure: float = 0.8) -> Path:
    """Finds the points (number -> column, row of what it is shown), and is not sure of any other."""
    across = np.zeros((1, POINTS, 2 * POSE_COLUMNS), np.float32)
    down = np.zeros((1, POINTS, 2 * POSE_ROWS), np.float32)
    for number, (column, row) in points.items():
        across[0, number, 2 * column] = sure
        down[0, number, 2 * row] = sure
    outputs = {"simcc_x": across, "simcc_y": down}
    nodes = [node for name in outputs for node in _constant(name)]
    shapes = {name: list(values.shape) for name, values in outputs.items()}
    return _write(path, nodes, ("input", [1, 3, POSE_ROWS, POSE_COLUMNS]), shapes, outputs)


def write_depth(folder: Path) -> tuple[Path, Path]:
    """A Depth Anything of random weights: (config.json, model.safetensors)."""
    import torch
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=4,
    )  # fmt: skip
    torch.manual_seed(4)
    model = DepthAnythingForDepthEstimation(config)
    with torch.no_grad():  # made of zeros and ones at first; and a last ReLU that would cut everything to 0
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        model.head.conv3.bias.fill_(5.0)
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "depth_anything"
    return folder / "config.json", folder / "model.safetensors"


def _constant(name: str) -> list[onnx.NodeProto]:
    """An answer that is stored, whatever the picture."""
    return [helper.make_node("Identity", [f"{name}_stored"], [name])]


def _write(
    path: Path,
    nodes: list[onnx.NodeProto],
    given: tuple[str, list[int | str]],
    outputs: dict[str, list[int | str]],
    stored: dict[str, np.ndarray],
) -> Path:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(given[0], TensorProto.FLOAT, given[1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(values, f"{name}_stored") for name, values in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path
