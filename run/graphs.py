"""A function that changes tensors in place, captured as CUDA graphs: its kernels are then launched all at once.

A graph replays kernels at the addresses of its capture, with the numbers of its capture. Therefore change the tensors
only in place.
"""

import sys
from collections.abc import Callable, Iterable

import torch


class Graphs:
    """`step(*bucket)` as CUDA graphs, one for each of the buckets. Where a capture fails, the step runs eagerly."""

    def __init__(self, step: Callable, buckets: Iterable[tuple[int, ...]]):
        """The step is also called here, twice for each bucket, so the tensors must hold nothing of value yet."""
        self.step, self.graphs = step, {}
        try:
            pool, side, current = torch.cuda.graph_pool_handle(), torch.cuda.Stream(), torch.cuda.current_stream()
            for bucket in sorted(buckets, reverse=True):  # the largest first: the others fit into its memory
                side.wait_stream(current)
                with torch.cuda.stream(side):  # warm-up
                    step(*bucket)
                current.wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    step(*bucket)
                self.graphs[bucket] = graph
        except Exception as error:  # Triton's errors are no RuntimeErrors
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"no CUDA graphs ({reason}); decoding eagerly", file=sys.stderr, flush=True)
            if torch.cuda.is_available():
                torch.cuda.set_stream(current)  # a capture that fails may leave its own
                torch.cuda.synchronize()

    def __call__(self, *bucket: int) -> None:
        self.graphs[bucket].replay() if bucket in self.graphs else self.step(*bucket)
