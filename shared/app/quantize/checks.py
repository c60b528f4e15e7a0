"""What cannot be asked of `quantize`, said before anything is read or written."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from shared.app.quantize.request import QuantizeRequest
from shared.quant.checkpoint import INDEX_SUFFIX
from shared.quant.error_lora import find_beside, path_beside
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.quant.convert import Conversion


def check_paths(request: QuantizeRequest) -> None:
    """Whether the output has a name that says what it is, and nothing stands there that is to be kept."""
    output, suffixes = request.output, (".safetensors", ".sft", ".gguf")
    if request.diffusers and output.suffix.lower() in suffixes:
        raise UserError(f"--output {output}: with --diffusers it is a folder.", "Give a name without an ending.")
    if not request.diffusers and output.suffix.lower() not in suffixes:
        raise UserError(
            f"--output {output}: a name that ends in .safetensors or .gguf is needed.",
            "With --diffusers it is the name of a folder.",
        )
    output = request.file
    index = output.with_name(f"{output.stem}{INDEX_SUFFIX}")
    if not (output.exists() or index.exists()):
        return
    if output.is_dir() or (output.exists() and request.source.exists() and output.samefile(request.source)):
        raise UserError(f"--output {output} is a folder, or the file to be converted.", "Choose another name.")
    if not request.overwrite:
        raise UserError(f"{output} is there already.", "Choose another name, or add --overwrite.")


def check_lora_paths(request: QuantizeRequest) -> None:
    """Whether LoRAs to be merged are there, and no error-correction LoRA is left that fits another file."""
    for path, _ in request.merge_loras:
        if not path.is_file():
            raise UserError(f"--merge-lora {path}: there is no such file.", "Check the path.")
    beside = path_beside(request.output)
    if not request.error_lora_rank:
        if find_beside(request.output) is not None and request.overwrite:
            raise UserError(
                f"{beside} corrects the errors of the file that is to be replaced, and would spoil the new one.",
                "Delete it, or write a new one with --error-lora.",
            )
    elif beside.exists() and not request.overwrite:
        raise UserError(f"{beside} is there already.", "Choose another name, or add --overwrite.")


def check_control(request: QuantizeRequest) -> None:
    """Whether nothing is asked that takes a transformer."""
    flags = {
        "--merge-lora": bool(request.merge_loras),
        "--error-lora": bool(request.error_lora_rank),
        "--calibrate": bool(request.calibrate),
    }
    for flag in (flag for flag, is_given in flags.items() if is_given):
        raise UserError(f"{flag} is for transformers, and {request.source.name} is a ControlNet.", "Leave it out.")


def check_numbers(request: QuantizeRequest, is_auto: bool) -> None:
    """Whether numbers are in range and come with what they are about. is_auto: the recipe leaves formats open."""
    if request.calibrate < 0:
        raise UserError(f"--calibrate {request.calibrate}: a number of pictures, 8 for example.")
    if request.learned_rounding and not request.calibrate:
        raise UserError("--learned-rounding learns from what layers are fed with.", "Add --calibrate 8.")
    if request.prompts and not request.calibrate:
        raise UserError("--prompts are for the pictures of --calibrate.", "Add --calibrate 8.")
    if is_auto != bool(request.target_size):
        raise UserError(
            f"{request.recipe} leaves formats open, which takes a size." if is_auto
            else f"{request.recipe} leaves no format open, so there is nothing to do for a --target-size.",
            "Add --target-size 4.8GB, for example." if is_auto else "Leave it out, or use --recipe auto.",
        )  # fmt: skip


def check_flags(request: QuantizeRequest, conversion: Conversion, is_auto: bool) -> None:
    """Whether the formats have what the flags are about. is_auto: formats are still to be chosen, SVDQ may be one."""
    if request.rank is not None and not ((conversion.has_rank or is_auto) and request.rank > 0):
        raise UserError(f"--rank {request.rank}: a positive number, for SVDQ formats only.", "Leave it out.")
    if request.learned_rounding and not any(job.target and job.target.has_learned_rounding for job in conversion.jobs):
        raise UserError("--learned-rounding: none of the formats here offers it; SVDQ formats do.", "Leave it out.")
    if request.error_lora_rank < 0:
        raise UserError(f"--error-lora {request.error_lora_rank}: a positive rank, 32 for example.")
    if request.error_lora_rank and not conversion.formats:
        raise UserError("--error-lora: no layer is packed, so there is no error to correct.", "Leave it out.")
    laid_out = {
        "--shard-size": bool(request.shard_size),
        "--diffusers": request.diffusers,
        "--text-encoder": request.text_encoder is not None,
        "--vae": request.vae is not None,
    }
    asked = [flag for flag, is_given in laid_out.items() if is_given]
    if asked and request.is_gguf:
        raise UserError(f"{asked[0]}: a GGUF file is one file and holds one model.", "Leave it out.")
    if asked and request.error_lora_rank:
        raise UserError(f"{asked[0]}: an error-correction LoRA stands beside a file of one model.", "Leave one out.")
    parts = [flag for flag in asked if flag in ("--text-encoder", "--vae")]
    if parts and (request.diffusers or conversion.naming != "official"):
        raise UserError(
            f"{parts[0]} makes a ComfyUI checkpoint, which has ComfyUI's names; "
            f"{'--diffusers' if request.diffusers else request.recipe} has others.",
            "Leave it out, or take bf16, fp16, fp32, fp8_scaled, mxfp8, nvfp4 or int8_comfy.",
        )


def check_keep(request: QuantizeRequest, conversion: Conversion) -> None:
    """Whether every --keep names a layer."""
    names = [name for job in conversion.jobs for name in job.place.official]
    for pattern in request.keep:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise UserError(
                f"--keep {pattern} fits no layer's whole name; they look like {names[len(names) // 2]}.",
                r"Write layers\.0\..* for the first block, for example.",
            )
