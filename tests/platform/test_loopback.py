"""Ports for this machine's own services."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from mixer_platform import loopback
from mixer_platform.errors import MixerError
from mixer_platform.loopback import free_ports


def test_ports_in_a_row_that_can_be_listened_on():
    ports = free_ports(5)
    assert ports == range(ports[0], ports[0] + 5)
    for port in ports:
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


def test_connections_do_not_get_them():
    told = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not told.exists() or (first := int(told.read_text().split()[0])) < 30_000:
        pytest.skip("this system gives connections other ports than Linux comes with")
    assert free_ports(3)[-1] < first


def test_what_another_listens_on_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    taken = free_ports(4)
    monkeypatch.setattr(loopback, "_PORTS", (taken[0], taken[0] + 5))
    monkeypatch.setattr(random, "sample", lambda firsts, count: list(firsts))
    with socket.socket() as server:
        server.bind(("127.0.0.1", taken[1]))
        assert free_ports(2) == range(taken[2], taken[2] + 2)
        with pytest.raises(MixerError, match=r"no 4 ports in a row are free from .*; end what listens"):
            free_ports(4)
