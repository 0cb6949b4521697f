"""The distillation head: hidden states → divergence → gradients, never holding logits of all rows."""

from kdflow.ops.cross_entropy import cross_entropy_sum
from kdflow.ops.divergence_sum import divergence_sum, form_of
from kdflow.ops.fused import kernel_chunk
from kdflow.ops.row_sum import chunk_rows, even_rows_per_chunk, row_sum, rows_per_chunk

__all__ = [
    "chunk_rows",
    "cross_entropy_sum",
    "divergence_sum",
    "even_rows_per_chunk",
    "form_of",
    "kernel_chunk",
    "row_sum",
    "rows_per_chunk",
]
