"""Opening a large checkpoint, each way in a process of its own: time, and the memory that is the process's own.

    python -m models.z_image.bench.opening ours model.safetensors

The files are sparse: as long as real ones, zeros all through, and on the disk next to nothing. So this measures what
programs do with a file that is in the page cache, not the disk. Memory mapped from a file is the page cache's and does
not count (RssAnon; Linux tells it, elsewhere it is left out).
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from models.z_image.bench.stand import Stand, Value
from models.z_image.config import TransformerConfig
from models.z_image.keys import diffusers_names, split_parameter
from models.z_image.transformer import ZImageTransformer

# Blocks of the shorter file: some peers copy it into memory, which 12 GB would not leave room for everywhere.
_FEW_LAYERS = 8
RUNS = 3
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PROGRAM = Path(__file__).resolve().parents[3]


def opening(stand: Stand, sizes: Mapping[str, TransformerConfig] | None = None) -> None:
    """Each contender opens each file it knows the names of; the least of three processes counts."""
    stand.how = f"wall clock in a fresh process each time, least of {RUNS}; imports not counted"
    sizes = sizes or {"12.3 GB": TransformerConfig(), "4.4 GB": TransformerConfig(n_layers=_FEW_LAYERS)}
    for name, config in sizes.items():
        is_full = name == next(iter(sizes)) and len(sizes) > 1
        for layout in ("official",) if is_full else ("official", "diffusers"):
            path = stand.folder / layout / _WEIGHTS
            gigabytes = write_sparse(path, config, layout=layout) / 1e9
            contenders = ["ours"] + (["P1", "P6"] if layout == "diffusers" else [])
            for who in contenders:
                if stand.wants(who):
                    _record(stand, f"{name}, {layout} names", who, path, gigabytes)
            path.unlink()


def _record(stand: Stand, row: str, who: str, path: Path, gigabytes: float) -> None:
    found: list[dict[str, float]] = []
    for _ in range(RUNS):
        done = subprocess.run(
            [sys.executable, "-m", __name__, who, str(path)],
            cwd=_PROGRAM, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            stand.note(f"{row}: {who} did not open it ({reason}).")
            return
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    best = min(found, key=lambda run: run["seconds"])
    values: dict[str, Value] = {"gb": round(gigabytes, 2), "repeats": RUNS, **best}
    stand.record(row, who, values)


def write_sparse(path: Path, config: TransformerConfig, *, layout: str) -> int:
    """A checkpoint in bf16 of nothing but zeros, in the official names or diffusers'; its length in bytes."""
    with torch.device("meta"):
        model = ZImageTransformer(config)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in _tensors(model, layout).items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    fields = config.as_diffusers()
    path.with_name("config.json").write_text(json.dumps(fields), encoding="utf-8")
    return 8 + len(text) + end


def _tensors(model: ZImageTransformer, layout: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        module, suffix = split_parameter(name)
        names = diffusers_names(module)
        if layout == "official":  # as ComfyUI and the model's own repository: qkv in one, w1 and w3 apart
            names = tuple(n for n in names if ".feed_forward." in n) if module.endswith("w13") else (module,)
        rows = parameter.shape[0] // len(names)
        found |= {f"{n}{suffix}": (rows, *parameter.shape[1:]) for n in names}
    return found


def _open_ours(path: Path) -> Callable[[], Any]:
    from models.z_image import omni, transformer  # noqa: F401 - imported when first needed, and so are all formats
    from models.z_image.loader import load_transformer
    from shared.quant.formats import formats

    formats()
    return lambda: load_transformer(path, torch.bfloat16, keep_mapped=True)


def _open_diffusers(path: Path) -> Callable[[], Any]:
    from diffusers import ZImageTransformer2DModel

    return lambda: ZImageTransformer2DModel.from_pretrained(path.parent, torch_dtype=torch.bfloat16)


def _open_mmgp(path: Path) -> Callable[[], Any]:
    """mmgp's loader fills diffusers' class, as Wan2GP has it fill its own."""
    from accelerate import init_empty_weights
    from diffusers import ZImageTransformer2DModel
    from mmgp import offload

    fields = {k: v for k, v in json.loads(path.with_name("config.json").read_text()).items() if not k.startswith("_")}

    def load() -> Any:
        with init_empty_weights():
            model = ZImageTransformer2DModel(**fields)
        offload.load_model_data(model, str(path), writable_tensors=False, verboseLevel=0)
        return model

    return load


_WAYS: Mapping[str, Callable[[Path], Callable[[], Any]]] = {
    "ours": _open_ours,
    "P1": _open_diffusers,
    "P6": _open_mmgp,
}


def _own_mb() -> float:
    """Memory of this process alone, 10^6 bytes; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return 0.0
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 / 1e6


def main(who: str, path: Path) -> None:
    """Open the file once and print one JSON object. Imports, and what they read, are not counted."""
    load = _WAYS[who](path)
    before, began, cpu = _own_mb(), time.perf_counter(), time.process_time()
    model = load()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    own = _own_mb() - before
    first = next(p for p in model.parameters() if p.dim() > 1)
    first.float().sum()
    ready = time.perf_counter() - began
    found = {"seconds": seconds, "cpu_seconds": cpu, "first_tensor_seconds": ready, "own_mb": own}
    sys.stdout.write(json.dumps({name: round(value, 3) for name, value in found.items()}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
