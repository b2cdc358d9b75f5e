# SPDX-License-Identifier: Apache-2.0
"""Which host names are IP addresses, and which of them lead to this machine alone."""

import ipaddress


def is_address(name: str) -> bool:
    """Whether it is an IP address as a Host header writes it."""
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
