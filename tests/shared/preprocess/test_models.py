"""Preprocessors with a model: the real reading code on tiny networks whose answers are known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DepthAnythingForDepthEstimation

from shared.preprocess import FILES, Preprocessor, process
from shared.preprocess.onnx_model import OnnxModel
from shared.preprocess.pose import MARGIN, find_people, find_points
from shared.quant.errors import CheckpointError, UserError
from tests.support.tiny_annotators import (
    DETECTOR_SIDE,
    POSE_COLUMNS,
    POSE_ROWS,
    write_depth,
    write_detector,
    write_estimator,
    write_hed,
)

NOSE, LEFT_SHOULDER, RIGHT_SHOULDER = 0, 5, 6


def picture(height: int = 96, width: int = 64) -> np.ndarray:
    """Black, with a white square."""
    result = np.zeros((height, width, 3), np.uint8)
    result[16:48, 16:48] = 255
    return result


# ---------------------------------------------------------------------------------------------- HED


@pytest.mark.parametrize("size", [None, 64])
def test_hed_answers_come_back_at_the_pictures_size(tmp_path: Path, size: int | None) -> None:
    result = process("hed", picture(), (write_hed(tmp_path / "hed.onnx", size),))

    assert (result.shape, result.dtype) == ((96, 64, 3), np.uint8)
    assert result[20:44, 20:44].min() == 255  # the tiny network answers with brightness
    assert result[60:].max() == 0


def test_hed_takes_sizes_that_are_no_multiple_of_its_cells(tmp_path: Path) -> None:
    result = process("hed", picture(93, 61), (write_hed(tmp_path / "hed.onnx"),))

    assert result.shape == (93, 61, 3)
    assert abs(int(result[32, 32, 0]) - 255) <= 2


# ---------------------------------------------------------------------------------------------- depth


def test_depth_is_what_transformers_finds_near_bright(tmp_path: Path) -> None:
    files = write_depth(tmp_path)
    shown = picture(28, 42)  # what the network is shown: its own size, multiples of its patches
    model = DepthAnythingForDepthEstimation.from_pretrained(tmp_path).eval()
    numbers = (shown / 255 - np.array((0.485, 0.456, 0.406))) / np.array((0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = model(torch.tensor(numbers, dtype=torch.float32).permute(2, 0, 1)[None]).predicted_depth[0].numpy()
    expected = (expected - expected.min()) / np.ptp(expected) * 255

    result = process("depth", shown, files)

    assert (result.shape, result.dtype) == (shown.shape, np.uint8)
    assert np.abs(result[:, :, 0] - expected).max() <= 0.51
    assert (result.min(), result.max()) == (0, 255)


def test_depth_takes_any_size(tmp_path: Path) -> None:
    assert process("depth", picture(50, 33), write_depth(tmp_path)).shape == (50, 33, 3)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config, weights = write_depth(tmp_path)
    state = load_file(weights)
    state.pop("head.conv3.weight")
    save_file(state, weights)

    with pytest.raises(CheckpointError, match=r"1 tensors are missing.*head\.conv3\.weight"):
        process("depth", picture(), (config, weights))


# ---------------------------------------------------------------------------------------------- pose


def test_people_are_found_where_the_detector_says_in_pixels_of_the_picture(tmp_path: Path) -> None:
    model = OnnxModel(write_detector(tmp_path / "d.onnx", box=(8, 16, 24, 48)))

    boxes = find_people(model, picture(2 * DETECTOR_SIDE, DETECTOR_SIDE))  # shown at half its size

    np.testing.assert_allclose(boxes, [[16, 32, 48, 96]], rtol=1e-5)


def test_nobody_is_found_where_the_detector_is_unsure_and_the_picture_is_black(tmp_path: Path) -> None:
    files = (
        write_detector(tmp_path / "d.onnx", (8, 16, 24, 48), 0.2),
        write_estimator(tmp_path / "e.onnx", {0: (9, 9)}),
    )

    assert not process("pose", picture(), files).any()


def test_points_are_where_the_estimator_says_in_pixels_of_the_picture(tmp_path: Path) -> None:
    model = OnnxModel(write_estimator(tmp_path / "e.onnx", {NOSE: (POSE_COLUMNS // 2, 0)}))
    box = np.array([20.0, 10.0, 20 + 24, 10 + 64])  # narrower than what the network is shown, so its height decides

    points, sure = find_points(model, picture(), box)

    np.testing.assert_allclose(points[NOSE], [32, 42 - MARGIN * 64 / 2], atol=1e-6)
    assert sure[NOSE] == pytest.approx(0.8)
    assert sure[1:].max() == 0


def test_a_figure_is_drawn_in_openposes_colours(tmp_path: Path) -> None:
    # The box is the whole square, so MARGIN shows it smaller: a point at the middle stays at the middle.
    box = (0, 0, DETECTOR_SIDE * 0.75, DETECTOR_SIDE)
    points = {
        NOSE: (POSE_COLUMNS // 2, POSE_ROWS // 2),
        LEFT_SHOULDER: (POSE_COLUMNS // 2 + 8, POSE_ROWS // 2 + 8),
        RIGHT_SHOULDER: (POSE_COLUMNS // 2 - 8, POSE_ROWS // 2 + 8),
    }
    files = (write_detector(tmp_path / "d.onnx", box), write_estimator(tmp_path / "e.onnx", points))
    shown = np.zeros((512, 512, 3), np.uint8)
    scale = 512 / DETECTOR_SIDE * MARGIN  # pixels of the picture for one of the estimator's
    middle = np.array([512 * 0.75 / 2, 512 / 2])

    result = process("pose", shown, files)

    def colour_at(across: float, down: float) -> tuple[int, ...]:
        x, y = (middle + scale * np.array([across, down])).astype(int)
        return tuple(int(part) for part in result[y, x])

    assert colour_at(0, 0) == (255, 0, 0)  # nose
    assert colour_at(0, 8) == (255, 85, 0)  # neck: between the shoulders
    assert colour_at(-8, 8) == (255, 170, 0)  # right shoulder
    assert colour_at(8, 8) == (85, 255, 0)  # left shoulder
    assert colour_at(-4, 8) == (153, 0, 0)  # neck to right shoulder, the first limb, darker
    assert colour_at(0, 4) == (0, 0, 153)  # neck to nose
    assert colour_at(20, 0) == (0, 0, 0)


def test_two_files_in_the_wrong_order_are_told_apart(tmp_path: Path) -> None:
    files = (write_estimator(tmp_path / "e.onnx", {0: (9, 9)}), write_detector(tmp_path / "d.onnx", (8, 16, 24, 48)))

    with pytest.raises(CheckpointError, match=r"e\.onnx: answered with"):
        process("pose", picture(), files)


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"x" * 1000])
def test_a_file_that_is_no_onnx_network_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hed.onnx").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"hed\.onnx"):
        process("hed", picture(), (tmp_path / "hed.onnx",))


def test_without_onnxruntime_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    with pytest.raises(UserError, match=r"pip install onnxruntime=="):
        process("hed", picture(), (write_hed(tmp_path / "hed.onnx"),))


def test_the_pinned_onnxruntime_is_the_one_that_the_message_names() -> None:
    from shared.preprocess.onnx_model import PACKAGE

    for name in ("requirements-optional.txt", "requirements-dev.txt"):
        assert PACKAGE in (Path(__file__).parents[3] / name).read_text(encoding="utf-8").splitlines()


def test_missing_files_are_named() -> None:
    with pytest.raises(UserError, match=r'"pose" needs files.*dw-ll_ucoco_384\.onnx'):
        process("pose", picture(), (Path("yolox_l.onnx"),))


def test_the_model_is_opened_once_for_several_pictures(tmp_path: Path) -> None:
    path = write_hed(tmp_path / "hed.onnx")
    preprocessor = Preprocessor("hed", (path,))
    first = preprocessor(picture())
    path.unlink()

    assert np.array_equal(preprocessor(picture()), first)


def test_no_model_comes_as_a_pickle() -> None:
    suffixes = {Path(file.url).suffix for files in FILES.values() for file in files}

    assert suffixes <= {".onnx", ".safetensors", ".json"}
