"""Vision cache: the same features, fewer encodings, gradients that add up, bounds, staleness.

Not covered: videos, and towers under FSDP.
"""

import copy

import pytest
import torch
from latent_cases import VL_NAMES, build_case, case

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.errors import ConfigError
from grpo_latent.models.vision_cache import VisionCache


def fresh(name):
    """The case, and its tower twice: with a cache and without."""
    item = build_case(name)
    return item, copy.deepcopy(item.model), item.model


def features(model, images):
    output = model.model.get_image_features(images.pixel_values, images.image_grid_thw)
    return [
        torch.cat(tuple(output.pooler_output)),
        *(getattr(output, "deepstack_features", None) or []),
    ]


def freeze(model):
    for parameter in model.model.visual.parameters():
        parameter.requires_grad_(False)


def mixed_images(item):
    """Five images, three distinct, two of them of one shape."""
    first, second, wide = (
        item.images(1, seed=1),
        item.images(1, seed=2),
        item.images(1, seed=3, size=(28, 56)),
    )
    return ImageInputs.concat([first, second, first, wide, second])


@pytest.mark.parametrize("name", VL_NAMES)
@pytest.mark.parametrize("max_bytes", [0, 1 << 20])
def test_features_are_those_of_the_tower(name, max_bytes):
    item, plain, model = fresh(name)
    freeze(model)
    cache = VisionCache.install(model, max_bytes)
    images = mixed_images(item)
    expected = features(plain, images)
    assert len(expected) == (2 if name == "qwen3_vl" else 1)
    for _ in range(2):
        for got, want in zip(features(model, images), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    # per call without a bound, once and for all with one
    assert cache.num_encoded == (3 if max_bytes else 6)
    assert cache.num_requested == 10


@pytest.mark.parametrize("max_bytes", [0, 1 << 20])
def test_images_of_the_same_numbers_in_another_order_are_two(max_bytes):
    item, plain, model = fresh("qwen2_5_vl")
    freeze(model)
    cache = VisionCache.install(model, max_bytes)
    image = item.images(1)
    mirrored = ImageInputs(image.pixel_values.flip(0), image.image_grid_thw)
    images = ImageInputs.concat([image, mirrored])
    torch.testing.assert_close(
        features(model, images)[0], features(plain, images)[0], rtol=1e-5, atol=1e-5
    )
    assert cache.num_encoded == 2


@pytest.mark.parametrize("name", VL_NAMES)
def test_whole_forward_is_the_same(name):
    item, plain, model = fresh(name)
    VisionCache.install(model)
    requests = [item.request(images=item.images(1, seed=seed)) for seed in (1, 2, 1)]
    ids = torch.stack([request.prompt_ids for request in requests])
    images = ImageInputs.concat([request.images for request in requests])
    inputs = dict(
        input_ids=ids, pixel_values=images.pixel_values, image_grid_thw=images.image_grid_thw
    )
    inputs["mm_token_type_ids"] = (ids == item.adapter.image_token_id).int()
    with torch.no_grad():
        got, want = model(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    # equal up to rounding: without AVX-512 a row's place in the batch moves its last digits
    torch.testing.assert_close(got[0], got[2], rtol=1e-5, atol=1e-5)
    assert float((got[0] - got[1]).abs().max()) > 1e-2, "another image is seen"


def test_gradients_of_shared_images_add_up():
    item, plain, model = fresh("qwen3_vl")
    cache = VisionCache.install(model)
    images = mixed_images(item)
    weights = torch.randn(sum(int(grid.prod()) // 4 for grid in images.image_grid_thw), 1)
    for net in (model, plain):
        with cache.reuse():
            # twice, as SFT does: as targets' source and inside the forward
            (
                sum(
                    (part * weights).sum()
                    for part in features(net, images) + features(net, images)
                )
            ).backward()
    assert cache.num_encoded == 3
    for got, want in zip(
        model.model.visual.parameters(), plain.model.visual.parameters(), strict=True
    ):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-4)


def test_reuse_lasts_for_the_block_and_the_weights():
    item, _, model = fresh("qwen2_vl")
    cache = VisionCache.install(model)
    images = item.images(2)
    copied = ImageInputs(images.pixel_values.clone(), images.image_grid_thw)
    with cache.reuse():
        first = features(model, images)[0]
        again = features(model, copied)[0]
        assert cache.num_encoded == 2 and torch.equal(first, again)
        with torch.no_grad():
            model.model.visual.merger.mlp[2].bias.add_(1.0)
        changed = features(model, images)[0]
        assert cache.num_encoded == 4
        torch.testing.assert_close(changed, first + 1.0)
    features(model, images)
    assert cache.num_encoded == 6


def test_a_block_within_a_block_leaves_the_outer_one_what_it_has():
    item, _, model = fresh("qwen2_vl")
    cache, images = VisionCache.install(model), item.images(2)
    with cache.reuse():
        features(model, images)
        with cache.reuse():  # as prompt slots open one within an evaluation's
            features(model, images)
        features(model, ImageInputs(images.pixel_values.clone(), images.image_grid_thw))
    assert cache.num_encoded == 2
    features(model, images)
    assert cache.num_encoded == 4


def test_features_without_gradient_do_not_serve_a_forward_with_one():
    item, _, model = fresh("qwen2_vl")
    images = item.images(1)
    with VisionCache.install(model).reuse():
        with torch.no_grad():
            features(model, images)
        assert features(model, images)[0].requires_grad


def test_kept_features_do_not_depend_on_the_batch():
    item, plain, model = fresh("qwen2_5_vl")
    freeze(model), freeze(plain)
    images = mixed_images(item)
    VisionCache.install(model, 1 << 20)
    VisionCache.install(plain, 1 << 20)
    together = features(model, images)[0]
    num_patches = images.image_grid_thw.prod(-1).tolist()
    one_by_one = [
        features(plain, ImageInputs(pixels, grid[None]))[0]
        for pixels, grid in zip(
            reversed(images.pixel_values.split(num_patches)),
            images.image_grid_thw.flip(0),
            strict=True,
        )
    ]
    assert torch.equal(together, torch.cat(one_by_one[::-1]))


def test_least_recently_used_images_are_dropped_first():
    item, _, model = fresh("qwen2_5_vl")
    freeze(model)
    one, two, three = (item.images(1, seed=seed) for seed in (1, 2, 3))
    size = features(model, one)[0].nbytes
    cache = VisionCache.install(model, 2 * size)
    for images, num_encoded in ((one, 1), (two, 2), (one, 2), (three, 3), (one, 3), (two, 4)):
        features(model, images)
        assert cache.num_encoded == num_encoded
    VisionCache.install(model, size - 1)  # keeps nothing, still serves
    features(model, one)
    features(model, one)
    assert cache.num_encoded == 6


def test_kept_features_are_dropped_when_weights_change():
    item, _, model = fresh("qwen2_5_vl")
    freeze(model)
    cache = VisionCache.install(model, 1 << 20)
    before = features(model, item.images(1))[0]
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})
    after = features(model, item.images(1))[0]
    assert cache.num_encoded == 2 and not torch.allclose(before, after)


def test_a_tower_that_trains_keeps_nothing_across_calls():
    item, _, model = fresh("qwen2_vl")
    with pytest.raises(ConfigError, match="frozen"):
        VisionCache.install(model, 1)
    freeze(model)
    VisionCache.install(model, 1 << 20)
    model.model.visual.merger.mlp[0].weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="frozen"):
        features(model, item.images(1))


def test_one_cache_a_tower_and_none_without():
    _, _, model = fresh("qwen2_vl")
    names = list(model.state_dict())
    assert VisionCache.install(model) is VisionCache.install(model)
    assert list(model.state_dict()) == names
    with pytest.raises(ConfigError, match="vision tower"):
        VisionCache.install(case("qwen2").model)


def test_callers_that_ask_for_more_get_the_tower_itself():
    item, _, model = fresh("qwen2_5_vl")
    cache = VisionCache.install(model)
    images = item.images(2)
    output = model.model.visual(
        images.pixel_values, grid_thw=images.image_grid_thw, output_hidden_states=True
    )
    assert output.hidden_states is not None and cache.num_requested == 0
