"""A trained MAGE goes over to the tokens of another VQ-VAE, and keeps what it knows of motion.

Only two parts of MAGE know what a token is: the embedding, which reads ids, and the logits, which write them. Both are
fitted anew, by least squares, on what the old and the new tokens say of the same frames; all that lies between stays as
it is (advection knows codes by their pixels, and is told the new ones). It takes a minute; training goes on from there
(`training`, `--new-tokens`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mage_core.clips import available, encode_frames, frame_indices, text_ids
from mage_core.loop import seed_of
from mage_core.machine import autocast
from mage_core.mage import MAGE
from mage_core.tokens import code_vectors, split_ids
from mage_core.vqvae import VQVAE
from mage_core.weights import Trained

CLIPS = 200      # of the training split, on which both parts are fitted
AT_ONCE = 20
BACKGROUND = 0.05   # of the background's tokens, which are most, this share is fitted as well
PRIOR = 20.0     # a code's own vector in the embedding counts as if it had been seen so often at the linear fit's


@torch.no_grad()
def retokenise(start: Trained, vqvae: VQVAE, seed: int = 0) -> MAGE:
    """The MAGE of `start` for the tokens of another VQ-VAE of the same grid and kind of images.

    ValueError where the two make different grids of tokens of an image.
    """
    if (start.vqvae.config.down, start.vqvae.config.channels) != (vqvae.config.down, vqvae.config.channels):
        new, old = vqvae.config, start.vqvae.config
        raise ValueError(f"tokens of {new.down} x {new.down} pixels in {new.channels} channels cannot replace those of "
                         f"{old.down} x {old.down} in {old.channels}: start from weights for the same kind of images")
    start.mage.eval()
    made = MAGE(dataclasses.replace(start.mage.config, codebook_size=vqvae.config.codebook_size,
                                    groups=vqvae.config.groups))
    kept = {name: tensor for name, tensor in start.mage.state_dict().items()
            if name not in ("visual_tokens.embedding", "advection.pixels") and not name.startswith("generator.logits.")}
    if made.advection is not None:
        made.advection.pixels.copy_(vqvae.code_pixels())
        for name in ("shown.weight", "shown.bias", "whole.weight", "whole.bias"):   # the same for all blocks
            if (name := f"advection.{name}") not in kept:
                continue
            each = kept[name].unflatten(0, (start.mage.config.groups, -1)).mean(0)
            kept[name] = each.repeat(made.config.groups, *[1] * (each.ndim - 1))
    made.load_state_dict(made.state_dict() | kept)

    draw = torch.Generator().manual_seed(seed_of(seed, "retokenise"))
    old_ids, new_ids, features, targets = _looked_at(start, vqvae, seed, draw)
    made.visual_tokens.embedding.copy_(_embedding(start, vqvae, old_ids, new_ids))
    weight, bias = _logits(vqvae, features, targets)
    made.generator.logits.weight.copy_(weight)
    made.generator.logits.bias.copy_(bias)
    return made.eval()


def _looked_at(start: Trained, vqvae: VQVAE, seed: int, draw: torch.Generator) -> tuple[Tensor, ...]:
    """Old and new ids (n,) of the same patches; the old model's features (m d) and the new ids (m,) that come next.

    Half of the clips are shown to the model as they are, half as it generates them, and to one that is not
    `autoregressive` none but their first frames, as in generation. Of patches that are background some are taken, of
    targets nearly as many as of the others.
    """
    dataset, mage = start.dataset, start.mage
    parts: list[tuple[Tensor, ...]] = []
    numbers = range(available(dataset, "train", CLIPS))
    for number, first in enumerate(range(0, len(numbers), AT_ONCE)):
        specs = [dataset.spec("train", index, 0) for index in numbers[first:first + AT_ONCE]]
        speeds = np.random.Generator(np.random.Philox(seed_of(seed, "speeds", first))).uniform(0.01, 0.99, len(specs))
        shown = np.stack([frame_indices(int(length), speed, dataset.interval, dataset.clip_length)
                          for length, speed in zip(dataset.lengths(specs), speeds)])
        frames = dataset.clips(specs, shown)
        old, new = (torch.from_numpy(encode_frames(model, frames).astype(np.int64)) for model in (start.vqvae, vqvae))
        words = text_ids([dataset.caption(spec) for spec in specs], dataset)
        eta = torch.tensor(speeds, dtype=torch.float32)
        with autocast("cpu"):
            if mage.config.autoregressive:
                given = mage.generate(old[:, 0], words, eta) if number % 2 else old
            else:
                given = F.pad(old[:, :1], (0, 0, 0, 0, 0, old.shape[1] - 1), value=mage.config.hidden_id)
            features, _ = mage._features(given[:, :-1], words, eta, None, torch.arange(dataset.clip_length - 1))
        targets = new[:, 1:]
        filled, seen = targets != 0, new != 0
        filled |= torch.rand(filled.shape, generator=draw) < filled.float().mean()
        seen |= torch.rand(seen.shape, generator=draw) < BACKGROUND
        parts.append((old[seen], new[seen], features[filled].float(), targets[filled]))
    return tuple(torch.cat(part) for part in zip(*parts))


def _embedding(start: Trained, vqvae: VQVAE, old_ids: Tensor, new_ids: Tensor) -> Tensor:
    """The new embedding: a linear map of code vectors to the old tokens' vectors, and for each code what is left."""
    k, groups = vqvae.config.codebook_size, vqvae.config.groups
    old = start.mage.visual_tokens
    wanted = old.embed(old_ids[None, None])[0, 0].float()
    turn, shift, left = _linear(code_vectors(new_ids, vqvae.codebook, groups), wanted)
    rows = split_ids(new_ids, k, groups) + k * torch.arange(groups)
    which = torch.zeros(len(rows), k * groups).scatter_(1, rows, 1.0)
    own = torch.linalg.solve(which.T @ which + PRIOR * torch.eye(k * groups), which.T @ left)
    vectors = [part @ turn_part for part, turn_part in zip(vqvae.codebook.chunk(groups, 1), turn.chunk(groups))]
    table = torch.cat(vectors) + shift / groups + own
    hidden = old.embedding[old.codebook_size * old.groups:] * old.groups / groups   # a hidden token adds it up
    return torch.cat([table, hidden])


def _logits(vqvae: VQVAE, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the new logits: the features say where a code vector lies, by a linear map and its errors.

    A code's logit is the log of its share times a Gaussian around what the features say (linear discriminant analysis).
    """
    k, groups = vqvae.config.codebook_size, vqvae.config.groups
    turn, shift, left = _linear(features, code_vectors(targets, vqvae.codebook, groups))
    codes, weights, biases = split_ids(targets, k, groups), [], []
    for group, (book, turn_part, shift_part, error) in enumerate(zip(
            vqvae.codebook.chunk(groups, 1), turn.chunk(groups, 1), shift.chunk(groups), left.chunk(groups, 1))):
        spread = error.T @ error / len(error) + 1e-4 * torch.eye(error.shape[1])
        pull = torch.linalg.solve(spread, book.T).T
        share = torch.bincount(codes[:, group], minlength=k) + 0.3
        weights.append(pull @ turn_part.T)
        biases.append(pull @ shift_part - 0.5 * (pull * book).sum(1) + (share / share.sum()).log())
    return torch.cat(weights), torch.cat(biases)


def _linear(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The least squares of y (n e) by x (n d): the map (d e), the shift (e,), and what they leave (n e)."""
    found = torch.linalg.lstsq(F.pad(x, (0, 1), value=1.0), y, driver="gelsd").solution
    return found[:-1], found[-1], y - x @ found[:-1] - found[-1]
