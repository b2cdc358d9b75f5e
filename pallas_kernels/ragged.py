# SPDX-License-Identifier: Apache-2.0
"""`Ragged`: how many query tokens each row of a batch has, and which blocks hold its KV.

One step of a server mixes rows that decode one token with rows that process a chunk of their prompt. The attention
ops take the query tokens of all rows as one array without padding between rows, and a `Ragged` that describes them.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checks

type Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Ragged:
    """A ragged batch. Arrays are int32; all but `decode_only` are data, so one program serves every batch of a shape.

    Row r owns the query tokens [cu_q_lens[r], cu_q_lens[r + 1]). They are the last tokens of the row: their positions
    are kv_len - q_len ... kv_len - 1, and their keys and values are already in the pool.

    Rows [0, decode rows) have one query token each, rows [decode rows, rows) any number, and later rows are padding.
    No op reads the entries of padding rows, nor table entries beyond a row's length or entirely before its window.
    """

    block_tables: Array  # [rows, width]  block ids of each row, in order
    kv_lens: Array  # [rows]  KV tokens of each row, including the new ones
    cu_q_lens: Array  # [rows + 1]  cumulative number of query tokens
    distribution: Array  # [2]  number of decode rows, number of rows
    # Promises that every row is a decode row, so that nothing is compiled for the others.
    decode_only: bool = field(default=False, metadata=dict(static=True))

    @property
    def max_rows(self) -> int:
        """Rows that the arrays have room for, padding included."""
        return self.block_tables.shape[0]

    def arrays(self) -> dict[str, jax.Array]:
        """The arrays by name, as jax arrays."""
        names = ("block_tables", "kv_lens", "cu_q_lens", "distribution")
        return {name: jnp.asarray(getattr(self, name)) for name in names}

    def checked(self, *, tokens: int, blocks: int, block_size: int) -> "Ragged":
        """This batch as jax arrays, after `check`: what an op does first."""
        batch = replace(self, **self.arrays())
        batch.check(tokens=tokens, blocks=blocks, block_size=block_size)
        return batch

    def check(self, *, tokens: int, blocks: int, block_size: int) -> None:
        """Raise ValueError unless the batch fits `tokens` query tokens and a pool of this size.

        Shapes and dtypes are always checked, values only where they are known: inside jax.jit they are not, so check
        numpy arrays before you pass them to a jitted function. JAX clamps or wraps an index that is out of range.
        """
        self._check_shapes(tokens)
        if checks.is_concrete(self.block_tables, self.kv_lens, self.cu_q_lens, self.distribution):
            self._check_rows(tokens)
            self._check_tables(blocks, block_size)

    def _check_shapes(self, tokens: int) -> None:
        checks.check_rank("block_tables", self.block_tables, "rows width")
        rows, width = self.block_tables.shape
        checks.require(rows > 0, f"block_tables has {rows} rows, expected at least 1; rows may be padding")
        checks.require(width > 0, f"block_tables is too narrow: {width} blocks per row, expected at least 1")
        checks.check_shape("kv_lens", self.kv_lens, (rows,), f"block_tables has {rows} rows")
        checks.check_shape("cu_q_lens", self.cu_q_lens, (rows + 1,), f"rows + 1, block_tables has {rows} rows")
        checks.check_shape("distribution", self.distribution, (2,), "decode rows, all rows")
        for name in ("block_tables", "kv_lens", "cu_q_lens", "distribution"):
            checks.check_int32(name, getattr(self, name))
        checks.require(tokens > 0, f"q has {tokens} tokens, expected at least 1")
        checks.require(
            not self.decode_only or tokens == rows,
            f"q has {tokens} tokens in a decode-only step of {rows} rows, expected one per row",
        )

    def _check_rows(self, tokens: int) -> None:
        decode_rows, rows = (int(x) for x in np.asarray(self.distribution))
        found = f"distribution is ({decode_rows}, {rows})"
        checks.require(
            0 <= decode_rows <= rows <= self.max_rows, f"{found}, expected 0 <= decode rows <= rows <= {self.max_rows}"
        )
        checks.require(not self.decode_only or decode_rows == rows, f"{found} in a decode-only step, expected equal")
        lens, cu = (np.asarray(array).astype(np.int64) for array in (self.kv_lens, self.cu_q_lens))
        lens, q_lens = lens[:rows], np.diff(cu[: rows + 1])
        checks.require(int(cu[0]) == 0, f"cu_q_lens starts at {int(cu[0])}, expected 0")
        bad = np.flatnonzero(q_lens < 0)[:1]
        checks.require(bad.size == 0, f"cu_q_lens falls at row {bad}: {cu[bad]} then {cu[bad + 1]}, it must not fall")
        checks.require(int(cu[rows]) <= tokens, f"cu_q_lens ends at {int(cu[rows])}, but q has {tokens} tokens")
        bad = np.flatnonzero((lens < q_lens) & (lens != 0))[:1]
        checks.require(bad.size == 0, f"row {bad} has kv_len {lens[bad]}, less than its {q_lens[bad]} query tokens")
        bad = np.flatnonzero(q_lens[:decode_rows] != 1)[:1]
        checks.require(bad.size == 0, f"decode row {bad} has {q_lens[bad]} query tokens, expected 1")

    def _check_tables(self, blocks: int, block_size: int) -> None:
        width, rows = self.block_tables.shape[1], int(np.asarray(self.distribution)[1])
        lens, tables = np.asarray(self.kv_lens)[:rows].astype(np.int64), np.asarray(self.block_tables)[:rows]
        bad = np.flatnonzero(lens > width * block_size)[:1]
        checks.require(
            bad.size == 0,
            f"block_tables is too narrow: row {bad} has kv_len {lens[bad]}, "
            f"{width} blocks of {block_size} hold {width * block_size}",
        )
        used = np.arange(width)[None, :] * block_size < lens[:, None]
        wrong = np.argwhere(used & ((tables < 0) | (tables >= blocks)))
        if wrong.size:
            row, column = wrong[0]
            raise ValueError(
                f"block_tables[{row}, {column}] is {tables[row, column]}, "
                f"expected 0 to {blocks - 1}: the pool has {blocks} blocks"
            )
