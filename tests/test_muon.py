"""Muon against torch's own, and what makes it Muon: the singular values."""

import inspect
import io

import pytest
import torch

from mage_core import muon
from mage_core.muon import Muon, orthogonalised

SHAPES = [(12, 12), (24, 8), (8, 24), (24, 8), (2, 5), (12, 12), (64, 16)]


def matrices(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def pull(parameters, step):
    """Gradients of a step; the last parameter gets none at every other one."""
    draw = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    if step % 2:
        parameters[-1].grad = None


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
def test_steps_are_those_of_torchs_muon():
    ours, theirs = matrices(), matrices()
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    pairs = [(ours, Muon(ours, **settings)),
             (theirs, torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw"))]
    for step in range(6):
        for parameters, optimiser in pairs:
            pull(parameters, step)
            optimiser.step()
        for mine, other in zip(ours, theirs):   # both compute in bf16, in which a single step is 0.2 x 0.02 x 8
            torch.testing.assert_close(mine, other, atol=1e-3 * (step + 1), rtol=1e-3)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
def test_the_momentum_is_torchs_unless_told_otherwise():
    ours, theirs = (inspect.signature(made).parameters["momentum"].default for made in (Muon, torch.optim.Muon))
    assert ours == theirs


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
def test_a_convolution_moves_as_torchs_muon_moves_a_row_an_output_channel():
    torch.manual_seed(2)
    whole = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    flat = torch.nn.Parameter(whole.detach().flatten(1).clone())
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    pairs = [(whole, Muon([whole], **settings)),
             (flat, torch.optim.Muon([flat], **settings, adjust_lr_fn="match_rms_adamw"))]
    for step in range(3):
        gradient = torch.randn(6, 4, 3, 3)
        for parameter, optimiser in pairs:
            parameter.grad = gradient.view_as(parameter)
            optimiser.step()
        torch.testing.assert_close(whole.flatten(1), flat, atol=1e-3 * (step + 1), rtol=1e-3)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 10), (2, 10, 40)])
def test_orthogonalised_keeps_the_singular_vectors_and_levels_the_values(shape):
    torch.manual_seed(1)
    given = torch.randn(shape)
    found = orthogonalised(given).float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.4 and values.max() < 1.4
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    core = u.mT @ found @ v.mT   # diagonal where the vectors are the same
    assert (core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))).abs().max() < 0.15


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_for_machines_that_are_fast_in_it(monkeypatch, fast):
    """A CPU that only imitates bf16 takes a hundred times as long for its products."""
    monkeypatch.setattr(muon, "has_fast_bf16", lambda device: fast)
    assert orthogonalised(torch.randn(2, 12, 8)).dtype == (torch.bfloat16 if fast else torch.float32)


def test_a_zero_gradient_moves_nothing_and_stays_a_number():
    parameters = matrices()
    before = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    Muon(parameters, 0.1).step()
    for old, new in zip(before, parameters):
        assert torch.equal(old, new)


def test_going_on_from_a_saved_state_is_equal_to_the_bit():
    whole, file = matrices(), io.BytesIO()
    optimiser = Muon(whole, 0.02, weight_decay=0.01)
    for step in range(4):
        if step == 2:
            torch.save({"optimiser": optimiser.state_dict(), "parameters": whole}, file)
        pull(whole, step)
        optimiser.step()
    parts = matrices(1)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        for parameter, kept in zip(parts, saved["parameters"]):
            parameter.copy_(kept)
    resumed = Muon(parts, 0.5)
    resumed.load_state_dict(saved["optimiser"])
    for step in (2, 3):
        pull(parts, step)
        resumed.step()
    for one, other in zip(whole, parts):
        assert torch.equal(one, other)


def test_only_matrices():
    with pytest.raises(ValueError, match=r"\(3, 2, 2\).*matrices and convolutions.*AdamW"):
        Muon([torch.zeros(3, 2, 2)], 0.1)


def test_a_closure_is_called_with_gradients_on():
    weight = torch.nn.Parameter(torch.eye(2))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert Muon([weight], 0.1).step(closure) == 2.0
    assert not torch.equal(weight, torch.eye(2))
