"""Convert a model's file into another format layer by layer: memory holds one layer, whatever the model's size.

    source layers --(dequantized where packed)--> rows of a new layer --Target.quantize--> its tensors --> writer
                                                        |                                      |
                                                        +----- relative error, read back <-----+

Each new layer is read back by the format's own reader before it is written, so a file that converts is one that loads,
and what the report says of a layer is what a program will compute with. LoRAs to be merged are added to the source's
rows in float32; an error-correction LoRA (error_lora.py) is written in step with the file.

Rooms, from what is said to what is done: jobs.py (the words), planning.py (which format and name), sizes.py (how
large), layers.py (one layer), read_back.py (its error), files.py (the run).
"""

from shared.quant.convert.files import convert, convert_to_gguf
from shared.quant.convert.jobs import Conversion, Job, LayerReport, Means, Merge, Model, OnProgress, Place, Places
from shared.quant.convert.layers import sampled
from shared.quant.convert.planning import plan_conversion
from shared.quant.convert.sizes import expected_bytes, output_files

__all__ = [
    "Conversion",
    "Job",
    "LayerReport",
    "Means",
    "Merge",
    "Model",
    "OnProgress",
    "Place",
    "Places",
    "convert",
    "convert_to_gguf",
    "expected_bytes",
    "output_files",
    "plan_conversion",
    "sampled",
]
