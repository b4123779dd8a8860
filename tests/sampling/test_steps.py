"""Guidance over one, two and three passes, together or in turn, and the spread of what comes of it."""

import pytest
import torch
from torch import Tensor

from inflate.objectives import Predict
from inflate.sampling.steps import guided, in_precision

SHAPE = (2, 3, 4, 5, 5)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NOISY, TIMESTEP = normal(9), torch.tensor([3, 700])
NULL, IMAGE, FULL = (normal(seed) for seed in range(3))


def answering(*answers: Tensor) -> Predict:
    """A network on as many conditions, one behind the other, that answers each with what is said and with its input."""

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        assert len(noisy) == len(timestep) == sum(map(len, answers))
        return torch.cat(answers) + noisy * timestep[:, None, None, None, None]

    return predict


def own(answer: Tensor) -> Tensor:
    return answer + NOISY * TIMESTEP[:, None, None, None, None]


def test_without_scales_the_only_pass_is_the_prediction() -> None:
    assert torch.equal(guided([answering(FULL)], rescale=0.7)(NOISY, TIMESTEP), own(FULL))


@pytest.mark.parametrize("in_turn", [False, True])
def test_two_passes_are_classifier_free_guidance(in_turn: bool) -> None:
    predictions = [answering(NULL), answering(FULL)] if in_turn else [answering(NULL, FULL)]
    prediction = guided(predictions, [7.5])(NOISY, TIMESTEP)
    torch.testing.assert_close(prediction, own(NULL) + 7.5 * (FULL - NULL), rtol=1e-12, atol=1e-9)


def test_each_frame_may_have_its_scale() -> None:
    scales = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    prediction = guided([answering(NULL, FULL)], [scales[:, None, None, None]])(NOISY, TIMESTEP)
    for frame, scale in enumerate(scales):
        alone = guided([answering(NULL, FULL)], [float(scale)])(NOISY, TIMESTEP)
        torch.testing.assert_close(prediction[:, frame], alone[:, frame], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("in_turn", [False, True])
def test_three_passes_guide_by_image_and_text_apart(in_turn: bool) -> None:
    answers = (NULL, IMAGE, FULL)
    predictions = [answering(each) for each in answers] if in_turn else [answering(*answers)]
    prediction = guided(predictions, [2.5, 7.5])(NOISY, TIMESTEP)
    wanted = own(NULL) + 2.5 * (IMAGE - NULL) + 7.5 * (FULL - IMAGE)
    torch.testing.assert_close(prediction, wanted, rtol=1e-12, atol=1e-9)
    equal = guided(predictions, [7.5, 7.5])(NOISY, TIMESTEP)
    two = guided([answering(NULL, FULL)], [7.5])(NOISY, TIMESTEP)
    torch.testing.assert_close(equal, two, rtol=1e-12, atol=1e-9)


def test_rescaled_guidance_has_the_spread_of_the_told_pass() -> None:
    """Over all dimensions of a clip together, each clip by itself."""
    plain, half, whole = (guided([answering(NULL, FULL)], [7.5], share)(NOISY, TIMESTEP) for share in (0.0, 0.5, 1.0))
    inner = (1, 2, 3, 4)
    torch.testing.assert_close(whole.std(inner), own(FULL).std(inner))
    assert not torch.allclose(whole.std((2, 3, 4)), own(FULL).std((2, 3, 4))), "a frame alone keeps its own"
    ratio = own(FULL).std(inner, keepdim=True) / plain.std(inner, keepdim=True)
    torch.testing.assert_close(whole, plain * ratio)
    torch.testing.assert_close(half, 0.5 * plain + 0.5 * whole)


def test_a_network_that_answers_zero_stays_finite_under_rescaled_guidance() -> None:
    nothing = torch.zeros(SHAPE)
    prediction = guided([answering(nothing), answering(nothing)], [7.5], 0.7)(nothing, TIMESTEP)
    assert torch.equal(prediction, nothing)


def test_a_networks_precision_is_its_own() -> None:
    seen: list[torch.dtype] = []

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        seen.append(noisy.dtype)
        return noisy

    assert in_precision(predict, torch.bfloat16)(NOISY, TIMESTEP).dtype == torch.float64
    assert seen == [torch.bfloat16]
