"""Opening a large checkpoint, each way in a process of its own: time, and the memory that is the process's own.

    python -m models.z_image.bench.opening ours model.safetensors

The files are sparse (sparse_files.py): as long as real ones, and on the disk next to nothing. So this measures what
programs do with a file that is in the page cache, not the disk. Memory mapped from a file is the page cache's and does
not count (RssAnon; Linux tells it, elsewhere it is left out).

    seconds             of an opening in a process that has opened it before; first_seconds: in one that has not, what
                        is imported by then not counted. The rows with peers are the least of three processes
    of_limit            percent of 0.1 s + 0.02 s/GB that opening takes
    checked_seconds     looking through scales, which is done beside the first picture (shared/quant/number_checks.py)
    used_seconds        laying every weight out for the CPU's kernels, which is done where a layer is first used; and
    used_own_mb         the memory of its own that the process then has
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models.z_image.bench import sparse_files, sparse_parts
from models.z_image.bench.stand import Stand, Value
from models.z_image.config import TransformerConfig

# Blocks of the shorter file: some peers copy it into memory, which 12 GB would not leave room for everywhere.
_FEW_LAYERS = 8
RUNS, PROCESSES = 7, 3
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PROGRAM = Path(__file__).resolve().parents[3]
FOR_A_GPU, TEXT_ENCODER, VAE = "ours for a GPU", "our text encoder", "our VAE"

# Seconds that opening may take, and more for each 10^9 bytes.
_LIMIT, _LIMIT_PER_GB = 0.1, 0.02


def opening(
    stand: Stand,
    sizes: Mapping[str, TransformerConfig] | None = None,
    *,
    qwen3: Mapping[str, Any] | None = None,
    vae: Mapping[str, Any] | None = None,
) -> None:
    """Each contender opens each file it knows the names of, in processes of their own.

    sizes, qwen3, vae: other ones than the published.
    """
    stand.how = f"wall clock in a process of its own, least of {RUNS} times there; imports not counted"
    sizes = sizes or {"12.3 GB": TransformerConfig(), "4.4 GB": TransformerConfig(n_layers=_FEW_LAYERS)}
    for name, config in sizes.items():
        is_full = name == next(iter(sizes)) and len(sizes) > 1
        for layout in ("official",) if is_full else ("official", "diffusers"):
            path = stand.folder / layout / _WEIGHTS
            gigabytes = sparse_files.write(path, config, sparse_files.PLAIN[layout]) / 1e9
            path.with_name("config.json").write_text(json.dumps(config.as_diffusers()), encoding="utf-8")
            for who in ("ours", "P1", "P6") if layout == "diffusers" else ("ours",):
                if stand.wants(who):
                    _record(stand, f"{name}, {layout} names", who, path, gigabytes, processes=PROCESSES)
            path.unlink()
    config = next(iter(sizes.values()))
    for name, kind in sparse_files.KINDS.items():
        path = stand.folder / ("model.gguf" if kind.gguf else "model.safetensors")
        gigabytes = sparse_files.write(path, config, kind) / 1e9
        for who in ("ours", FOR_A_GPU):
            if stand.wants(who):
                _record(stand, name, who, path, gigabytes)
        path.unlink()
    _open_parts(stand, qwen3, vae)


def _open_parts(stand: Stand, qwen3: Mapping[str, Any] | None, vae: Mapping[str, Any] | None) -> None:
    """What stands before and behind the transformer."""
    if not stand.wants("ours"):
        return
    path = stand.folder / "part.safetensors"
    for row, kind in {"text encoder, bf16": "", "text encoder, FP8 scaled": "FP8 scaled"}.items():
        gigabytes = sparse_parts.write_text_encoder(path, kind, qwen3) / 1e9
        _record(stand, row, "ours", path, gigabytes, way=TEXT_ENCODER)
    _record(stand, "VAE, bf16", "ours", path, sparse_parts.write_vae(path, vae) / 1e9, way=VAE)
    path.unlink()


def _record(
    stand: Stand, row: str, who: str, path: Path, gigabytes: float, *, way: str = "", processes: int = 1
) -> None:
    """way: to open it, where that is not the contender's only one."""
    runs: list[dict[str, float]] = []
    for _ in range(processes):
        done = subprocess.run(
            [sys.executable, "-m", __name__, way or who, str(path)],
            cwd=_PROGRAM, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            stand.note(f"{row}: {who} did not open it ({reason}).")
            return
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    found = {name: min(run[name] for run in runs) for name in runs[0]}
    limit = _LIMIT + _LIMIT_PER_GB * gigabytes
    of_limit = round(100 * found["seconds"] / limit, 1)
    values: dict[str, Value] = {"gb": round(gigabytes, 2), "repeats": RUNS, "of_limit": of_limit, **found}
    stand.record(row, who, values)


def _open_ours(path: Path, *, for_a_gpu: bool = False) -> Callable[[], Any]:
    """As the host does, on a CPU or where its own offloader moves weights to a GPU."""
    from models.z_image import omni, transformer  # noqa: F401 - imported when first needed, and so are all formats
    from models.z_image.loader import load_transformer
    from shared.quant.formats import formats

    formats()
    return lambda: load_transformer(path, torch.bfloat16, keep_mapped=not for_a_gpu, keep_apart=for_a_gpu)


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


def _open_text_encoder(path: Path) -> Callable[[], Any]:
    from transformers import Qwen3Model  # noqa: F401 - transformers imports it when it is first looked up

    from models.z_image.text_encoder import load_text_encoder
    from shared.quant.formats import formats

    formats()
    return lambda: load_text_encoder(path, torch.bfloat16, keep_mapped=True)


def _open_vae(path: Path) -> Callable[[], Any]:
    from diffusers import AutoencoderKL  # noqa: F401 - as above

    from models.z_image.autoencoder import load_vae

    return lambda: load_vae(path, torch.float32, keep_mapped=True)


_WAYS: Mapping[str, Callable[[Path], Callable[[], Any]]] = {
    "ours": _open_ours,
    FOR_A_GPU: partial(_open_ours, for_a_gpu=True),
    TEXT_ENCODER: _open_text_encoder,
    VAE: _open_vae,
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
    """Open the file, use it, and print one JSON object. Imports, and what they read, are not counted."""
    load = _WAYS[who](path)
    found: dict[str, float] = {}
    before = _own_mb()
    for run in range(RUNS):
        began, cpu = time.perf_counter(), time.process_time()
        model = load()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        if not run:
            found["own_mb"] = _own_mb() - before
            found |= {"first_seconds": seconds, "first_cpu_seconds": cpu}
            next(p for p in model.parameters() if p.dim() > 1).float().sum()
            found["first_tensor_seconds"] = time.perf_counter() - began
        found["seconds"] = min(seconds, found.get("seconds", seconds))
        found["cpu_seconds"] = min(cpu, found.get("cpu_seconds", cpu))
        if run < RUNS - 1:
            del model
            gc.collect()
    if who in ("ours", FOR_A_GPU, TEXT_ENCODER):
        began = time.perf_counter()
        model.number_checks.finish()
        found["checked_seconds"] = time.perf_counter() - began
    if who == "ours":
        found |= _used(model, before)
    sys.stdout.write(json.dumps({name: round(value, 3) for name, value in found.items()}) + "\n")


def _used(model: Any, before: float) -> dict[str, float]:
    """What the first use of every layer costs beyond its arithmetic."""
    from shared.quant.kernels.resolve import resolve
    from shared.quant.linear import PackedLinear

    began = time.perf_counter()
    resolve([model], torch.device("cpu"))
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.ready(torch.device("cpu"))
    return {"used_seconds": time.perf_counter() - began, "used_own_mb": _own_mb() - before}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
