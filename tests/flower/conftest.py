"""What all tests of the adapters share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def _no_garbage_collection_per_reply(monkeypatch):
    """Some of Flower's strategies collect garbage after every reply: half a second each with torch loaded."""
    monkeypatch.setattr("flwr.app.message.arrayrecord.gc", SimpleNamespace(collect=lambda: 0))
