"""`compare`: one model in many weight formats, the same prompts and seeds with each, and how far they stray.

    the preset's transformer -> each format's file (kept in OUTPUT/weights) -> pictures -> differences from the first

The first column is the preset's own file, the reference. A LoRA is judged by what it changes in the picture (with minus
without): that change in all pictures, correlated with the change in the reference's; and the same for the latents,
which a decoder that saturates cannot distort.

Rooms, as a comparison goes: request.py, contenders.py (the models), run.py (their pictures), figures.py and scoring.py
(how far they stray, and whether they keep what prompts promise), result.py.
"""

from shared.app.compare.contenders import format_names
from shared.app.compare.request import ALL, DEFAULT_COUNT, CompareRequest
from shared.app.compare.result import Comparison, Row
from shared.app.compare.run import compare

__all__ = ["ALL", "DEFAULT_COUNT", "CompareRequest", "Comparison", "Row", "compare", "format_names"]
