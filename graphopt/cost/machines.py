"""Peak rates of some machines, for roofline bounds: what a node takes at the very least.

Dense rates (no structured sparsity) as their makers publish them:

    H200        NVIDIA H200 Tensor Core GPU data sheet, SXM
    H100 SXM    NVIDIA H100 Tensor Core GPU data sheet, SXM
    A100 80 GB  NVIDIA A100 Tensor Core GPU data sheet, SXM, 80 GB
    L4          NVIDIA L4 Tensor Core GPU data sheet
    AVX2, 2 cores   computed, for a CPU without a name: 3 GHz, two 256-bit units a core. Floats:
                a fused multiply-add a cycle and unit, 64 operations a core in f16 and bf16 too,
                which are widened to f32. int8: 32 products take three instructions. Memory: one
                channel of DDR4-3200.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Bound = Literal["compute", "memory"]
_TERA = 1e12


@dataclass(frozen=True, slots=True)
class Machine:
    """Peaks of one machine.

    matrix: operations a second of matrix products, by dtype of the operands (`f32`, `bf16`, ...).
    vector: operations a second of everything else. bytes_per_second: of main memory.
    """

    name: str
    matrix: Mapping[str, float]
    vector: float
    bytes_per_second: float

    def peak(self, unit: str) -> float:
        """Operations a second of `unit`: a dtype of matrix products, or "vector".

        A dtype that the machine has no rate for runs at the rate of f32.
        """
        return self.vector if unit == "vector" else self.matrix.get(unit, self.matrix["f32"])

    def bound(self, flops: float, nbytes: float, unit: str = "vector") -> tuple[float, Bound]:
        """(least seconds, what limits): the larger of arithmetic and traffic."""
        arithmetic, traffic = flops / self.peak(unit), nbytes / self.bytes_per_second
        return (arithmetic, "compute") if arithmetic > traffic else (traffic, "memory")


_HOPPER = {
    "f64": 67 * _TERA,
    "f32": 67 * _TERA,
    "f16": 989.5 * _TERA,
    "bf16": 989.5 * _TERA,
    "f8e4m3": 1979 * _TERA,
    "f8e5m2": 1979 * _TERA,
    "i8": 1979 * _TERA,
}
MACHINES = (
    Machine("H200", _HOPPER, 67 * _TERA, 4.8e12),
    Machine("H100 SXM", _HOPPER, 67 * _TERA, 3.35e12),
    Machine(
        "A100 80 GB",
        {
            "f64": 19.5 * _TERA,
            "f32": 19.5 * _TERA,
            "f16": 312 * _TERA,
            "bf16": 312 * _TERA,
            "i8": 624 * _TERA,
        },
        19.5 * _TERA,
        2.039e12,
    ),
    Machine(
        "L4",
        {
            "f32": 30.3 * _TERA,
            "f16": 121 * _TERA,
            "bf16": 121 * _TERA,
            "f8e4m3": 242.5 * _TERA,
            "f8e5m2": 242.5 * _TERA,
            "i8": 242.5 * _TERA,
        },
        30.3 * _TERA,
        300e9,
    ),
    Machine("AVX2, 2 cores", {"f64": 96e9, "f32": 192e9, "i8": 256e9}, 192e9, 25.6e9),
)
