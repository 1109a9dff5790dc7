"""The front door: load a model, build the page, serve it. `python app.py --help` lists the flags."""

import os

if os.environ.get("SPACES_ZERO_GPU"):  # on a Space with ZeroGPU: before torch and gradio, it lends them its GPU
    import spaces  # noqa: F401

import argparse
import socket
import sys
import time
from pathlib import Path
from typing import Any

from safety.errors import UserError

ZERO_GPU = "spaces" in sys.modules


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the flags; argparse exits with a message of its own on an unknown one."""
    parser = argparse.ArgumentParser(description="One vision-language model, undefended and defended, side by side.")
    # A Space cannot pass flags: its variables give their defaults.
    def given(name: str, otherwise: str | None = None) -> str | None:
        return os.environ.get(name) or otherwise  # an empty one is none

    parser.add_argument(
        "--model", default=given("DEMO_MODEL", "miniature"), help="miniature (default), a Hugging Face id, or a folder"
    )
    parser.add_argument(
        "--quantization",
        default=given("DEMO_QUANTIZATION"),
        choices=("none", "bf16", "int8", "nf4"),
        help="default: what suits the device",
    )
    parser.add_argument(
        "--revision", default=given("DEMO_REVISION"), help="branch, tag or commit of a Hugging Face model"
    )
    parser.add_argument(
        "--artifacts",
        default=given("DEMO_ARTIFACTS"),
        metavar="DIR",
        help="what was calibrated for the model (default: what is shipped for it)",
    )
    parser.add_argument(
        "--host",
        default=given("GRADIO_SERVER_NAME", "127.0.0.1"),
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    parser.add_argument("--port", default=given("GRADIO_SERVER_PORT", "7860"), help="default: %(default)s")
    return parser.parse_args(arguments)


def check_address(host: str, port: str) -> int:
    """Return the port as a number once it is known that the address can be listened on.

    Raises:
        UserError: the port is not one, the host is unknown, or the port is in use.
    """
    if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise UserError(f"--port must be a number from 1 to 65535, but it is {port!r}.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host!r} is not an address of this machine. Try 127.0.0.1 or 0.0.0.0.") from None
    except PermissionError:
        raise UserError(f"Port {port} is reserved for the system. Choose one above 1023 with --port.") from None
    except OSError as error:
        raise UserError(
            f"Cannot listen on {host}, port {port} ({error.strerror}). Another program may use that port: "
            "choose a different one with --port."
        ) from None
    return int(port)


def main(arguments: list[str] | None = None) -> int:
    """Run the app until it is interrupted, at any time. Returns the exit status."""
    flags = parse(arguments)
    try:
        return serve(flags)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


def serve(flags: argparse.Namespace) -> int:
    """Open the page, load the model behind it, and serve until interrupted.

    Raises:
        UserError: a flag or variable is wrong.
    """
    port = check_address(flags.host, flags.port)
    if flags.artifacts is not None and not Path(flags.artifacts).is_dir():
        raise UserError(f"--artifacts: there is no folder {flags.artifacts}. Give one that calibration wrote.")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
    print(f"Opening the page and loading {flags.model} …", flush=True)
    from safety.ui import Host, build_page, launch_options  # seconds of imports: not before the flags are good
    from safety.ui.host import Choice
    from safety.ui.mode import mode_of, trust_proxies
    from safety.ui.space import use_zero_gpu

    host = Host(mode=mode_of())
    choice = Choice(flags.model, flags.quantization, flags.revision, flags.artifacts)
    if ZERO_GPU:  # there, the model has to be in memory before the launch
        host.switch(choice)
        host.source = use_zero_gpu(host.ready())
    else:
        host.start(choice)
    trust_proxies()
    address = f"[{flags.host}]" if ":" in flags.host else flags.host  # IPv6, as URLs and Gradio write it
    shown = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(address, address)
    page = build_page(host)
    page.launch(server_name=address, server_port=port, quiet=True, prevent_thread_lock=True, **launch_options())
    print(f"Open http://{shown}:{port} in a browser; press Ctrl+C here to stop.", flush=True)
    report(host)
    page.block_thread()
    return 0


def report(host: Any) -> None:
    """Tell the terminal how the loading goes, too; returns when it is over."""
    told = ""
    while True:
        status = host.status()
        if status["message"] and status["message"] != told:
            told = status["message"]
            print(f"  {told}", flush=True)
        if status["state"] != "working":
            break
        time.sleep(0.2)
    if host.engine is not None:
        print(f"Ready: {host.engine.lvlm.label}.", flush=True)


if __name__ == "__main__":
    sys.exit(main())
