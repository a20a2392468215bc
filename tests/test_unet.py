"""The U-Net: what it is made of, and that it learns to cut out what it is told to look for."""

import pytest
import torch
import torch.nn.functional as F

from mage_core.unet import UNet

SIDE = 16


def test_at_its_start_a_mask_is_the_same_everywhere_and_each_pixel_gets_one_number_a_thing():
    torch.manual_seed(0)
    made = UNet(3, 8, 5, 2)
    features, masks = made(torch.rand(4, 3, 16, 24), torch.randn(4, 5))
    assert features.shape == (4, 8, 8, 12) and masks.shape == (4, 2, 16, 24)
    torch.testing.assert_close(masks, torch.full_like(masks, torch.tensor(1.0).sigmoid().item()))


def perturbed(seed=0):
    """A U-Net of which nothing is at its start any more."""
    torch.manual_seed(seed)
    made = UNet(1, 8, 5, 2).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("name", ["stem", "block_2", "block_4", "blocks_8.0", "blocks_8.1", "up_4", "up_2", "to_4",
                                  "to_8", "from_8", "from_4", "norm", "cut"])
def test_every_part_has_a_say_and_every_block_is_told(name):
    made, images, told = perturbed(), torch.rand(2, 1, SIDE, SIDE), torch.randn(2, 5, requires_grad=True)
    features, masks = made(images, told)
    part = made.get_submodule(name)
    gradients = torch.autograd.grad(masks.std(), list(part.parameters()), retain_graph=True, allow_unused=True)
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    if hasattr(part, "film"):
        seen = []
        part.film.register_forward_hook(lambda module, given, out: seen.append(given[0]))
        made(images, told)
        assert torch.equal(seen[0], told)


@torch.no_grad()
def test_the_way_up_sees_what_was_seen_on_the_way_down():
    made, seen = perturbed(), {}
    for name in ("block_2", "block_4", "from_8", "from_4", "up_4", "up_2"):
        made.get_submodule(name).register_forward_hook(
            lambda module, given, out, name=name: seen.update({name: (given[0], out)}))
    made(torch.rand(2, 1, SIDE, SIDE), torch.randn(2, 5))
    for up, bridge, below in (("up_4", "block_4", "from_8"), ("up_2", "block_2", "from_4")):
        enlarged = seen[below][1].repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(seen[up][0], seen[bridge][1] + enlarged)


@torch.no_grad()
def test_a_block_scales_and_shifts_its_features_by_what_is_told():
    block, x, told = perturbed().block_4, torch.randn(3, 16, 4, 4), torch.randn(3, 5)
    scale, shift = block.film(told).split(16, 1)
    y = block.norm_2(block.conv_1(F.silu(block.norm_1(x))))
    y = y + y * scale.view(3, 16, 1, 1) + shift.view(3, 16, 1, 1)
    torch.testing.assert_close(block(x, told), x + block.conv_2(F.silu(y)))
    assert scale.abs().min() > 0 and shift.abs().min() > 0


def test_it_learns_to_cut_out_what_it_is_told():
    """Two bars on an image, one that lies and one that stands; they cross. Which is asked, one number says."""
    torch.manual_seed(0)
    made, draw = UNet(1, 8, 1, 1), torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(made.parameters(), 0.01)

    def sample(count):
        bars = torch.zeros(count, 2, SIDE, SIDE)
        for clip, (row, column) in enumerate(torch.randint(2, SIDE - 4, (count, 2), generator=draw).tolist()):
            bars[clip, 0, row:row + 2, 2:14] = bars[clip, 1, 2:14, column:column + 2] = 1
        asked = torch.randint(2, (count, 1), generator=draw)
        wanted = bars[torch.arange(count), asked[:, 0]][:, None]
        return bars.amax(1, keepdim=True), 2.0 * asked - 1, wanted

    for _ in range(120):
        images, told, wanted = sample(16)
        loss = (images * made(images, told)[1] - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    images, told, wanted = sample(64)
    with torch.no_grad():
        right = (images * made(images, told)[1] - wanted).square().mean()
        wrong = (images * made(images, -told)[1] - wanted).square().mean()
    all_of_it = (images - wanted).square().mean()
    assert right < 0.1 * all_of_it, (right, all_of_it)
    assert wrong > all_of_it, "told of the other bar, it cuts out the other"
