"""ModelSession: one model held in memory, and pictures drawn with it one by one, as events on the way (run.py)."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.events import Event, GenerationResult, OnEvent, ShouldStop
from shared.app.loading import ModelHolder
from shared.app.memory_plan import Relief
from shared.app.plan import GenerationPlan, find_machine_quickly, make_plan, requested_device
from shared.app.presets import Preset
from shared.app.retry import memory_key
from shared.app.run import Run

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.settings import GenerationSettings

_POLL_SECONDS = 0.2  # how often a waiting caller looks whether it was stopped


class ModelSession:
    """Draws with one model at a time. One generation runs at once; a second caller waits for it."""

    def __init__(self, ctx: AppContext) -> None:
        self._ctx = ctx
        self._model = ModelHolder(ctx)
        self._reliefs: dict[tuple[Any, ...], Relief] = {}  # what memory that ran out has taught, see retry.py
        self._one_at_a_time = threading.Lock()
        self._stops: list[threading.Event] = []  # of the calls that have not returned
        self._running: threading.Event | None = None  # which of them draws: not always the one that came first

    def plan(self, preset: Preset | str, settings: GenerationSettings) -> GenerationPlan:
        """What `generate` would use and fetch. Loads nothing; needs no torch on Linux without a GPU."""
        preset = self._preset(preset)
        machine = find_machine_quickly(preset, requested_device(self._ctx))
        return make_plan(self._ctx, preset, settings, machine, self._reliefs.get(memory_key(preset, settings)))

    def generate(
        self,
        preset: Preset | str,
        settings: GenerationSettings,
        *,
        on_event: OnEvent | None = None,
        should_stop: ShouldStop | None = None,
        output: Path | str | None = None,
    ) -> GenerationResult:
        """Draw settings.batch_size pictures of each prompt and save each with its record.

        on_event: called in this thread. should_stop: asked at least once a step; a generation that is stopped
        returns the pictures it has finished. output: a file or a folder, see `resolve_output`.
        Raises UserError for what the user can put right (before anything is loaded, as far as it can be known by
        then), RunError for numbers that are not finite, a full disk, no network, no memory.
        """
        stop = threading.Event()

        def stopped() -> bool:
            return stop.is_set() or (should_stop is not None and should_stop())

        run = Run(
            ctx=self._ctx,
            model=self._model,
            preset=self._preset(preset),
            settings=settings,
            reliefs=self._reliefs,
            announce=on_event or (lambda _: None),
            should_stop=stopped,
        )
        self._stops.append(stop)
        try:
            while not self._one_at_a_time.acquire(timeout=_POLL_SECONDS):
                if stopped():
                    return run.result(cancelled=True)
            self._running = stop
            try:
                return run(output)
            finally:
                self._running = None
                self._one_at_a_time.release()
        finally:
            self._stops.remove(stop)

    def stream(
        self, preset: Preset | str, settings: GenerationSettings, *, output: Path | str | None = None
    ) -> Generator[Event, None, GenerationResult]:
        """`generate` in a worker thread; yields its events and returns its result. Its errors are raised here.

        Closing the iterator early stops the generation within a step, without waiting for it.
        """
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        closed = threading.Event()
        results: list[GenerationResult] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(
                    self.generate(preset, settings, on_event=events.put, should_stop=closed.is_set, output=output)
                )
            except BaseException as error:  # noqa: BLE001 - carried to the caller's thread and raised there
                errors.append(error)
            finally:
                events.put(None)

        threading.Thread(target=work, name="generate", daemon=True).start()
        try:
            while (event := events.get()) is not None:
                yield event
        finally:
            closed.set()
        if errors:
            raise errors[0]
        return results[0]

    def import_ahead(self, after: float = 0.0) -> threading.Thread:
        """Begin, in `after` seconds, to import what drawing needs: seconds, well spent while nobody waits.

        A generation that is asked for meanwhile begins when that is done.
        """

        def work() -> None:
            time.sleep(after)
            with self._one_at_a_time:
                for handler in {id(handler): handler for handler in self._ctx.families.handlers.values()}.values():
                    ask = getattr(handler, "import_ahead", None)
                    if callable(ask):
                        # What cannot be imported is told when it is needed, and may never be.
                        with contextlib.suppress(ImportError):
                            ask()

        thread = threading.Thread(target=work, name="import ahead", daemon=True)
        thread.start()
        return thread

    def cancel(self) -> None:
        """Stop the running generation within one step; from any thread. Does nothing when none runs."""
        running = self._running or next(iter(self._stops), None)  # one that is about to run
        if running is not None:
            running.set()
            self._model.interrupt()

    def release(self) -> None:
        """Let go of the model and its memory, once the running generation has ended."""
        with self._one_at_a_time:
            self._model.release()

    def _preset(self, preset: Preset | str) -> Preset:
        return self._ctx.presets.get(preset) if isinstance(preset, str) else preset
