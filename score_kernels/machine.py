"""What a call runs on, as plain data: the planner sees nothing else of it, so any machine can be planned for on any other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """A compiled CUDA kernel: `index` in the module's list, what it computes, and its launch (csrc/kernels.h).

    direction: "forward" or "backward". arch: 80 or 90, the capability that it is written for. columns: the largest D.
    chunk: hidden features at a time. rows, threads, shared: of a block, the last in bytes. stages: chunks of weights in
    shared memory. accumulates: of backward, a block keeps the gradients of one set of weights in registers.
    """

    index: int
    direction: str
    op: str
    arch: int
    dtype: str
    columns: int
    gated: bool
    activations: tuple[str, ...]
    chunk: int
    rows: int
    threads: int
    shared: int
    stages: int
    accumulates: bool = False

    def holds(self, features: int, hidden: int, sets: int) -> bool:
        """Whether it is for this D, H and L. What accumulates has registers for one set, and H padded as D is."""
        padded = self.columns - self.chunk < hidden <= self.columns
        return features <= self.columns and (not self.accumulates or (sets == 1 and padded))

    @property
    def partials(self) -> tuple[int, int, int]:
        """The shape of what a block that accumulates keeps: csrc/params.h."""
        return 2, self.columns + 4, self.columns

    def __str__(self) -> str:
        parts = f"{self.rows} rows x {self.chunk} hidden features, {self.threads} threads, {self.shared / 1024:.0f} KiB shared"
        kept = ", weight gradients in registers" if self.accumulates else ""
        return f"blocks of {parts}{kept}, compiled for sm_{self.arch}"


@dataclass(frozen=True)
class Machine:
    """What a call runs on.

    device: "cpu", "cuda" or "hip", else torch's device type. arch: compute capability, 90 for 9.0. multiprocessors,
    shared_memory: of the device, the latter in bytes for one program. tf32: torch may use it for float32 products.
    triton, cuda: why this backend cannot run here, or None. kernels: those of cuda that run on this device.
    verified: (backend, arch) of the kernels that have been compared with float64 on hardware.
    """

    device: str = "cpu"
    arch: int = 0
    multiprocessors: int = 0
    shared_memory: int = 0
    tf32: bool = False
    triton: str | None = "it needs a GPU"
    cuda: str | None = "it needs a GPU"
    kernels: tuple[Kernel, ...] = ()
    verified: frozenset[tuple[str, int]] = frozenset()

    def kernel(
        self,
        direction: str,
        op: str,
        features: int,
        hidden: int,
        gated: bool,
        activation: str,
        dtype: str,
        stages: int,
        sets: int,
    ) -> tuple[Kernel | None, str | None]:
        """The CUDA kernel of one pass of a call, or None and why there is none."""
        if self.cuda is not None:
            return None, self.cuda
        if stages > 1:
            return None, "its kernels are for one stage: Euler's, or replace"
        block = (direction, op, gated)
        found = [k for k in self.kernels if (k.direction, k.op, k.gated) == block and activation in k.activations]
        if not found:
            return None, f"it has no kernel of {'gated ' if gated else ''}{op} with {activation} that runs {direction} here"
        dtypes = sorted({k.dtype for k in found})
        if dtype not in dtypes:
            return None, f"its kernels are for {' and '.join(dtypes)}, not for {dtype}"
        widest = max(k.columns for k in found)
        if features > widest:
            return None, f"D = {features} is wider than its kernels ({widest} at most)"
        able = [k for k in found if k.dtype == dtype and k.holds(features, hidden, sets)]
        kernel = min(able, key=lambda k: (k.columns, not k.accumulates))
        return kernel, self.too_large(kernel.shared)

    def too_large(self, shared: int) -> str | None:
        """Why a launch with so much shared memory fails, or None."""
        if shared <= self.shared_memory:
            return None
        return f"it needs {shared} bytes of shared memory, this device has {self.shared_memory}"

    def __hash__(self) -> int:
        """Of a few fields: plans are looked up by it in every call."""
        return hash((self.device, self.arch, self.tf32))


# Kernels with committed hardware results, which `auto` needs to choose them. None yet.
VERIFIED: frozenset[tuple[str, int]] = frozenset()

# What Triton's interpreter is planned as.
INTERPRETER = Machine("cpu", multiprocessors=2, shared_memory=1 << 20, tf32=True, triton=None)
