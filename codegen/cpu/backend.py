"""The cpu backend: serving graphs become native plans, captured graphs run on ATen.

Needs a C++ compiler once per machine; where there is none the reference backend runs instead, with
a note. So does the lowering of a graph that no native plan can run (float64).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphopt.codegen.backend import BackendKind, check_weights
from graphopt.codegen.cpu.abi import NativeLibrary
from graphopt.codegen.cpu.build import load_library
from graphopt.codegen.cpu.executable import CpuServing, lower_serving, lowering_of
from graphopt.codegen.cpu.packing import KernelWeight, pack_dense, pack_low_bit
from graphopt.codegen.reference import ReferenceForward, ReferenceServing
from graphopt.errors import BackendError
from graphopt.ir.graph import Graph, argument
from graphopt.ir.serving_form import check_serving_form
from graphopt.ir.weights import PackedWeight
from graphopt.ops import embedding_wq, linear_wq
from graphopt.record.calls import KernelCall
from graphopt.record.report import LOGGER


class CpuBackend:
    """See the module docstring.

    threads: of the native pool; None: as many as torch uses. note: is told of a fallback.
    """

    name = "cpu"

    def __init__(
        self,
        library: NativeLibrary,
        threads: int | None = None,
        note: Callable[[str], None] = LOGGER.warning,
    ) -> None:
        self._library, self._note = library, note
        self._threads = torch.get_num_threads() if threads is None else threads

    def lower(self, graph: Graph) -> ReferenceForward:
        """Captured graphs run on ATen's kernels, op by op."""
        return ReferenceForward(graph)

    def lower_serving(
        self, graph: Graph, kv_dtype: torch.dtype | None, max_context: int | None
    ) -> CpuServing | ReferenceServing:
        """Pack the weights into kernel layouts and plan the step.

        The graph's own copies of the packed weights are released one by one (they become meta
        tensors); `CpuServing.original_weights` gives them back, bit for bit.
        """
        check_weights(graph)
        check_serving_form(graph)
        readers = low_bit_readers(graph)

        def pack(name: str) -> KernelWeight:
            if name in readers:
                packed = pack_low_bit(readers[name])
                parts = [f"{name}.{part}" for part in ("codes", "scale", "zero")]
            else:
                packed = pack_dense(graph.weights[name])
                parts = [name]
            for part in parts:
                if part in graph.weights:
                    graph.weights[part] = graph.weights[part].to("meta")
            readers.pop(name, None)
            return packed

        library, threads = self._library, self._threads
        try:
            return lower_serving(graph, library, pack, kv_dtype, max_context, threads)
        except BackendError as error:
            # Planning comes before packing: the graph still has its weights.
            self._note(f"{graph.name} runs on the slow reference backend: {error}")
            return ReferenceServing(graph, kv_dtype, max_context)


def low_bit_readers(graph: Graph) -> dict[str, PackedWeight]:
    """Weight name -> packed weight, as the low-bit ops of a graph read it."""
    found: dict[str, PackedWeight] = {}
    for op in (linear_wq.SPEC.overload, embedding_wq.SPEC.overload):
        for node in graph.calls(op):
            codes, scale, zero = (
                argument(node, part) for part in ("codes_NKp", "scale_NG", "zero_NG")
            )
            name = str(codes.target).removesuffix(".codes")
            found[name] = PackedWeight(
                int(argument(node, "bits")),
                int(argument(node, "group")),
                graph.weights[str(codes.target)],
                graph.weights[str(scale.target)],
                None if zero is None else graph.weights[str(zero.target)],
                int(argument(node, "offset")),
                "",
            )
    return found


def kernel_calls(graph: Graph) -> tuple[KernelCall, ...]:
    """What the native plan of a serving graph runs; no weights are read."""
    return lowering_of(graph).run().kernel_calls


KIND = BackendKind(
    name=CpuBackend.name,
    make=lambda threads, note: CpuBackend(load_library(), threads, note),
    kernel_calls=kernel_calls,
    has_threads=True,
    falls_back=True,
)
