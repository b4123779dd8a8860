import torch

from inflate.training.noise import Noise, seed_of


def test_batch_layout_does_not_change_the_draws() -> None:
    whole = Noise(3, torch.tensor([5, 6, 7])).normal("noise", 2, 4)
    parts = [Noise(3, torch.tensor([n])).normal("noise", 2, 4) for n in (5, 6, 7)]
    assert whole.shape == (3, 2, 4)
    assert whole.dtype == torch.float32
    assert torch.equal(whole, torch.cat(parts))


def test_seed_number_and_purpose_each_change_the_draws() -> None:
    base = Noise(3, torch.tensor([5])).normal("noise", 8)
    assert torch.equal(base, Noise(3, torch.tensor([5])).normal("noise", 8))
    others = [Noise(4, torch.tensor([5])), Noise(3, torch.tensor([6]))]
    assert all(not torch.equal(base, other.normal("noise", 8)) for other in others)
    assert not torch.equal(base, Noise(3, torch.tensor([5])).normal("sigma", 8))


def test_draws_have_the_right_distribution() -> None:
    noise = Noise(0, torch.arange(1500))
    normal, uniform = noise.normal("a"), noise.uniform("b")
    assert normal.shape == uniform.shape == (1500,)
    assert abs(normal.mean()) < 0.1
    assert abs(normal.std() - 1) < 0.07
    assert 0 <= uniform.min() < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.03


def test_offset_noise_has_one_more_draw_for_each_frame_and_channel() -> None:
    noise = Noise(3, torch.tensor([5, 6]))
    plain, moved = noise.normal("noise", 3, 4, 8, 8), noise.offset("noise", 0.1, 3, 4, 8, 8)
    added = (moved - plain)[..., :1, :1]  # (B, F, C, 1, 1)
    torch.testing.assert_close(moved, plain + added)
    assert len(added.unique()) == 2 * 3 * 4
    assert torch.equal(noise.offset("noise", 0.0, 3, 4, 8, 8), plain)
    alone = Noise(3, torch.tensor([6])).offset("noise", 0.1, 3, 4, 8, 8)
    assert torch.equal(moved[1:], alone), "whatever the clips beside it"


def test_offsets_have_the_strength_and_are_no_part_of_the_noise() -> None:
    noise = Noise(0, torch.arange(40))
    plain, twice = noise.normal("noise", 5, 4, 2, 2), noise.offset("noise", 0.2, 5, 4, 2, 2)
    offsets = (twice - plain)[..., 0, 0].flatten()  # (B F C,)
    assert abs(offsets.mean()) < 0.03
    assert abs(offsets.std() - 0.2) < 0.02
    together = torch.stack([offsets, plain[..., 0, 0].flatten()])
    assert abs(torch.corrcoef(together)[0, 1]) < 0.12


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Noise(0, torch.arange(3)).normal("a", 5)
    assert torch.equal(before, torch.get_rng_state())


def test_seed_of_is_a_fixed_function_of_its_parts() -> None:
    assert seed_of(1, 2, "noise") == seed_of(1, 2, "noise") < 2**63
    assert len({seed_of(1, 23), seed_of(12, 3), seed_of(1, 2, 3)}) == 3
