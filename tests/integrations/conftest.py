"""Tests inside agent frameworks, and of published clients: `make integrations`, each framework in
an environment of its own.

Where a framework is not installed its file is not collected.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

import moshi_c

FILES = {
    "pipecat": ["test_pipecat.py", "test_pipecat_live.py", "test_pipecat_realtime.py"],
    "livekit": [
        "test_livekit.py",
        "test_livekit_client.py",
        "test_livekit_live.py",
        "test_livekit_realtime.py",
    ],
    "fastrtc": ["test_fastrtc.py"],
    "openai": ["test_openai_live.py", "test_openai_realtime.py"],
}
collect_ignore = [
    file
    for name, files in FILES.items()
    if importlib.util.find_spec(name) is None
    for file in files
]


@pytest.fixture(scope="session")
def model() -> Iterator[moshi_c.Model]:
    """The model in the package."""
    with moshi_c.load() as model:
        yield model


@pytest.fixture
def single() -> Iterator[moshi_c.Model]:
    """The same with one slot, which tells whether it has been given back."""
    with moshi_c.load(max_sessions=1) as model:
        yield model
