"""The page as a whole: it builds without a browser, its events are set up as promised, it serves where it is told."""

from __future__ import annotations

import argparse
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from shared.quant.errors import UserError
from shared.ui import app as app_module
from shared.ui.app import build_app, choose_host, choose_port, launch, serve

LOOPBACK = "127.0.0.1"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the environment is no part of this


def flags(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"server_port": 0, "server_name": "", "listen": False, "open_browser": False} | changes)


@pytest.fixture(autouse=True)
def _no_server_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVER_PORT", "SERVER_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):  # `serve` changes them for this process
        monkeypatch.setenv(name, os.environ.get(name, ""))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind((LOOPBACK, 0))
        holder.listen()
        yield holder.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def events(ctx: Any) -> dict[str, Any]:
    """The page's events by the name of the callback they call."""
    return {event.fn.__name__: event for event in build_app(ctx).fns.values() if event.fn is not None}


def test_every_promised_event_is_wired(context) -> None:
    assert set(events(context)) >= {
        "opened", "preset_picked", "refreshed", "asked", "draw", "cancelled", "size_picked", "guidance_moved",
        "seed_reused", "settings_restored",
    }  # fmt: skip


def test_one_drawing_at_a_time_and_everything_else_is_answered_meanwhile(context) -> None:
    by_name = events(context)

    assert by_name["draw"].concurrency_limit == 1
    assert by_name["draw"].queue is True
    assert [name for name, event in by_name.items() if event.queue] == ["draw"]


def test_cancel_takes_a_waiting_drawing_out_of_the_queue(context) -> None:
    app = build_app(context)
    draw = next(number for number, event in app.fns.items() if event.fn and event.fn.__name__ == "draw")

    assert any(draw in event.cancels for event in app.fns.values())


def test_the_page_offers_no_programming_interface_it_would_have_to_keep(context) -> None:
    assert {event.api_visibility for event in build_app(context).fns.values()} == {"private"}


def test_usage_is_not_reported() -> None:
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_the_first_free_port_is_taken_from_the_default_on_and_said(taken_port: int, monkeypatch) -> None:
    monkeypatch.setattr(app_module, "DEFAULT_PORT", taken_port)
    port, remark = choose_port(flags(), LOOPBACK)

    assert port > taken_port
    assert str(taken_port) in remark


def test_a_port_that_was_asked_for_is_never_replaced(taken_port: int, monkeypatch) -> None:
    with pytest.raises(UserError, match=str(taken_port)):
        choose_port(flags(server_port=taken_port), LOOPBACK)

    monkeypatch.setenv("SERVER_PORT", str(taken_port))
    with pytest.raises(UserError, match=str(taken_port)):
        choose_port(flags(), LOOPBACK)


def test_the_flag_wins_over_the_environment(monkeypatch) -> None:
    port = free_port()
    monkeypatch.setenv("SERVER_PORT", "1")

    assert choose_port(flags(server_port=port), LOOPBACK) == (port, "")


@pytest.mark.parametrize("asked", ["70000", "-1", "many"])
def test_what_is_no_port_is_refused(asked: str, monkeypatch) -> None:
    monkeypatch.setenv("SERVER_PORT", asked)

    with pytest.raises(UserError, match="1 to 65535"):
        choose_port(flags(), LOOPBACK)


def test_only_this_machine_is_served_unless_asked(monkeypatch) -> None:
    assert choose_host(flags()) == LOOPBACK
    assert choose_host(flags(server_name="192.168.1.5")) == "192.168.1.5"
    assert choose_host(flags(listen=True, server_name="ignored")) == "0.0.0.0"

    monkeypatch.setenv("SERVER_NAME", "localhost")
    assert choose_host(flags()) == "localhost"


def test_launch_says_where_it_serves_in_one_line_and_ends_on_ctrl_c(context, capsys, monkeypatch) -> None:
    served: list[bytes] = []

    def interrupt() -> None:
        address = f"http://{LOOPBACK}:{port}/"
        with DIRECT.open(address, timeout=10) as reply:
            served.append(reply.read())
        raise KeyboardInterrupt

    port = free_port()
    monkeypatch.setattr(app_module, "_sleep_until_interrupted", interrupt)

    assert launch(context, flags(server_port=port)) == 130
    assert b"Z-Image" in served[0]
    [line] = capsys.readouterr().out.splitlines()
    assert f"http://{LOOPBACK}:{port}/" in line
    assert context.session.imported_ahead == 1
    assert context.session.cancels == 1


def test_a_machine_too_busy_to_answer_in_three_seconds_is_served_all_the_same(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradio.networking.url_ok", lambda _: False)

    app = serve(context, LOOPBACK, free_port())

    try:
        assert DIRECT.open(app.local_url).status == 200
    finally:
        app.close(verbose=False)


def test_serving_looks_up_no_name_outside_this_machine(context, monkeypatch) -> None:
    asked: set[str | None] = set()
    look_up = socket.getaddrinfo

    def record(host: Any, *args: Any, **options: Any) -> Any:
        asked.add(host.decode() if isinstance(host, bytes) else host)
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", record)
    app = serve(context, LOOPBACK, free_port())
    try:
        DIRECT.open(app.local_url, timeout=10).close()
    finally:
        app.close(verbose=False)

    assert asked <= {LOOPBACK, "localhost", None}


def test_pictures_of_the_output_folder_are_served_and_other_files_are_not(context, tmp_path) -> None:
    (context.output_folder / "mine.txt").write_text("mine")
    (tmp_path / "secret.txt").write_text("secret")
    app = serve(context, LOOPBACK, free_port())
    address = app.local_url + "gradio_api/file="
    try:
        assert DIRECT.open(f"{address}{context.output_folder / 'mine.txt'}", timeout=10).read() == b"mine"
        with pytest.raises(urllib.error.HTTPError) as refused:
            DIRECT.open(f"{address}{tmp_path / 'secret.txt'}", timeout=10)
        assert refused.value.code == 403
        refused.value.close()
    finally:
        app.close(verbose=False)
