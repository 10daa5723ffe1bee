"""The options of `tangent-peft demo`, and its start. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path
from typing import Any


def add_demo(commands: Any) -> None:
    """Adds the subcommand `demo` to those of the entry point."""
    parser = commands.add_parser(
        "demo",
        help="try axes on a page in the browser: sliders, two answers side by side, a sweep to click on, export",
        description=(
            "Serves a page on this machine only (127.0.0.1): a slider per axis, the answers of two mixes side by side, "
            "the linearity gap, a saved sweep whose points set the sliders, and the export of a mix."
        ),
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="folder of a saved axis, or of several; the axis is called like its folder, or as in name=PATH",
    )
    parser.add_argument("--base", help="folder or Hub name of the base model (default: the one that the axes name)")
    parser.add_argument("--sweep", type=Path, help="a saved sweep to show, such as the quickstart's sweep.json")
    parser.add_argument("--port", type=int, default=7860, help="TCP port of the page (default: %(default)s)")
    parser.add_argument("--no-browser", action="store_true", help="print the address, open no browser window")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    check_port(options.port)  # before the model takes its time
    from tangent_peft.cli.demo_loading import load_demo
    from tangent_peft.cli.demo_page import build_page, serve  # names the extra if gradio is missing

    def ready(address: str) -> None:
        sys.stdout.write(f"The demo runs at {address} on this machine only. Ctrl-C ends it.\n")
        sys.stdout.flush()

    session = load_demo(options.paths, options.base, options.sweep)
    serve(build_page(session), options.port, not options.no_browser, ready)
    return 0


def check_port(port: int) -> None:
    """Raises if the page can not be served on this port of the loopback address.

    Raises:
        ValueError: for what is no port number.
        OSError: for a port that is taken or reserved.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"{port} is no port number. Give --port a number from 1024 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(
                f"Port {port} of 127.0.0.1 can not be used ({error.strerror}). End the program that has it, or choose "
                f"another one: --port {port + 1 if port < 65535 else port - 1}"
            ) from None
