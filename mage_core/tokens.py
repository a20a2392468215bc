"""Token ids: what a VQ-VAE calls a piece of an image, one code's number or the numbers of several codes in one.

With `groups` > 1 a patch is cut into as many blocks, and each block has a code of its own: product quantisation (Jégou
et al. 2011). The token's id is then a number of that many digits in base `codebook_size`, lowest first: ids keep one
shape, (b t h w), and equal ids are equal tokens, whatever the number of groups. Id 0 is the background.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def check_tokens(name: str, codebook_size: int, groups: int) -> None:
    """ValueError where tokens of `groups` codes have more different ids than 62 bits can tell apart."""
    if codebook_size ** groups > 2 ** 62:
        raise ValueError(f"{name} has {groups} groups of {codebook_size} codes: the ids of such tokens need more than "
                         "62 bits; take fewer groups or codes")


def split_ids(token_ids: Tensor, codebook_size: int, groups: int) -> Tensor:
    """Token ids (...) -> the number of each group's code (... groups), int64."""
    if groups == 1:
        return token_ids[..., None]
    powers = codebook_size ** torch.arange(groups, device=token_ids.device)
    return token_ids[..., None] // powers % codebook_size


def join_ids(codes: Tensor, codebook_size: int) -> Tensor:
    """The inverse of `split_ids`: the numbers of codes (... groups) -> token ids (...)."""
    return (codes * codebook_size ** torch.arange(codes.shape[-1], device=codes.device)).sum(-1)


def code_vectors(token_ids: Tensor, codebook: Tensor, groups: int = 1) -> Tensor:
    """Token ids (...), codebook (k e) -> code vectors (... e), whose channels the groups share out among them."""
    if groups == 1:
        return F.embedding(token_ids, codebook)
    codes = split_ids(token_ids, len(codebook), groups)
    return codebook.unflatten(1, (groups, -1))[codes, torch.arange(groups, device=codes.device)].flatten(-2)


def block_grid(groups: int, down: int) -> tuple[int, int]:
    """Rows and columns of equal blocks that a patch of down x down pixels is cut into, as square as can be.

    ValueError for a number of blocks that no such grid has.
    """
    grids = [(rows, groups // rows) for rows in range(1, down + 1)
             if not groups % rows and not down % rows and groups // rows <= down and not down % (groups // rows)]
    if not grids:
        raise ValueError(f"groups is {groups}: a patch of {down} x {down} pixels cannot be cut into as many equal "
                         f"blocks; take a power of two, at most {down * down}")
    return min(grids, key=lambda grid: (abs(grid[0] - grid[1]), -grid[0]))


def id_dtype(tokens: int) -> type[np.generic]:
    """The type in which `tokens` different ids are kept; torch hardly knows uint16, and reads it as int16."""
    return np.uint16 if tokens <= 2 ** 15 else np.int64
