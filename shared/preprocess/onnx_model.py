"""Models in ONNX files, run by onnxruntime, which is asked for only when one is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.quant.errors import CheckpointError, UserError

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[np.float32]]

PACKAGE = "onnxruntime==1.31.1"  # as in requirements-optional.txt


class OnnxModel:
    """A network in an ONNX file with one picture as input, on the CPU.

    input_size: (height, width) that the file demands, None where it takes any.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError when onnxruntime is not installed, CheckpointError for a file that is no such network."""
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(
                "Pose and HED pictures are made by models that need the package onnxruntime.",
                f"Install it beside the others: .venv/bin/python -m pip install {PACKAGE}",
            ) from error
        state = onnxruntime.capi.onnxruntime_pybind11_state
        broken = (state.Fail, state.InvalidProtobuf, state.InvalidGraph, state.InvalidArgument, state.NotImplemented)
        try:
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except (*broken, state.NoSuchFile) as error:
            raise CheckpointError(
                f"{path}: not a model that onnxruntime can read ({str(error)[:200]}).", "Delete it, it is fetched anew."
            ) from error
        self.path = path
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            shapes = {given.name: given.shape for given in inputs}
            raise CheckpointError(f"{path}: its inputs are {shapes}, expected one of (1, 3, height, width).")
        self._input = inputs[0]
        height, width = inputs[0].shape[2:]
        self.input_size = (height, width) if isinstance(height, int) and isinstance(width, int) else None

    def __call__(self, picture: Numbers) -> list[Numbers]:
        """The outputs for (3, H, W) float32, in the file's order. Raises CheckpointError when the file refuses it."""
        import onnxruntime

        state = onnxruntime.capi.onnxruntime_pybind11_state
        feeds: Mapping[str, Numbers] = {self._input.name: picture[None]}
        try:
            found: list[Numbers] = self._session.run(None, feeds)
        except (state.Fail, state.InvalidArgument, state.RuntimeException) as error:
            raise CheckpointError(
                f"{self.path}: it does not take a picture of {picture.shape} ({str(error)[:200]}).",
                "It is another model than the one expected.",
            ) from error
        return found
