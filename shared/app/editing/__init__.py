"""From given pictures to drawings and back: what each pass shows the model, and how the result is put together.

    image to image   fit the picture to the size, draw from it
    inpainting       cut the mask's surroundings out, draw them at the chosen resolution, scale them back, fade them in
    outpainting      the same, on a canvas with margins, which are the mask
    second pass      enlarge the drawing, draw from that
    tiles            enlarge the picture, draw it tile by tile, blend the tiles where they overlap

Outside a mask (grown and feathered) the given picture's pixels come back unchanged, every bit of them.
Mistakes in the pictures are told by `open_edit`, before a model is loaded.

Rooms: opening.py (what is given), drawing_pass.py (what the model is asked for), edit.py (the way from one to the
other), inpainting.py and tiles.py (where things lie).
"""

from shared.app.editing.drawing_pass import Draw, Pass
from shared.app.editing.edit import INPUTS, Edit
from shared.app.editing.opening import open_edit

__all__ = ["INPUTS", "Draw", "Edit", "Pass", "open_edit"]
