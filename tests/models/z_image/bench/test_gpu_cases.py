"""Every case for a GPU from its function to the page, on the CPU: tiny networks under the real rows' names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from models.z_image.bench import blocks, forwards, loras, pictures, roofs, stages, twins
from models.z_image.config import TransformerConfig
from shared.bench import results
from shared.bench.card import card
from shared.bench.cases import CASES
from shared.bench.floors import Network
from shared.bench.goals import GOALS, Goal
from shared.bench.machine import Machine
from shared.bench.measure import CpuClock
from shared.bench.page import PAGE, render
from shared.bench.results import Record, Row
from shared.bench.run import Options, run_cases
from shared.bench.stand import Stand
from shared.bench.verdict import judge
from shared.quant.kernels import torch_fp8
from tests.support.fake_cuda import fake_cuda
from tests.support.only_torch import only_torch

SMALL = twins.sized(384, 1, heads=3, refiners=1, features=64)
QWEN3 = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 300,
}  # fmt: skip
VAE = {**stages.VAE, "block_out_channels": (8, 16, 16, 32), "layers_per_block": 1, "norm_num_groups": 4}
H200 = Machine(cpu="Some CPU", cores=16, ram_gb=128.0, gpu="NVIDIA H200", gpu_gb=150.0)

# Compiling takes half a minute: what the rest of the run is made of is tested without it.
PEERS = frozenset({"P1", "P3", "P4", "P7"})

WORK: dict[str, Callable[[Stand], None]] = {
    "B0": partial(roofs.gpu, lengths=(64,), layers=((128, 64),), copied=2**20),
    "B1": partial(forwards.on_gpu, config=SMALL),
    "B2": partial(blocks.on_gpu, config=twins.sized(384, 1, heads=3, refiners=0, features=64)),
    "B3": partial(
        pictures.warm,
        config=replace(SMALL, cap_feat_dim=64),
        text=QWEN3,
        vae=VAE,
        text_layers=2,
        base_steps=1,
        sides=(512, 1024),
    ),
    "B4": partial(pictures.batches, config=SMALL),
    "B7": partial(stages.text_on_gpu, sizes=QWEN3, layers=2),
    "B8": partial(stages.decode_on_gpu, config=VAE, sides=(64,)),
    "B9": partial(pictures.growth, config=SMALL),
    "B10": partial(loras.on_gpu, config=SMALL),
}


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows keep their names; no test can afford their pictures."""
    real = twins.scene

    def scene(config: TransformerConfig, *, width: int, height: int, caption: int, device: torch.device) -> Any:
        return real(config, width=32, height=32, caption=min(caption, 20), device=device)

    monkeypatch.setattr(twins, "scene", scene)


def measured(case_id: str, folder: Path) -> tuple[Record, Path]:
    """The case as the program runs it, but on the CPU; the record and the file it is kept in."""
    case = replace(next(case for case in CASES if case.id == case_id), needs_gpu=False)
    path = folder / "results.json"
    options = Options(
        peers=PEERS, command="python wgp.py bench", root=Path(__file__).parents[4], repeats=1,
        keep=lambda record: results.merge(path, H200, [record]) and None,
    )  # fmt: skip
    (record,) = run_cases([case], WORK, options)
    results.merge(path, H200, [record])
    return record, path


def told(case_id: str) -> list[Goal]:
    """The goals that need this case's rows and no other's."""
    own = [goal for goal in GOALS if goal.check is not None and goal.check.case == case_id]
    absent = {"P2", *excused()}
    return [
        g for g in own if g.check is not None and g.check.floor is None and not {*g.check.versus.split()[:1]} & absent
    ]


def failed(rows: Iterable[Row]) -> list[Row]:
    """Those who did not reach a figure, but for FP8 products by rows, which torch 2.11's CPUs lack."""
    return [row for row in rows if "outcome" in row.values and row.who not in excused()]


def excused() -> set[str]:
    return {"raw fp8", "P4"} if torch_fp8._refusal_of_cpus() else set()


@pytest.mark.parametrize("case_id", WORK)
def test_a_case_runs_from_its_function_to_the_page(case_id: str, tmp_path: Path) -> None:
    record, path = measured(case_id, tmp_path)

    assert record.finished and record.notes == ()
    assert failed(record.rows) == []
    read = results.read(path)
    assert json.loads(json.dumps(read.cases[case_id].as_dict())) == json.loads(json.dumps(record.as_dict()))
    assert case_id in card(record)
    page = render([read])[PAGE]
    assert f"### {case_id} on M1" in page
    assert all(row.row in page for row in record.rows)
    if case_id not in ("B8", "B9"):  # tiny pictures only; memory, which a CPU does not tell
        missing = [goal.metric for goal in told(case_id) if judge(goal, [read]).met is None]
        missing = [metric for metric in missing if "16 pictures" not in metric]
        assert missing == [], "a goal looks for a row that its case does not make"


def test_every_case_for_a_gpu_is_tried(tmp_path: Path) -> None:
    of_programs = {"B5", "B6"}  # test_programs.py

    assert set(WORK) | of_programs == {case.id for case in CASES if case.needs_gpu}


def test_shares_of_the_roofs_are_judged_by_the_roofs_of_the_same_machine(tmp_path: Path) -> None:
    (_, path), _ = measured("B0", tmp_path), measured("B1", tmp_path)
    goals = [g for g in GOALS if g.check is not None and g.check.case == "B1" and g.check.floor is not None]

    verdicts = [judge(goal, [results.read(path)]) for goal in goals]

    assert len(verdicts) == 3
    assert all(v.met is not None and v.ours.split()[1] == "%" and "by B0's rates" in v.peer for v in verdicts)


@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_the_goals_arithmetic_is_that_of_the_network(side: int) -> None:
    given = twins.Scene(
        latents=torch.empty(1, 16, side // 8, side // 8, device="meta"), features=torch.empty(100, 2560, device="meta")
    )

    work = Network().work(side, 100, ("bf16",), roofs="B0")

    total = sum(work.products.values()) + work.attention
    assert total * 1e9 == pytest.approx(twins.forward_flops(TransformerConfig(), given))


def test_the_prompt_of_whole_programs_is_as_long_as_the_goals_take_it() -> None:
    from models.z_image.text_encoder import TEMPLATE, load_tokenizer
    from shared.bench.goals import PROMPT_TOKENS
    from shared.bench.programs import PROMPT

    tokenizer = load_tokenizer(Path(twins.__file__).parents[1] / "demo" / "text_encoder")

    assert len(tokenizer(TEMPLATE.format(prompt=PROMPT), add_special_tokens=False)["input_ids"]) == PROMPT_TOKENS


ON_GPU: dict[str, Callable[[Stand], None]] = {
    **{case: WORK[case] for case in ("B0", "B7", "B8", "B10")},
    "B3": partial(pictures.warm, config=SMALL, text=QWEN3, vae=VAE, text_layers=2, sides=(512,)),
    "B4": partial(pictures.batches, config=SMALL, sizes=((1024, 1), (1024, 2))),
    "B9": partial(pictures.growth, config=SMALL, sizes=((512, 1), (768, 1))),
}


@pytest.mark.parametrize("case_id", sorted(ON_GPU))
def test_everything_of_a_case_is_on_the_gpu(case_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended one, where tensors of two devices in one operation are an error, as on a real one."""
    import peft  # type: ignore[import-untyped]  # noqa: F401 - libraries are imported without a GPU
    from diffusers import ZImagePipeline  # noqa: F401

    monkeypatch.setattr(twins, "_recordings", lambda *_: None)  # there is nothing to record on
    monkeypatch.setattr(pictures, "variations", lambda *_: None)  # takes half a minute there
    with only_torch(), torch.no_grad(), fake_cuda(total_memory=80 << 30, capability=(9, 0)):
        stand = Stand(
            device=torch.device("cuda"), clock=CpuClock(), peers=frozenset({"P1"}), folder=tmp_path, repeats=1
        )
        ON_GPU[case_id](stand)

    assert failed(stand.rows) == []
    assert {"ours", "raw"} & {row.who for row in stand.rows}
