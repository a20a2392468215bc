"""What keeps a VQ-VAE's tokens alive, true and still: codebook updates, k-means, the start from PCA, shifts."""

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mage_core.vqvae import VQVAE, Codebook, VQVAEConfig, kmeans, nearest_code, varied

seeds = st.integers(0, 2 ** 32 - 1)
PATCH = VQVAEConfig(channels=1, width=16, codebook_size=12, down=4, pixel_range=(0.0, 1.0), shape="patch",
                    code_channels=6, encoder_width=8, encoder_blocks=2, decoder_blocks=1)


def changed(config, **fields):
    return VQVAEConfig(**{**config.__dict__, **fields})


# ---------------------------------------------------------------- the codebook follows the features

def test_an_update_is_the_moving_mean_of_the_features_that_chose_a_code():
    vqvae = VQVAE(PATCH)
    codebook, before = Codebook(vqvae, decay=0.9), vqvae.codebook.detach().clone()
    features, ids = torch.randn(7, 6), torch.tensor([3, 3, 3, 5, 5, 0, 3])
    codebook.update(vqvae, features, ids)
    for code in range(12):
        mine = features[ids == code]
        expected = (0.9 * 2 * before[code] + 0.1 * mine.sum(0)) / (0.9 * 2 + 0.1 * len(mine))
        torch.testing.assert_close(vqvae.codebook[code].detach(), expected)


def test_the_moving_mean_forgets_as_in_the_paper_that_it_is_from():
    """gamma = 0.99 (van den Oord et al. 2017, appendix A.1): half of what a code was is left after 69 updates."""
    torch.manual_seed(0)
    vqvae = VQVAE(PATCH)
    codebook, before = Codebook(vqvae), vqvae.codebook[0].detach().clone()
    wanted, ids = before + 1, torch.zeros(4, dtype=torch.long)
    codebook.count[0], codebook.total[0] = 4.0, 4.0 * before   # as many as choose it each time
    for _ in range(69):
        codebook.update(vqvae, wanted.expand(4, -1), ids)
    torch.testing.assert_close(vqvae.codebook[0].detach(), (before + wanted) / 2, atol=0.005, rtol=0)


@settings(max_examples=15)
@given(seeds, st.integers(1, 5))
def test_updates_move_codes_to_the_mean_of_their_features(seed, codes):
    torch.manual_seed(seed)
    vqvae = VQVAE(changed(PATCH, codebook_size=codes))
    codebook = Codebook(vqvae, decay=0.5)
    features = torch.randn(40, 6)
    ids = torch.cat([torch.arange(codes), torch.randint(codes, (40 - codes,))])   # every code is chosen
    for _ in range(40):
        codebook.update(vqvae, features, ids)
    means = torch.stack([features[ids == code].mean(0) for code in range(codes)])
    torch.testing.assert_close(vqvae.codebook.detach(), means, atol=1e-5, rtol=1e-4)


def test_unused_codes_restart_on_the_features_that_are_served_worst():
    vqvae = VQVAE(PATCH)
    codebook = Codebook(vqvae, decay=0.5, rare=0.1)
    with torch.no_grad():
        vqvae.codebook.copy_(100.0 + torch.randn(12, 6))   # far from everything
        vqvae.codebook[0] = 0.0
    codebook.restart(vqvae)
    far = 5.0 + torch.randn(50, 6)   # served by code 0, badly
    features = torch.cat([0.1 * torch.randn(200, 6), far])
    unused = vqvae.codebook[1:].detach().clone()
    for step in range(6):
        ids = nearest_code(features, vqvae.codebook)
        codebook.update(vqvae, features, ids)
        if step < 4:   # 2 x 0.5^4 is still above 0.1
            torch.testing.assert_close(vqvae.codebook[1:].detach(), unused)
            assert ids.unique().tolist() == [0]
    restarted = vqvae.codebook[1:].detach()
    distance = torch.cdist(restarted, far).amin(1)
    assert distance.max() < 1.5 and restarted.unique(dim=0).shape == (11, 6), "each on a feature of its own"
    used = nearest_code(features, vqvae.codebook).unique()
    assert len(used) >= 10 and vqvae.codebook.isfinite().all()


def test_a_batch_smaller_than_the_number_of_unused_codes_restarts_what_it_can():
    vqvae = VQVAE(PATCH)
    codebook = Codebook(vqvae, decay=0.01)
    features = torch.randn(3, 6)
    for _ in range(3):
        codebook.update(vqvae, features, nearest_code(features, vqvae.codebook))
    assert vqvae.codebook.isfinite().all()
    found = torch.cdist(vqvae.codebook.detach(), features).amin(0)
    torch.testing.assert_close(found, torch.zeros(3), atol=1e-3, rtol=0)


def test_the_codebooks_memory_is_part_of_a_checkpoint():
    vqvae = VQVAE(PATCH)
    codebook = Codebook(vqvae)
    codebook.update(vqvae, torch.randn(9, 6), torch.arange(9))
    again, model = Codebook(VQVAE(PATCH)), VQVAE(PATCH)
    again.load_state_dict(codebook.state_dict())
    model.load_state_dict(vqvae.state_dict())
    features, ids = torch.randn(9, 6), torch.arange(9)
    codebook.update(vqvae, features, ids)
    again.update(model, features, ids)
    assert torch.equal(vqvae.codebook, model.codebook)


# ---------------------------------------------------------------- k-means

def test_varied_is_what_differs_from_the_commonest_vector():
    vectors = torch.tensor([[0.5, 1.0]] * 6 + [[0.5, 1.1], [0.0, 1.0], [0.5005, 1.0]])
    assert varied(vectors).tolist() == [False] * 6 + [True, True, False]
    assert varied(vectors[torch.randperm(9)]).sum() == 2


@settings(max_examples=25)
@given(seeds, st.integers(2, 9), st.integers(1, 4))
def test_kmeans_centres_are_the_means_of_their_members_and_the_first_is_the_commonest(seed, k, width):
    draw = np.random.default_rng(seed)
    others = draw.normal(size=(60, width)).astype(np.float32)
    background = draw.normal(size=width).astype(np.float32) + 20
    vectors = draw.permutation(np.concatenate([others, np.tile(background, (80, 1))]))
    centres = kmeans(torch.from_numpy(vectors), k, rounds=60, seed=seed).numpy()
    assert centres.shape == (k, width) and np.array_equal(centres[0], background)
    nearest = np.square(others[:, None] - centres[None, 1:]).sum(2).argmin(1)   # by brute force
    assert len(set(nearest)) == k - 1, "no code is without members"
    for code in range(k - 1):
        np.testing.assert_allclose(centres[code + 1], others[nearest == code].mean(0), atol=1e-4)


def test_kmeans_leaves_no_code_without_members_where_vectors_repeat():
    """Five places, thirty times each: whatever the start, empty clusters move to the places that have no centre."""
    places = 10.0 * torch.eye(5)
    vectors = torch.cat([places.repeat_interleave(30, 0), torch.zeros(200, 5)])
    for seed in range(5):
        centres = kmeans(vectors, 6, rounds=30, seed=seed)
        assert torch.equal(centres[0], torch.zeros(5))
        torch.testing.assert_close(torch.cdist(places, centres[1:]).amin(1), torch.zeros(5), atol=1e-5, rtol=0)


def test_kmeans_is_the_same_for_the_same_seed_and_takes_a_part_where_there_is_more():
    vectors = torch.randn(500, 3)
    assert torch.equal(kmeans(vectors, 6, seed=3), kmeans(vectors, 6, seed=3))
    assert not torch.equal(kmeans(vectors, 6, seed=3), kmeans(vectors, 6, seed=4))
    assert kmeans(vectors, 6, most=50).isfinite().all()


def test_kmeans_with_nothing_but_background_still_makes_codes_and_too_few_vectors_are_an_error():
    assert torch.equal(kmeans(torch.ones(20, 3), 4), torch.ones(4, 3))
    with pytest.raises(ValueError, match="3 vectors cannot make 4 codes: give more images"):
        kmeans(torch.randn(3, 2), 4)


# ---------------------------------------------------------------- a start from data

def pictures(n=40, channels=1, seed=0):
    """Smooth blobs on black, (n c 32 32) in [0, 1]: most patches are background."""
    draw = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    centres = 6 + 20 * torch.rand(n, channels, 2, 1, 1, generator=draw)
    squared = (y - centres[:, :, 0]) ** 2 + (x - centres[:, :, 1]) ** 2
    images = (1.2 * (-squared / 12).exp()).clamp(0, 1)
    return images * (images > 0.05)


@pytest.mark.parametrize("channels, down", [(1, 4), (3, 4)])
@torch.no_grad()
def test_with_as_many_channels_as_pixels_the_start_reconstructs_exactly(channels, down):
    vqvae = VQVAE(changed(PATCH, channels=channels, code_channels=channels * down ** 2, down=down))
    vqvae.initialise(pictures(channels=channels))
    for images in (pictures(5, channels, seed=1), torch.rand(2, channels, 16, 24)):
        out = vqvae(images, quantise=False)
        torch.testing.assert_close(out.reconstruction, images, atol=1e-5, rtol=0)
        assert out.loss < 1e-10 and out.features is None


@pytest.mark.parametrize("field", ["channels", "width", "codebook_size", "groups", "encoder_width"])
def test_sizes_that_are_none_are_named(field):
    with pytest.raises(ValueError, match=f"{field} is 0: it must be at least 1"):
        changed(PATCH, **{field: 0})
    with pytest.raises(ValueError, match="pixel_range is .*must begin at 0"):
        changed(PATCH, pixel_range=(-1.0, 1.0))


@torch.no_grad()
def test_images_of_nothing_but_background_make_a_start_as_well():
    vqvae = VQVAE(PATCH)
    vqvae.initialise(torch.full((20, 1, 16, 16), 0.25))
    assert all(value.isfinite().all() for value in vqvae.state_dict().values())
    torch.testing.assert_close(vqvae.decode(torch.zeros(1, 4, 4, dtype=torch.long)), torch.full((1, 1, 16, 16), 0.25))


@torch.no_grad()
def test_with_fewer_channels_the_start_is_principal_components():
    vqvae, images = VQVAE(PATCH), pictures()
    vqvae.initialise(images)
    patches = rearrange(images, "b c (h p) (w q) -> (b h w) (c p q)", p=4, q=4)
    patches = patches[(patches != 0).any(1)].double().numpy()   # the background is left out: it is one code
    values = np.linalg.svd(patches - patches.mean(0), compute_uv=False)
    made = rearrange(vqvae.decoder(vqvae.features(images)), "b c (h p) (w q) -> (b h w) (c p q)", p=4, q=4)
    truth = rearrange(images, "b c (h p) (w q) -> (b h w) (c p q)", p=4, q=4)
    error = (made - truth)[(truth != 0).any(1)].double().square().sum().item()
    assert error == pytest.approx(np.square(values[6:]).sum(), rel=0.02)   # a few nearly black patches count as varied


@torch.no_grad()
def test_the_start_gives_black_a_code_of_its_own_and_uses_all_codes():
    vqvae, images = VQVAE(PATCH), pictures(100)
    vqvae.initialise(images)
    ids = vqvae.encode(images)
    black = vqvae.encode(torch.zeros(1, 1, 32, 32)).unique()
    assert black.tolist() == [0], "the commonest code comes first"
    still = torch.nn.functional.max_pool2d(images, 12, 4, 4)[:, 0] == 0   # patches that see nothing but black
    assert still.any() and (ids[still] == 0).all()
    assert len(ids.unique()) == 12
    assert vqvae.decode(torch.zeros(1, 8, 8, dtype=torch.long)).max() < 0.01


@torch.no_grad()
def test_codes_laid_anew_are_centres_of_all_features_of_all_batches():
    torch.manual_seed(0)
    vqvae, images = VQVAE(PATCH), pictures(100)
    vqvae.initialise(images)
    for parameter in vqvae.encoder.parameters():   # it has moved since
        parameter.add_(0.1 * torch.randn_like(parameter))
    features = rearrange(torch.cat([vqvae.features(part) for part in images.split(30)]), "b e h w -> (b h w) e")
    stale = vqvae.codebook.clone()
    vqvae.lay_codes(images.split(30))
    chosen = nearest_code(features, vqvae.codebook)
    def error(codes):
        return torch.cdist(features, codes).amin(1).square().mean()
    assert error(vqvae.codebook) < error(stale)
    assert torch.equal(vqvae.codebook, kmeans(features, 12, most=None))
    assert torch.equal(vqvae.codebook[0], features.median(0).values) and len(chosen.unique()) == 12
    with pytest.raises(ValueError, match="64 vectors cannot make 65 codes"):
        VQVAE(changed(PATCH, codebook_size=65)).lay_codes([images[:1]])


# ---------------------------------------------------------------- tokens move with the picture

@settings(max_examples=10)
@given(seeds, st.integers(-3, 3), st.integers(-3, 3))
@torch.no_grad()
def test_a_shift_by_whole_patches_shifts_the_tokens(seed, down, right):
    torch.manual_seed(seed)
    vqvae = VQVAE(PATCH)
    for parameter in vqvae.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    image = torch.rand(1, 1, 64, 64)
    nn.init.normal_(vqvae.codebook)
    vqvae.codebook.copy_(kmeans(rearrange(vqvae.features(image), "b e h w -> (b h w) e"), 12))
    ids, shifted = vqvae.encode(image)[0], vqvae.encode(image.roll((4 * down, 4 * right), (2, 3)))[0]
    near = 1 + PATCH.encoder_blocks + 3   # what a token sees of its neighbours, and what came round the edge
    inside = slice(near, 16 - near)
    assert len(ids.unique()) > 3
    assert torch.equal(ids.roll((down, right), (0, 1))[inside, inside], shifted[inside, inside])


@torch.no_grad()
def test_an_empty_patch_hears_nothing_of_what_is_beside_it():
    vqvae = VQVAE(PATCH)
    for parameter in vqvae.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    image = torch.zeros(1, 1, 64, 64)
    image[..., 20:40, 20:40] = torch.rand(20, 20)   # patches 5 to 9 of rows and columns
    beside = vqvae.features(image) - vqvae.features(torch.zeros_like(image))
    changed = beside.abs().amax(1)[0] > 1e-6
    assert changed[5:10, 5:10].all() and changed.sum() == 25


@torch.no_grad()
@pytest.mark.parametrize("level, empty", [(0, True), (1, False), (2, False)])
def test_a_grey_level_above_black_is_not_empty(level, empty):
    torch.manual_seed(0)
    vqvae = VQVAE(PATCH)
    for parameter in vqvae.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    faint = torch.zeros(1, 1, 64, 64)
    faint[..., 16:20, 16:20] = level / 255   # the patch in row and column 4
    beside = faint.clone()
    beside[..., 16:20, 20:24] = 1.0
    heard = (vqvae.features(beside) - vqvae.features(faint))[0, :, 4, 4].abs().max()
    assert (heard < 1e-6) == empty


@torch.no_grad()
@pytest.mark.parametrize("blocks, reach", [(0, 0), (1, 2), (2, 3)])
def test_a_token_sees_its_near_surroundings_only(blocks, reach):
    vqvae = VQVAE(changed(PATCH, encoder_blocks=blocks))
    for parameter in vqvae.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    image = torch.rand(1, 1, 64, 64)
    other = image.clone()
    other[..., 32:36, 24:28] = 1 - other[..., 32:36, 24:28]   # the patch at row 8, column 6
    moved = (vqvae.features(image) - vqvae.features(other)).abs().amax(1)[0] > 1e-6
    rows, columns = moved.nonzero(as_tuple=True)
    assert moved[8, 6] and (rows - 8).abs().max() == (columns - 6).abs().max() == reach


def test_before_a_background_images_stay_in_range():
    vqvae = VQVAE(VQVAEConfig(channels=1, width=8, codebook_size=4, down=4, pixel_range=(0.0, 1.0), shape="patch",
                              background=16))
    vqvae.background.fill_(0.7)
    images = vqvae.from_network(torch.tensor([-0.9, -0.3, 0.1, 0.8])[:, None, None, None].expand(4, 1, 16, 16))
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0.0, 0.4, 0.8, 1.0]))
