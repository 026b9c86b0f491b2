"""OpenVINO's modules. They are imported from here, where it is kept from telling its makers that it was imported."""

import sys
from typing import Any

_known: dict[str, Any] = sys.modules
_known.setdefault("openvino_telemetry", None)  # as if it were not installed

import openvino  # noqa: E402
import openvino.opset13 as ops  # noqa: E402
from openvino import Node  # noqa: E402

__all__ = ["Node", "openvino", "ops"]
