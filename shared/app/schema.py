"""The keys that presets, settings files and `--set` may hold, their values, and how mistakes are told.

Checked by hand rather than by a validation library: the messages must name the file, the key and the closest
known key, and `wgp.py presets` must answer without importing anything large.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.app.host_keys import HOST_MODEL_KEYS, HOST_SETTING_KEYS, RECORD_KEYS
from shared.quant.errors import UserError

_LARGEST = int(sys.float_info.max)  # JSON's whole numbers may be longer than that
SETTINGS_VERSION = 2.74  # schema of Wan2GP 12.60, whose key names are used


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value may be: in words, as a test, and (if it can be typed as text) how to read it."""

    words: str
    accepts: Callable[[Any], bool]
    from_text: Callable[[str], Any] | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """A known key: kind of value, meaning in one line, and value when nothing else is said."""

    kind: Kind
    meaning: str
    default: Any = None


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value)


def _is_number_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_number(item) for item in value)


def _numbers_from_text(text: str) -> list[float]:
    return [float(part) for part in re.split(r"[,\s]+", text.strip(" []")) if part]


def _is_links(value: Any) -> bool:
    return _is_text_list(value) or (isinstance(value, str) and value != "")


def _is_module_list(value: Any) -> bool:
    def is_module(item: Any) -> bool:
        return _is_links(item) or (isinstance(item, dict) and _is_links(item.get("URLs")))

    if isinstance(value, dict):  # named modules, which another preset picks as "id#name"
        return all(_is_links(item) for item in value.values())
    return _is_links(value) or (isinstance(value, list) and all(is_module(item) for item in value))


def _is_multiplier_list(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) or _is_number(item) for item in value)
    )


def _is_weights(value: Any) -> bool:
    def is_size(item: Any) -> bool:
        return _is_number(item) and item > 0

    def is_list(items: Any) -> bool:
        return isinstance(items, list) and items != [] and all(map(is_size, items))

    def fits(place: str, item: Any) -> bool:
        if is_size(item) or is_list(item):
            return True
        return (
            place == "modules" and isinstance(item, list) and item != [] and all(is_size(i) or is_list(i) for i in item)
        )

    return (
        isinstance(value, dict)
        and value.keys() <= {"transformer", "modules", "text_encoder", "VAE"}
        and all(fits(place, item) for place, item in value.items())
    )


def _is_attention_rules(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(mode, str) and CONDITION.fullmatch(condition) for condition, mode in value.items()
    )


def _is_configs(value: Any) -> bool:
    if isinstance(value, dict):
        return all(name.startswith("_") or isinstance(config, dict) for name, config in value.items())
    return isinstance(value, str)


def _flag_from_text(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]


# "<89", ">=75&<90", "86+89": comparisons with the compute capability as major * 10 + minor; & binds before +.
_COMPARISON = r"\s*(?:<=|>=|<|>|=)?\s*\d+\s*"
CONDITION = re.compile(f"{_COMPARISON}(?:[&+]{_COMPARISON})*")

TEXT = Kind("text", _is_text, str)
WHOLE = Kind("a whole number", _is_whole, int)
NUMBER = Kind("a number", _is_number, float)
LIMIT = Kind("a number, or true for 1", lambda value: _is_number(value) or isinstance(value, bool), float)
FLAG = Kind("true or false", lambda value: value in (True, False), _flag_from_text)
NUMBERS = Kind("a list of numbers, or a text of them with commas between", _is_number_list, _numbers_from_text)
PROMPT_MODE = Kind("FG, G or PG", lambda value: _is_text(value) or _is_whole(value), str)
TEXT_LIST = Kind("a list of texts", _is_text_list)
LINKS = Kind("a list of URLs or paths, or the id of another preset", _is_links)
MODULES = Kind(
    "a list of modules (each a list of URLs, a preset's id or an object with URLs), or a preset's id",
    _is_module_list,
)
MULTIPLIERS = Kind("a list of numbers or texts, or one text", _is_multiplier_list, str)
ATTENTION = Kind('an object like {"<89": "sdpa"}: condition on the compute capability -> mode', _is_attention_rules)
GIGABYTES = Kind(
    "an object of sizes above 0 (or lists of them) by transformer, modules, text_encoder and VAE", _is_weights
)
CONFIGS = Kind("an object of named sets of model keys, or the id of another preset", _is_configs)
# Only modules of the program's own: a preset from elsewhere must not choose what is imported.
SCORER = Kind(
    'a module of the folder training, "training.NAME"',
    lambda value: _is_text(value) and re.fullmatch(r"training\.\w+", value) is not None,
)
DTYPE = Kind('"bf16" or "fp16"', lambda value: value in ("bf16", "fp16"))

MODEL_KEYS: Mapping[str, Key] = {
    "name": Key(TEXT, "what the preset is called in lists"),
    "architecture": Key(TEXT, "which architecture the weights are for (required)"),
    "description": Key(TEXT, "one or two sentences for the person who chooses"),
    "URLs": Key(LINKS, "where the transformer's weights are: alternatives of one file, the plain one first"),
    "modules": Key(MODULES, "further weight files that belong to the transformer (ControlNet)"),
    "text_encoder_URLs": Key(LINKS, "text encoder weights instead of the family's"),
    "text_encoder_folder": Key(TEXT, "folder of the text encoder's tokenizer and configuration"),
    "VAE_URLs": Key(LINKS, "VAE weights instead of the family's"),
    "gigabytes": Key(GIGABYTES, "what its files weigh, for the plan before a download; see below"),
    "preload_URLs": Key(LINKS, "files to download in any case"),
    "loras": Key(LINKS, "LoRA files that always apply, before the user's"),
    "loras_multipliers": Key(MULTIPLIERS, "their strengths, in the same order (1 where missing)"),
    "attention": Key(ATTENTION, "attention modes for certain GPUs; the first condition that holds is used"),
    "unsafe_attention": Key(TEXT_LIST, "attention modes that draw this model wrong and are refused"),
    "dtype": Key(DTYPE, "number type to compute in"),
    "configs": Key(CONFIGS, "named sets of model keys that replace those above when chosen"),
    "visible": Key(FLAG, "false: usable by id, but not listed", True),
    "scorer": Key(SCORER, "reads what this model draws; `wgp.py compare` takes its prompts and its verdicts"),
    "guidance_optional": Key(FLAG, "offer guidance on the page though the model does without", False),
    "unified_solver": Key(FLAG, "weights distilled for the few-step unified solver (TwinFlow)", False),
}

SETTING_KEYS: Mapping[str, Key] = {
    "prompt": Key(TEXT, "what to draw; may hold notes, macros, choices and wildcards (docs/prompts.md)", ""),
    "multi_prompts_gen_type": Key(
        PROMPT_MODE, "what of the text is one prompt: FG all of it, G each line, PG each paragraph", "FG"
    ),
    "long_prompt": Key(TEXT, "a prompt of more than 512 tokens: keep (up to 1504), cut or refuse", "keep"),
    "negative_prompt": Key(TEXT, "what to avoid; works with guidance or NAG", ""),
    "resolution": Key(TEXT, 'size in pixels, "WIDTHxHEIGHT", both multiples of 16', "1024x1024"),
    "num_inference_steps": Key(WHOLE, "steps of the sampler; most take one pass through the transformer each", 8),
    "guidance_scale": Key(NUMBER, "classifier-free guidance: pos + scale * (pos - neg); 0 is off", 0.0),
    "seed": Key(WHOLE, "start of the noise; image i of a batch uses seed + i; -1 draws one", -1),
    "batch_size": Key(WHOLE, "number of images, of each prompt", 1),
    "variation_strength": Key(NUMBER, "how far the noise is turned towards the variation seed's, 0 to 1", 0.0),
    "variation_seed": Key(
        WHOLE, "the other noise's seed; image i of a batch uses it + i and the same seed; -1 draws one", -1
    ),
    "diversity": Key(NUMBER, "noise on the prompt in the first steps, so that seeds differ more; 0 is off", 0.0),
    "diversity_end": Key(NUMBER, "share of the steps that have it, 0 to 1", 0.25),
    "precision": Key(
        TEXT, "fast, or exact: bfloat16 numbers rounded wherever the reference implementation rounds them", "fast"
    ),
    "step_cache": Key(
        NUMBER, "LOSSY: a step's answer is used again up to this error, as a share; 0 is off, 0.1 careful", 0.0
    ),
    "flow_shift": Key(NUMBER, "moves the schedule towards high noise; above 0", None),
    "sample_solver": Key(TEXT, "sampler; empty for the model's own", ""),
    "schedule": Key(TEXT, "where the steps stop: simple, beta or linear; empty for the sampler's own", ""),
    "sigmas": Key(NUMBERS, "noise levels of one's own, falling from 1; their number is that of the steps", ()),
    "NAG_scale": Key(NUMBER, "normalized attention guidance; 1 is off", 1.0),
    "NAG_tau": Key(NUMBER, "its limit on the ratio of norms", 3.5),
    "NAG_alpha": Key(NUMBER, "its blend with the unguided features, 0 to 1", 0.5),
    "error_lora_strength": Key(
        NUMBER, "strength of the error-correction LoRA beside a packed model's file, if there is one; 0 is off", 1.0
    ),
    "denoising_strength": Key(NUMBER, "share of the schedule that is run on a given picture, 0 to 1", 1.0),
    "image_start": Key(TEXT, "picture to change: image to image, inpainting, outpainting", ""),
    "image_mask": Key(TEXT, "mask over it, white is repainted", ""),
    "mask_expand": Key(WHOLE, "pixels by which the mask grows, below 0 shrinks", 0),
    "mask_feather": Key(WHOLE, "pixels over which its edge fades out, beyond that", 8),
    "inpaint_area": Key(TEXT, '"masked" draws the surroundings of the mask at the resolution, "whole" all', "masked"),
    "image_fit": Key(TEXT, 'pictures of another shape: "crop", "pad" or "stretch"', "crop"),
    "outpaint": Key(TEXT, 'margins to draw around the picture, in pixels: "left=128,bottom=64" or "all=64"', ""),
    "hires_scale": Key(NUMBER, "a second pass at so many times the size; 1 is none", 1.0),
    "hires_strength": Key(NUMBER, "denoising strength of the second pass, 0 to 1", 0.5),
    "tile_scale": Key(NUMBER, "enlarge the picture so many times, drawing it tile by tile; 1 does not", 1.0),
    "image_guide": Key(TEXT, "control image, for presets with a ControlNet", ""),
    "image_refs": Key(TEXT_LIST, "pictures to go by, for Omni and Edit models", ()),
    "control_preprocessor": Key(TEXT, "what the control image is turned into: raw, canny, ...", None),
    "control_net_weight": Key(NUMBER, "strength of the control image", 1.0),
    "control_start": Key(NUMBER, "share of the steps after which the control image counts, 0 to 1", 0.0),
    "control_end": Key(NUMBER, "share of the steps after which it no longer does, 0 to 1", 1.0),
    "activated_loras": Key(TEXT_LIST, "LoRA files, relative to the LoRA folder", ()),
    "loras_multipliers": Key(MULTIPLIERS, "their strengths, separated by spaces (1 where missing)", ""),
    "VAE_tile_size": Key(WHOLE, "side of a decoding tile in latent cells (8 pixels); 0 decodes in one piece", None),
    "cfg_normalization": Key(
        LIMIT, "bound on the guided prediction's norm, as a multiple of the unguided; 0 is off", 0.0
    ),
    "cfg_truncation": Key(NUMBER, "guidance stops above this share of the schedule, 0 to 1", 1.0),
}

# Of Wan2GP's model keys, those whose absence here changes the result, so that their presence is worth a note.
_WITHOUT_EFFECT = {
    "URLs2": "weights for a second phase are not used",
    "auto_quantize": "weights are used as they are stored",
    "compile": "modules are not compiled",
    "source": "weights are read in their original naming through URLs",
    "source2": "weights are read in their original naming through URLs",
    "module_source": "modules are read in their original naming through modules",
    "module_source2": "modules are read in their original naming through modules",
}

_TYPE_NAMES = {dict: "object", list: "list", str: "text", bool: "truth value", int: "number", float: "number"}

_SLIP = 0.85  # similarity from which an unknown key is taken for a misspelt known one
_LIKENESS = 0.6  # similarity from which a known key is worth naming


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError naming file, line and column if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}).",
            "Correct the file, or move it away.",
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}).", "Save the file as UTF-8.") from error
    except RecursionError as error:
        raise UserError(f"{path}: its brackets are nested too deep.", "Correct the file, or move it away.") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise UserError(f"{path}: not usable JSON ({error}).", "Correct the file, or move it away.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object {{...}}, got {describe(value)}.")
    return value


def check_model_keys(where: str, model: Mapping[str, Any]) -> list[str]:
    """Check a preset's "model" part; return notes on what has no effect. Raises UserError on a mistake."""
    notes = _check(where, model, MODEL_KEYS, HOST_MODEL_KEYS, "handed on to the model as it is")
    notes += [
        f'{where}: "{key}" is a setting; it has no effect inside "model" and belongs at the top level.'
        for key in model
        if key in SETTING_KEYS and key not in MODEL_KEYS and key not in HOST_MODEL_KEYS
    ]
    return notes + [
        f'{where}: "{key}" has no effect here: {_WITHOUT_EFFECT[key]}.'
        for key, value in model.items()
        if key in _WITHOUT_EFFECT and value
    ]


def check_setting_keys(where: str, settings: Mapping[str, Any]) -> list[str]:
    """Check a preset's settings; return notes on what has no effect. Raises UserError on a mistake."""
    foreign = HOST_SETTING_KEYS | RECORD_KEYS
    notes = _check(where, settings, SETTING_KEYS, foreign, "without effect")
    return notes + [
        f'{where}: "{key}" has no effect at the top level and belongs inside "model".'
        for key in settings
        if key in MODEL_KEYS and key not in SETTING_KEYS and key not in foreign
    ]


def require_setting(where: str, key: str, value: Any) -> Any:
    """`value` as the kind that `key` wants, read from text if need be. Raises UserError naming both kinds."""
    kind = SETTING_KEYS[key].kind
    if isinstance(value, str) and kind.from_text is not None:
        with suppress(ValueError, KeyError):  # the text stays, and the check below names it
            value = kind.from_text(value)
    if not kind.accepts(value):
        raise wrong_value(where, key, kind, value, SETTING_KEYS)
    return value


def unknown_key(where: str, key: str, known: Mapping[str, Any] | frozenset[str]) -> UserError:
    """Error for a key that is not known, naming the closest one."""
    closest = closest_key(key, known)
    hint = f'The closest known key is "{closest}".' if closest else "defaults/README.md lists the known keys."
    return UserError(f'{where}: there is no key "{key}".', hint)


def wrong_value(where: str, key: str, kind: Kind, value: Any, known: Mapping[str, Key]) -> UserError:
    """Error for a value of the wrong kind; names a similar key if the value would fit that one."""
    fitting = [name for name, other in known.items() if name != key and other.kind.accepts(value)]
    closest = closest_key(key, fitting)
    hint = f'The closest known key for such a value is "{closest}".' if closest else ""
    return UserError(f'{where}: "{key}" must be {kind.words}, got {describe(value)}.', hint)


def closest_key(key: str, known: Any, cutoff: float = _LIKENESS) -> str | None:
    """The known key most like `key`, ignoring case, "_" and "-"; None if none is like it."""
    by_plain = {_plain(name): name for name in known}
    found = difflib.get_close_matches(_plain(key), by_plain, n=1, cutoff=cutoff)
    return by_plain[found[0]] if found else None


def describe(value: Any) -> str:
    """A JSON value for an error message: what it is and what it says, shortened."""
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False, default=str)
    kind = _TYPE_NAMES.get(type(value), type(value).__name__)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"


def _check(
    where: str, values: Mapping[str, Any], known: Mapping[str, Key], foreign: frozenset[str], fate: str
) -> list[str]:
    """Notes on unknown keys. Keys of the other part are the caller's matter; "_..." are comments."""
    notes = []
    for key, value in values.items():
        if key in known:
            if value is not None and not known[key].kind.accepts(value):  # null means: not set
                raise wrong_value(where, key, known[key].kind, value, known)
        elif not (key in foreign or key in MODEL_KEYS or key in SETTING_KEYS or key.startswith("_")):
            everything = frozenset(known) | foreign
            slip = closest_key(key, everything, _SLIP)
            if slip is not None and not _is_on_purpose(key, slip):
                raise unknown_key(where, key, everything)
            closest = closest_key(key, everything)
            notes.append(
                f'{where}: unknown key "{key}", {fate}'
                + (f'; the closest known key is "{closest}".' if closest else ".")
            )
    return notes


def _is_on_purpose(key: str, known: str) -> bool:
    """A numbered sister ("URLs3") or a key switched off ("xURLs"), both usual in Wan2GP's files."""
    return re.sub(r"\d", "", key) == re.sub(r"\d", "", known) or key[1:] == known


def _plain(key: str) -> str:
    return re.sub(r"[_\-]", "", key).lower()
