"""Where job servers are: ``host:port`` as text and as a pair. Imports nothing."""

DEFAULT_PORT = 4730
"""PROTOCOL: IANA gave Gearman this one."""


def split_address(address: str) -> tuple[str, int]:
    """
    ``host:port``, ``host`` or ``[ipv6]:port`` as a pair.

    Raises:
        ValueError: It is none of these.
    """
    given: object = address
    if not isinstance(given, str):
        raise ValueError(f"{given!r} is not an address such as 127.0.0.1:4730")
    host, separator, port = address.rpartition(":")
    if not separator or address.endswith("]"):
        host, port = address, str(DEFAULT_PORT)
    bare = host.removeprefix("[").removesuffix("]")
    is_host = bool(bare) and (":" not in bare or host == f"[{bare}]")
    if not is_host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError(f"{address!r} is not an address such as 127.0.0.1:4730")
    return bare, int(port)
