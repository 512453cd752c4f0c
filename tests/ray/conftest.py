"""One local cluster for all tests of this folder: starting Ray and Serve takes longer than most of them."""

from __future__ import annotations

import socket
import uuid

import pytest
import ray

from toolrl_ray.local_ray import start_local
from tools_service.config import HttpConfig
from tools_service.serve_start import start_serve

NUM_CPUS = 4  # as Ray counts them, whatever the machine has
START_S = 120.0


@pytest.fixture(scope="session")
def cluster():
    """Serve runs on it with its HTTP proxy, which is on loopback; the value is where."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        http = HttpConfig(port=free.getsockname()[1])
    start_local(num_cpus=NUM_CPUS, namespace=f"tools-{uuid.uuid4().hex}", log_to_driver=False)
    try:
        start_serve(http, START_S)
        yield http
    finally:
        ray.shutdown()
