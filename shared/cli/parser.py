"""The command line: flags spelled as in Wan2GP, valid before and after the subcommand, and the subcommands."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shared.app.settings import loras_as_host_settings, parse_lora
from shared.cli.bench import add_arguments as add_bench
from shared.cli.compare import add_arguments as add_compare
from shared.cli.edit import add_edit_arguments, edit_overrides
from shared.cli.quantize import add_arguments as add_quantize

if TYPE_CHECKING:
    from shared.app.families import Families

_DESCRIPTION = "Draw pictures from sentences with Z-Image. Without a subcommand: start the web page."
_EPILOG = """\
examples:
  wgp.py generate "a red circle on a blue ground"
  wgp.py generate "a lighthouse at dusk" --preset z_image --resolution 1024x1024 --seed 7 --output lighthouse.png
  wgp.py generate "the same in winter" --image house.png --denoising-strength 0.6
  wgp.py presets
  wgp.py presets --add ~/ComfyUI/models/diffusion_models
  wgp.py inspect some_checkpoint.safetensors
  wgp.py quantize model.safetensors --format int8 --output model_int8.safetensors
  wgp.py compare --formats int8,nvfp4 --output comparison
  wgp.py bench --cases C1,C3
  wgp.py doctor
"""


def build_parser(families: Families, lora_root: str) -> argparse.ArgumentParser:
    """The whole command line. lora_root: shown as the default place of LoRA files."""
    parser = argparse.ArgumentParser(
        prog="wgp.py",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_common_flags(families, lora_root)],
        allow_abbrev=False,
    )
    metavar = "generate | presets | inspect | quantize | compare | bench | doctor"
    commands = parser.add_subparsers(dest="command", metavar=metavar, title="subcommands")
    common = _after_subcommand(_common_flags(families, lora_root))
    for name, help_text, add_arguments in (
        ("generate", "draw pictures", _add_generate),
        ("presets", "list the models that can be chosen", _add_presets),
        ("inspect", "say what a weights file is, from its tensors", _add_inspect),
        ("quantize", "convert a model into another format", add_quantize),
        ("compare", "draw with a model in many formats, and tell how much each loses", add_compare),
        ("bench", "measure this program beside others, case by case", add_bench),
        ("doctor", "say what this machine can do, what is wrong, and which model to use", _add_doctor),
    ):
        add_arguments(commands.add_parser(name, help=help_text, parents=[common], allow_abbrev=False))
    return parser


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; exits with code 2 and a usage line when the arguments cannot be understood (argparse's habit)."""
    args = parser.parse_args(argv)
    args.ckpts = [*args.ckpts, *vars(args).pop("ckpts_after", [])]
    return args


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, under the host's key names; a named flag wins over `--set`."""
    overrides: dict[str, Any] = dict(args.set)
    named = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "resolution": args.resolution,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "error_lora_strength": args.error_lora_strength,
        "precision": args.precision,
        "step_cache": args.cache,
    }
    overrides |= {key: value for key, value in named.items() if value is not None}
    overrides |= edit_overrides(args, overrides)
    if args.lora:
        overrides |= loras_as_host_settings([parse_lora(text) for text in args.lora])
    return overrides


def _common_flags(families: Families, lora_root: str) -> argparse.ArgumentParser:
    """The flags of every subcommand and of the page, as a parent parser."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_folders(parser, families, lora_root)
    _add_machine(parser)
    _add_page(parser)
    return parser


def _add_folders(parser: argparse.ArgumentParser, families: Families, lora_root: str) -> None:
    folders = parser.add_argument_group("folders")
    folders.add_argument(
        "--ckpts",
        metavar="DIR",
        action="append",
        default=[],
        help="another folder to look for models in, such as a Wan2GP or ComfyUI models folder; repeatable",
    )
    folders.add_argument("--loras", metavar="DIR", default="", help=f"root of all LoRA folders (default: {lora_root})")
    families.register_cli_args(parser, lora_root)
    folders.add_argument(
        "--settings",
        metavar="DIR",
        default="",
        help="folder of your own defaults, <preset>_settings.json (default: settings)",
    )
    folders.add_argument(
        "--config",
        metavar="DIR",
        default="",
        help="folder of wgp_config.json (default: the program's folder)",
    )
    folders.add_argument("--output-dir", metavar="DIR", default="", help="folder for pictures (default: outputs)")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--gpu", metavar="DEVICE", default="", help="device to use: cuda, mps or cpu (default: the best there is)"
    )
    machine.add_argument(
        "--profile",
        metavar="N",
        type=float,
        default=-1,
        help="memory profile 1, 2, 3, 3.5, 4, 4.5 or 5; higher needs less memory (default: from the config)",
    )
    machine.add_argument(
        "--offload",
        metavar="HOW",
        default="",
        help="how a small GPU gets its weights: auto (what is predicted to be quickest), mmgp (by --profile), stream "
        "(block by block, as many as fit stay) or none; see docs/memory.md (default: from the config, else auto)",
    )
    machine.add_argument(
        "--max-vram",
        metavar="SIZE",
        default="",
        help="most GPU memory to use, such as 4GB; --dry-run tells what then happens (default: from the config, else "
        "all that is free)",
    )
    machine.add_argument(
        "--attention",
        metavar="MODE",
        default="",
        help="auto, sdpa, cudnn, flash, flash3, xformers, sage or sage2 (default: from the preset or config, else "
        "auto: the fastest that rounds nothing, found by a race on the GPU; docs/kernels.md)",
    )
    for part in ("transformer", "text-encoder"):
        machine.add_argument(
            f"--{part}-quantization",
            metavar="KIND",
            default="",
            help=f"bf16, int8 or fp8: which file of the {part.replace('-', ' ')} to take where the preset has several "
            "(default: from the config, else the first)",
        )
    machine.add_argument(
        "--compute",
        metavar="KIND",
        default="",
        help="how packed weights are multiplied: auto, bf16 (the reference), fp8, int8 or native; see docs/compute.md "
        "(default: from the config, else auto)",
    )
    machine.add_argument(
        "--prompt-cache",
        metavar="MB",
        type=int,
        help="size of the cache of encoded prompts on the disk; 0 turns it off (default: from the config, else 256)",
    )
    machine.add_argument(
        "--verbose",
        metavar="N",
        type=int,
        choices=(0, 1, 2),
        default=1,
        help="0: errors only, 1: normal, 2: with tracebacks and details",
    )


def _add_page(parser: argparse.ArgumentParser) -> None:
    page = parser.add_argument_group("web page")
    page.add_argument(
        "--server-port",
        metavar="PORT",
        type=int,
        default=0,
        help="port (default: environment SERVER_PORT, else 7860)",
    )
    page.add_argument(
        "--server-name",
        metavar="HOST",
        default="",
        help="address to serve on (default: environment SERVER_NAME, else localhost)",
    )
    page.add_argument("--listen", action="store_true", help="serve on all addresses of this machine")
    page.add_argument("--open-browser", action="store_true", help="open the page in the browser")


def _after_subcommand(common: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same flags for use behind a subcommand: silent when absent, so that they keep what stood before it."""
    for action in common._actions:
        action.default = argparse.SUPPRESS
        if action.dest == "ckpts":  # argparse would start a new list and drop the folders named before the subcommand
            action.dest = "ckpts_after"
    return common


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw")
    parser.add_argument("--preset", metavar="ID", default=None, help="model (default: the demo); see `wgp.py presets`")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what the picture should stay away from")
    parser.add_argument("--resolution", metavar="WxH", help="size in pixels, multiples of 16")
    parser.add_argument("--steps", metavar="N", type=int, help="steps per picture, one forward each with most samplers")
    parser.add_argument("--guidance-scale", metavar="F", type=float, help="classifier-free guidance; 0 turns it off")
    parser.add_argument("--seed", metavar="N", type=int, help="-1 draws one; picture i of a batch uses seed + i")
    parser.add_argument("--batch-size", metavar="N", type=int, help="number of pictures")
    parser.add_argument(
        "--lora",
        metavar="FILE[:STRENGTH]",
        action="append",
        default=[],
        help="LoRA file, as given or in the LoRA folder; strength 1 if left out, 1,0.5 over the steps, 1;0 by halves; "
        "repeatable",
    )
    parser.add_argument(
        "--error-lora-strength",
        metavar="F",
        type=float,
        help="of the error-correction LoRA that lies beside a packed model's file; 0 turns it off (default: 1)",
    )
    add_edit_arguments(parser)
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        type=_setting,
        action="append",
        default=[],
        help="any other setting, such as NAG_scale=4, sample_solver=dpmpp_2m or diversity=0.5; repeatable "
        "(defaults/README.md lists them; docs/samplers.md, guidance.md and prompts.md explain)",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="file (.png, .jpg, .webp; {seed} and {index} are filled in) or folder (default: --output-dir)",
    )
    parser.add_argument(
        "--precision",
        choices=("fast", "exact"),
        help="exact rounds bfloat16 numbers wherever the reference implementation does (docs/speed.md); default: fast",
    )
    parser.add_argument(
        "--cache",
        type=float,
        metavar="ERROR",
        help="LOSSY: use a step's answer again where it is foretold to be off by less than this share, 0 to 0.5; "
        "another picture in less time, labelled so in its metadata (docs/cache.md); default: 0, off",
    )
    parser.add_argument("--json", action="store_true", help="end stdout with one JSON object about what was done")
    parser.add_argument("--dry-run", action="store_true",
                        help="only say what would be loaded and downloaded, and how much memory it takes")  # fmt: skip


def _add_presets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--add", metavar="PATH", nargs="+", default=[],
        help="make presets of transformers and all-in-one checkpoints that lie there, files or folders, in finetunes",
    )  # fmt: skip
    parser.add_argument(
        "--like", metavar="ID", default="",
        help="preset whose settings these take, such as z_image_base (default: what the tensors say, else z_image)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a JSON array")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", nargs="+",
        help="a .safetensors or .gguf file, an index of shards, or a folder of such; several get a line each",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a JSON object; of several, a list")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-self-test", action="store_true", help="draw no picture; answers in seconds")
    parser.add_argument(
        "--tune", action="store_true",
        help="instead measure how this NVIDIA GPU's kernels are launched best, in two minutes; from then on they are",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key.strip(), json.loads(value)
    except ValueError:  # plain text needs no quotes
        return key.strip(), value
