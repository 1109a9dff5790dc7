"""The front door: load a model, build the page, serve it. `python app.py --help` lists the flags."""

import argparse
import os
import socket
import sys

from safety.errors import UserError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the flags; argparse exits with a message of its own on an unknown one."""
    parser = argparse.ArgumentParser(description="One vision-language model, undefended and defended, side by side.")
    parser.add_argument("--model", default="miniature", help="miniature (default) or a Hugging Face model id")
    parser.add_argument(
        "--quantization", choices=("none", "bf16", "int8", "nf4"), help="default: what suits the device"
    )
    parser.add_argument(
        "--host",
        default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    parser.add_argument("--port", default=os.environ.get("GRADIO_SERVER_PORT", "7860"), help="default: %(default)s")
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
    """Run the app until it is interrupted. Returns the exit status."""
    flags = parse(arguments)
    try:
        port = check_address(flags.host, flags.port)
        print(f"Loading {flags.model} …", flush=True)
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
        from safety.artifacts import load_artifacts  # seconds of imports: not before the flags are known to be good
        from safety.engine import Engine
        from safety.lvlm import load
        from safety.ui import build_page, launch_options

        lvlm = load(flags.model, flags.quantization, progress=lambda line: print(f"  {line}", flush=True))
        engine = Engine(lvlm, load_artifacts(lvlm))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    shown = "127.0.0.1" if flags.host in ("0.0.0.0", "::") else flags.host
    print(f"Ready: {lvlm.label}. Open http://{shown}:{port} in a browser; press Ctrl+C here to stop.", flush=True)
    build_page(engine).launch(server_name=flags.host, server_port=port, quiet=True, **launch_options())
    return 0


if __name__ == "__main__":
    sys.exit(main())
