"""Build the page from its panels and serve it on this machine."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from typing import TYPE_CHECKING

import gradio as gr

from shared.quant.errors import UserError
from shared.ui.edit_panel import build_edit_panel
from shared.ui.generate_panel import build_compose_panel, build_settings_panel
from shared.ui.page import Page
from shared.ui.result_panel import build_result_panel
from shared.ui.sampling_panel import build_sampling_panel
from shared.ui.theme import CSS, HEAD, build_theme
from shared.ui.wiring import wire

if TYPE_CHECKING:
    from shared.app.context import AppContext

DEFAULT_PORT = 7860
PORTS_TRIED = 100  # a taken default port is stepped over; one the user asked for is not
_LOOPBACK = "127.0.0.1"
_EVERYWHERE = "0.0.0.0"
_TITLE = "Z-Image"
_UPLOAD_LIMIT = "64mb"  # a picture dropped for its settings
_DAY = 86_400  # seconds
_PAGE_SECONDS = 2.0  # for a browser to fetch the page before anything else is done
_INTERRUPTED = 130  # exit code after Ctrl-C, as shells count it


def build_app(ctx: AppContext) -> gr.Blocks:
    """The whole page, ready to launch; opening it fills the form from `ctx`."""
    with gr.Blocks(title=_TITLE, analytics_enabled=False, delete_cache=(_DAY, _DAY)) as app:
        gr.HTML(f"<h1>{_TITLE}</h1>", elem_id="masthead")
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="compose"):
                compose = build_compose_panel()
            with gr.Column(elem_id="result"):
                result = build_result_panel()
            with gr.Column(elem_id="settings"):
                settings = build_settings_panel()
                sampling = build_sampling_panel()
                edit = build_edit_panel()
        page = Page(ctx=ctx, compose=compose, settings=settings, sampling=sampling, edit=edit, result=result)
        wire(app, page)
    return app


def launch(ctx: AppContext, args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C and return the exit code.

    args: server_port (0: environment SERVER_PORT, else 7860), server_name, listen (all interfaces), open_browser.
    Raises UserError when the port the user asked for is taken or is no port.
    """
    host = choose_host(args)
    port, remark = choose_port(args, host)
    app = serve(ctx, host, port, open_browser=bool(args.open_browser))
    reach = " and every network address of this machine" if host == _EVERYWHERE else ""
    sys.stdout.write(f"{remark}{_TITLE} is ready at {app.local_url}{reach}. Ctrl-C stops it.\n")
    sys.stdout.flush()
    ctx.session.import_ahead(after=_PAGE_SECONDS)
    try:
        _sleep_until_interrupted()
    except KeyboardInterrupt:
        return _INTERRUPTED
    finally:
        ctx.session.cancel()
        app.close(verbose=False)
    return 0


def serve(ctx: AppContext, host: str, port: int, *, open_browser: bool = False) -> gr.Blocks:
    """Start serving in a background thread; `.close()` of what is returned stops it."""
    _reach_loopback_directly()
    app = build_app(ctx)
    app.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        run_history=False,
        footer_links=[],
        max_file_size=_UPLOAD_LIMIT,
        allowed_paths=[str(ctx.output_folder)],
        theme=build_theme(),
        css=CSS,
        head=HEAD,
        _frontend=False,  # no second look at the address, which a busy machine fails: it has 3 seconds to answer
    )
    return app


def choose_host(args: argparse.Namespace) -> str:
    """Where to listen: everywhere with --listen, else at --server-name, SERVER_NAME, or on this machine only."""
    if args.listen:
        return _EVERYWHERE
    return args.server_name or os.environ.get("SERVER_NAME") or _LOOPBACK


def choose_port(args: argparse.Namespace, host: str) -> tuple[int, str]:
    """The port to serve on, and a sentence (or "") when it is not the usual one.

    Raises UserError when the port that --server-port or SERVER_PORT names is taken or is no port number.
    """
    asked = str(args.server_port or os.environ.get("SERVER_PORT") or "")
    if asked:
        if not asked.isdecimal() or not 0 < int(asked) < 65536:
            raise UserError(f"{asked} is no port.", "Give --server-port a number from 1 to 65535.")
        if not _is_free(host, int(asked)):
            raise UserError(
                f"Port {asked} on {host} is taken or not allowed.",
                "Give another with --server-port, or leave it out to get a free one.",
            )
        return int(asked), ""
    for port in range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED):
        if _is_free(host, port):
            return port, "" if port == DEFAULT_PORT else f"Port {DEFAULT_PORT} is taken. "
    raise UserError(
        f"Ports {DEFAULT_PORT} to {DEFAULT_PORT + PORTS_TRIED - 1} on {host} are all taken.",
        "Give a free one with --server-port.",
    )


def _sleep_until_interrupted() -> None:
    while True:
        time.sleep(1)  # one endless wait could not be interrupted on Windows


def _is_free(host: str, port: int) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server itself does: a port that was closed a moment ago counts as free (not so named on Windows).
            if os.name != "nt":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError:
        return False
    return True


def _reach_loopback_directly() -> None:
    """Keep a configured proxy out of gradio's check that its own server answers."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, "localhost", _LOOPBACK]))
