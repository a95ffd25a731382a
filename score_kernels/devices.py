"""What a device is doing."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records this call."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
