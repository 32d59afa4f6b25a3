"""The name and version that reports and manifests carry."""

from __future__ import annotations

__version__ = "0.1.0"
TOOL = f"resnet-export {__version__}"
