"""The distribution's licence as SPDX; Flower's bundle format takes the table ``license = { file = ... }`` alone."""

from __future__ import annotations

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class SpdxLicence(MetadataHookInterface):
    """Replace the table when a distribution is built; ``pyproject.toml`` keeps it for Flower."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the expression and the file that holds the text."""
        metadata["license-files"] = [metadata["license"]["file"]]
        metadata["license"] = "Apache-2.0"
