"""The address that the server listens on, and how many connections the system allows. Imports nothing heavy."""

import resource
import socket

from open_rm.errors import UserError, quote_error
from open_rm.serving.limits import ServingFlags


def listen(flags: ServingFlags) -> socket.socket:
    """A socket that is bound, so that nobody else takes the port while the model is loaded; it does not listen yet.

    Raises:
        UserError: no such address, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            flags.host, flags.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {flags.host}: no such address ({quote_error(error)})") from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(
            f"--host {flags.host} --port {flags.port}: cannot be listened on ({error.strerror}); pass another --port"
        ) from error
    bound.setblocking(False)
    return bound


def url_of(listener: socket.socket) -> str:
    """http://HOST:PORT."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def allow_connections(count: int) -> list[str]:
    """Raise the limit of open files to what so many connections need; a line where that is not allowed."""
    needed, (soft, hard) = count + 256, resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return []
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed >= needed:
        return []
    return [f"the system allows {allowed} open files, fewer than --max_connections {count}; raise it with ulimit -n"]
