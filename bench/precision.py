"""The dtypes that are measured: what tensors are made of, how far their products round, and where they exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Precision(NamedTuple):
    """dtype: of the tensors. eps: of the operands of products. tf32: float32 tensors, multiplied in tf32."""

    dtype: torch.dtype
    eps: float
    tf32: bool = False

    def absent(self, device: str) -> str | None:
        """Why a device does not have it, or None."""
        if not self.tf32 or (device.startswith("cuda") and torch.cuda.is_tf32_supported()):
            return None
        return "tf32 is a format of GPUs: here it would be float32, measured twice"

    @contextmanager
    def products(self) -> Iterator[None]:
        """Inside, torch multiplies float32 on a GPU in tf32, or in full where this is another precision."""
        matmul = torch.backends.cuda.matmul
        # The newer of two interfaces reads what either of them set; torch.compile reads the older one, so that one is set.
        before = matmul.fp32_precision == "tf32"
        if before == self.tf32:
            yield
            return
        matmul.allow_tf32 = self.tf32
        try:
            yield
        finally:
            matmul.allow_tf32 = before


DTYPES: dict[str, Precision] = {
    "float32": Precision(torch.float32, torch.finfo(torch.float32).eps),
    "tf32": Precision(torch.float32, 2.0**-10, tf32=True),
    "float64": Precision(torch.float64, torch.finfo(torch.float64).eps),
    "bfloat16": Precision(torch.bfloat16, torch.finfo(torch.bfloat16).eps),
    "float16": Precision(torch.float16, torch.finfo(torch.float16).eps),
}
