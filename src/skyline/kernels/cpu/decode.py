"""The ends of a decode step: functions of the runner's recorded steps, not ops of a model.

R requests compute one token each, that at starts int64 [R] of slots int64 [R].
"""

from __future__ import annotations

from torch import Tensor

from skyline.kernels.cpu.native import library


def inputs(
    ids: Tensor, positions: Tensor, context_lens: Tensor, slots: Tensor, starts: Tensor, token_ids: Tensor
) -> None:
    """Fill ids and positions int64 [R] and context_lens int32 [R] from token_ids int32 [slots, positions]."""
    library().decode_inputs(ids, positions, context_lens, slots, starts, token_ids)


def places(
    slot_mapping: Tensor, tables: Tensor, block_tables: Tensor, slots: Tensor, starts: Tensor, block_size: int
) -> None:
    """Fill slot_mapping int64 [R], where the tokens go in a cache, and tables int32 [R, blocks] with the slots' rows of
    block_tables [slots, blocks]."""
    library().decode_places(slot_mapping, tables, block_tables, slots, starts, block_size)


def outputs(token_ids: Tensor, slots: Tensor, starts: Tensor, tokens: Tensor) -> None:
    """Put tokens int64 [R] behind those of the step in token_ids."""
    library().decode_outputs(token_ids, slots, starts, tokens)
