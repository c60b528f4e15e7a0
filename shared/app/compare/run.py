"""The run: each model's pictures drawn, a few models at a time, and the report, sheet and pictures left behind."""

from __future__ import annotations

import argparse
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.compare.contenders import Say, chosen_formats, contenders, reference_file
from shared.app.compare.figures import Pictures, file_size, received, row_of
from shared.app.compare.request import FIRST_SEED, PROMPTS, CompareRequest, check_settings, pictures_of, repeated
from shared.app.compare.result import Comparison, Row
from shared.app.compare.scoring import Scorer, adherence, find_scorer, verdicts_on
from shared.app.contact_sheet import ContactSheet
from shared.app.drawing import DrawJob, Drawn, Spent, draw_elsewhere
from shared.app.format_order import findings
from shared.app.metadata import write_file
from shared.app.plan import find_files, find_machine, requested_device
from shared.app.presets import Preset, choose_files
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import RunError, UserError

if TYPE_CHECKING:
    from shared.app.context import AppContext

Draw = Callable[[DrawJob], Iterator[Drawn | Spent]]


def compare(ctx: AppContext, request: CompareRequest, say: Say, draw: Draw = draw_elsewhere) -> Comparison:
    """Write the formats, draw with each, measure, and leave report.json, sheet.png and the pictures in the output.

    say: what is going on, in words. draw: how a model's pictures are made. A format that cannot be written or drawn
    with gets a row that says why, and the rest goes on; without the reference nothing does. Raises UserError before
    anything is drawn where it can.
    """
    preset = ctx.presets.get(request.preset)
    formats = chosen_formats(ctx, request)
    scorer = find_scorer(request.scorer or str(preset.model_def.get("scorer") or ""), request.prompts)
    captions = scorer.held_out_captions(request.count, FIRST_SEED) if scorer else []
    prompts = [str(caption.text) for caption in captions] or repeated(request.prompts or PROMPTS, request.count)
    pictures = pictures_of(request, prompts)
    check_settings(preset, pictures)
    reference = reference_file(ctx, preset)
    _know_the_text_encoder(ctx, preset)
    request.output.mkdir(parents=True, exist_ok=True)
    job = DrawJob(
        root=ctx.root, args=_flags(ctx), preset=preset.id, file=reference, pictures=pictures,
        threads=max((os.cpu_count() or 1) // request.jobs, 1) if request.jobs > 1 else 0,
    )  # fmt: skip

    def draw_all(name: str, path: Path) -> Pictures:
        return received(draw(replace(job, file=path)), len(prompts), lambda words: say(f"{name}: {words}"))

    table = _Table(request.output, scorer, captions, ContactSheet(prompts))
    for name, path, outcome in _at_a_time(request.jobs, contenders(ctx, request, reference, formats, say), draw_all):
        table.add(name, path, outcome)
    result = Comparison(
        preset=preset.id,
        **_machine(ctx, preset),
        prompts=prompts,
        settings=dict(request.settings),
        lora=f"{request.lora.file}:{request.lora.multiplier}" if request.lora else "",
        rows=table.rows,
        order=findings(table.rows, len(prompts)),
        sheet=request.output / "sheet.png",
        report=request.output / "report.json",
    )
    picture = table.sheet.draw()
    write_file(result.sheet, lambda file: picture.save(file, "PNG"))
    text = json.dumps(result.as_dict(), indent=2, ensure_ascii=False) + "\n"
    write_file(result.report, lambda file: file.write(text.encode("utf-8")))
    return result


class _Table:
    """The rows so far and their pictures, saved and on the sheet. captions: of the prompts, for the scorer."""

    def __init__(self, output: Path, scorer: Scorer | None, captions: Sequence[Any], sheet: ContactSheet) -> None:
        self.rows: list[Row] = []
        self.sheet = sheet
        self._output = output
        self._scorer = scorer
        self._captions = captions
        self._reference: Pictures | None = None  # the first that was drawn
        self._verdicts_before: list[Any] = []  # on the reference's pictures

    def add(self, name: str, path: Path | UserError, outcome: Callable[[], Pictures]) -> None:
        """One model. Raises UserError where the reference cannot be drawn with."""
        from PIL import Image

        if isinstance(path, UserError):
            self.rows.append(Row(name=name, file="", bytes=0, problem=str(path)))
            return
        try:
            found = outcome()
        except UserError as error:
            if self._reference is None:
                raise
            self.rows.append(Row(name=name, file=str(path), bytes=file_size(path), problem=str(error)))
            return
        self._reference = self._reference or found
        verdicts = verdicts_on(found, self._scorer, self._captions)
        self._verdicts_before = self._verdicts_before or verdicts
        row = row_of(name, path, found, self._reference)
        self.rows.append(replace(row, **adherence(verdicts, self._verdicts_before)))
        images = [Image.fromarray(drawn.picture) for drawn in found.plain]
        self.sheet.add(name, images)
        _save_pictures(self._output / name, images)


def _at_a_time(
    jobs: int, contenders: Iterator[tuple[str, Path | UserError]], draw: Callable[[str, Path], Pictures]
) -> Iterator[tuple[str, Path | UserError, Callable[[], Pictures]]]:
    """Each contender in its order with its pictures to be waited for, while `jobs` at most are being drawn."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting: deque[tuple[str, Path | UserError, Callable[[], Pictures]]] = deque()
        for name, path in contenders:
            outcome = _not_drawn if isinstance(path, UserError) else pool.submit(draw, name, path).result
            waiting.append((name, path, outcome))
            while len(waiting) >= jobs:
                yield waiting.popleft()
        yield from waiting


def _not_drawn() -> Pictures:
    raise RunError("There is no file to draw with.")


def _know_the_text_encoder(ctx: AppContext, preset: Preset) -> None:
    """Have its hash at hand, by which prompts are remembered: then the first model alone needs to load it."""
    for file in find_files(ctx, choose_files(preset)):
        if file.role == "text_encoder" and file.path is not None:
            for part in Checkpoint.open(file.path).files:
                ctx.files.sha256(part)


def _save_pictures(folder: Path, images: Sequence[Any]) -> None:
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        write_file(folder / f"{number:03}.png", lambda file, image=image: image.save(file, "PNG"))  # type: ignore[misc]


def _flags(ctx: AppContext) -> argparse.Namespace:
    """The command line's flags for another process, which finds the families by itself."""
    return argparse.Namespace(**{key: value for key, value in vars(ctx.args).items() if key != "families"})


def _machine(ctx: AppContext, preset: Preset) -> dict[str, str]:
    machine = find_machine(preset, requested_device(ctx))
    return {"device": machine.device.name, "dtype": machine.dtype.value}
