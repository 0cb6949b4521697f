"""Stands in for SGLang's kernels on a CPU, of which there is no wheel: enough to be imported, nothing to be called.

SGLang imports these names at start and uses them for speculative decoding and with AMX alone. The tests reach neither;
a call would be an error here, never a wrong number.
"""

from typing import Any, NoReturn

__version__ = "0.0.0+import.only"

_NAMES = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)


def _unavailable(name: str) -> Any:
    def call(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU wheel; this stand-in can only be imported")

    return call


globals().update({name: _unavailable(name) for name in _NAMES})
