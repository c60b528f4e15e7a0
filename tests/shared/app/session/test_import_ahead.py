"""What drawing needs is imported while nobody waits, and whoever asks meanwhile draws when that is done."""

from __future__ import annotations

import threading

from shared.app.context import AppContext
from tests.support.fake_family import FakeHandler
from tests.support.orders import order


def test_a_picture_asked_for_meanwhile_begins_when_it_is_done(ctx: AppContext, handler: FakeHandler) -> None:
    begun, may_end = threading.Event(), threading.Event()
    done: list[str] = []

    def slowly() -> None:
        begun.set()
        may_end.wait(10)
        done.append("imported")

    handler.import_ahead = slowly
    importing = ctx.session.import_ahead()
    assert begun.wait(10)
    drawing = threading.Thread(
        target=lambda: done.append(f"{len(ctx.session.generate('one', order(ctx)).images)} drawn"), daemon=True
    )
    drawing.start()
    may_end.set()
    importing.join(10)
    drawing.join(30)

    assert done == ["imported", "1 drawn"]


def test_it_happens_once_for_a_family_of_several_architectures(ctx: AppContext, handler: FakeHandler) -> None:
    asked: list[None] = []
    handler.import_ahead = lambda: asked.append(None)

    ctx.session.import_ahead().join(10)

    assert len(asked) == 1


def test_a_library_that_is_missing_is_told_when_it_is_needed(ctx: AppContext, handler: FakeHandler) -> None:
    def missing() -> None:
        raise ImportError("no diffusers here")

    handler.import_ahead = missing
    ctx.session.import_ahead().join(10)

    assert len(ctx.session.generate("one", order(ctx)).images) == 1
