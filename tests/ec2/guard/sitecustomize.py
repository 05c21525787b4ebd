"""End a process that connects to, or looks up, anything but this machine."""

import os
import sys

_HERE = ("", "None", "localhost", os.uname().nodename)


def _guard(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host, what = str(arguments[1][0]), "connects to"
    elif event == "socket.getaddrinfo":
        host, what = str(arguments[0]), "looks up"
    else:
        return
    if not host.startswith("127.") and host not in _HERE:
        os.write(2, f"{what} {host}\n".encode())
        os._exit(98)


sys.addaudithook(_guard)
