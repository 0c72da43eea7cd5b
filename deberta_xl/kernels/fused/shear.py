"""Between pairs (query, key) and pairs (query or key, offset), in Triton.

The pair (i, j) has the offset i − j. Offsets come in *chunks* of as many as a tile has queries or keys. Those of a
square tile lie in two chunks that follow one another: the products with the rows of both give the tile's terms, and the
gradients of two tiles give all of a chunk. Shifting them into place is a shear, a one-dimensional `tl.gather`, which
goes through shared memory: a store of both and a load for each element. (The two-dimensional one becomes 16 shuffles
for each element.) The elements lie in blocks of 8 × 8, so that what a matrix product leaves in the registers is stored
and loaded without bank conflicts, and u keeps the index a sum of what a lane knows and what the compiler knows.

Shape suffixes of this file:
    I queries of a tile   J keys of a tile   K offsets of a chunk
"""

import triton
import triton.language as tl


@triton.jit
def in_blocks(x: tl.tensor, block: tl.constexpr) -> tl.tensor:
    """[rows, columns] as [rows // 8, columns // 8, 8, 8]."""
    return tl.permute(tl.reshape(x, [block // 8, 8, block // 8, 8]), (0, 2, 1, 3))


@triton.jit
def side_by_side(left: tl.tensor, right: tl.tensor, block: tl.constexpr) -> tl.tensor:
    """Two matrices in blocks as one of twice the columns, as a line of its blocks."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 4, 1, 2, 3)), [2 * block * block])


@triton.jit
def one_above_the_other(upper: tl.tensor, lower: tl.tensor, block: tl.constexpr) -> tl.tensor:
    """Two matrices in blocks as one of twice the rows, as a line of its blocks."""
    return tl.reshape(tl.permute(tl.join(upper, lower), (4, 0, 1, 2, 3)), [2 * block * block])


@triton.jit
def take(line: tl.tensor, index: tl.tensor, block: tl.constexpr) -> tl.tensor:
    """The elements of a line at `index`, a square."""
    return tl.reshape(tl.gather(line, tl.reshape(index, [block * block]), 0), [block, block])


@triton.jit
def slide(left: tl.tensor, right: tl.tensor, block: tl.constexpr, queries_first: tl.constexpr) -> tl.tensor:
    """y[i, c] = x[i, block + i − c] of two squares side by side, in blocks; [c, i] without `queries_first`.

    Of products (query, offset) of a lower and a higher chunk: (query, key). Of gradients (query, key) of two tiles:
    (query, offset) of the chunk that begins with the second one's i0 − j0.
    """
    i, c = tl.arange(0, block)[:, None], tl.arange(0, block)[None, :]
    if not queries_first:
        i, c = tl.arange(0, block)[None, :], tl.arange(0, block)[:, None]
    u = (i & 7) - (c & 7) + 8
    column_block = (i >> 3) - (c >> 3) + (block // 8 - 1) + (u >> 3)
    index = ((i >> 3) * (block // 4) + column_block) * 64 + (i & 7) * 8 + (u & 7)
    return take(side_by_side(left, right, block), index, block)


@triton.jit
def shear_keys(lower: tl.tensor, higher: tl.tensor, block: tl.constexpr) -> tl.tensor:
    """Products (offset, key) of a lower and a higher chunk, in blocks -> (query, key): y[i, j] = x[block + i − j, j]
    of one above the other."""
    i, j = tl.arange(0, block)[:, None], tl.arange(0, block)[None, :]
    u = (i & 7) - (j & 7) + 8
    row_block = (i >> 3) - (j >> 3) + (block // 8 - 1) + (u >> 3)
    index = (row_block * (block // 8) + (j >> 3)) * 64 + (u & 7) * 8 + (j & 7)
    return take(one_above_the_other(lower, higher, block), index, block)


@triton.jit
def unshear_keys(upper: tl.tensor, lower: tl.tensor, block: tl.constexpr, keys_first: tl.constexpr) -> tl.tensor:
    """Gradients (query, key) of two tiles, one above the other, in blocks -> (key, offset) of the chunk that ends
    before the second one's i0 − j0: y[j, k] = x[j + k, j]; [k, j] without `keys_first`."""
    j, k = tl.arange(0, block)[:, None], tl.arange(0, block)[None, :]
    if not keys_first:
        j, k = tl.arange(0, block)[None, :], tl.arange(0, block)[:, None]
    u = (j & 7) + (k & 7)
    row_block = (j >> 3) + (k >> 3) + (u >> 3)
    index = (row_block * (block // 8) + (j >> 3)) * 64 + (u & 7) * 8 + (j & 7)
    return take(one_above_the_other(upper, lower, block), index, block)


@triton.jit
def as_operand(x: tl.tensor, block: tl.constexpr) -> tl.tensor:
    """The same square, held by the threads that multiply it.

    By a product with nothing, which says to Triton where to gather it to: it would go through shared memory once more.
    """
    nothing = tl.full([block, 16], 0.0, x.dtype)
    return tl.dot(nothing, tl.trans(nothing), x.to(tl.float32)).to(x.dtype)
