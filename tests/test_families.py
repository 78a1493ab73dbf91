"""The named models have the parameters and FLOPs that are published."""

import pytest

import vitjax.config
from vitjax.errors import InputError
from vitjax.models import families, shapes
from vitjax.models.vit import vit

# family, size, pixels, classes: parameters of the same model built by timm 1.0.31 (vit, deit,
# deit3, siglip) and by transformers 5.24 (mae, clip, dino), counted without weights.
PARAMS = {
    ("vit", "Ti/16", 224, 1000): 5_717_416,
    ("vit", "S/32", 224, 1000): 22_878_952,
    ("vit", "S/16", 224, 1000): 22_050_664,
    ("vit", "B/32", 224, 1000): 88_224_232,
    ("vit", "B/16", 224, 1000): 86_567_656,
    ("vit", "B/8", 224, 1000): 86_576_872,
    ("vit", "L/32", 224, 0): 305_510_400,
    ("vit", "L/16", 224, 1000): 304_326_632,
    ("vit", "H/14", 224, 0): 630_764_800,
    ("deit", "Ti/16", 224, 1000): 5_910_800,
    ("deit", "S/16", 224, 1000): 22_436_432,
    ("deit", "B/16", 224, 1000): 87_338_192,
    ("deit3", "S/16", 224, 1000): 22_059_496,
    ("deit3", "M/16", 224, 1000): 38_849_512,
    ("deit3", "B/16", 224, 1000): 86_585_320,
    ("deit3", "L/16", 224, 1000): 304_374_760,
    ("deit3", "H/14", 224, 1000): 632_126_440,
    ("siglip", "B/16", 224, 0): 92_884_224,
    ("siglip", "L/16", 256, 0): 315_956_224,
    ("siglip", "So400m/14", 224, 0): 427_680_704,
    ("siglip2", "g-opt/16", 256, 0): 1_163_168_256,
    ("mae", "B/16", 224, 0): 85_798_656,
    ("mae", "L/16", 224, 0): 303_301_632,
    ("mae", "H/14", 224, 0): 630_764_800,
    ("clip", "B/32", 224, 0): 87_849_216,
    ("clip", "B/16", 224, 0): 86_192_640,
    ("clip", "L/14", 224, 0): 303_966_208,
    ("clip", "L/14", 336, 0): 304_293_888,
    ("openclip", "H/14", 224, 0): 632_076_800,
    ("openclip", "g/14", 224, 0): 1_012_645_632,
    ("openclip", "G/14", 224, 0): 1_844_907_264,
    ("dinov2", "S/14", 518, 0): 22_056_576,
    ("dinov2", "B/14", 518, 0): 86_580_480,
    ("dinov2", "L/14", 518, 0): 304_368_640,
    ("dinov2", "g/14", 518, 0): 1_136_480_768,
    ("dinov2_registers", "S/14", 518, 0): 22_058_112,
    ("dinov2_registers", "B/14", 518, 0): 86_583_552,
    ("dinov2_registers", "L/14", 518, 0): 304_372_736,
    ("dinov2_registers", "g/14", 518, 0): 1_136_486_912,
    ("dinov3", "S/16", 224, 0): 21_596_544,
    ("dinov3", "S+/16", 224, 0): 28_692_864,
    ("dinov3", "B/16", 224, 0): 85_660_416,
    ("dinov3", "L/16", 224, 0): 303_129_600,
    ("dinov3", "H+/16", 224, 0): 840_592_640,
    ("dinov3", "7B/16", 224, 0): 6_716_035_072,
}
# family, size, pixels: GFLOP an image (2 x MAC) and how many of its last digit papers may differ.
GFLOPS = {
    ("dinov3", "S/16", 256): 12, ("dinov3", "S/16", 512): 63,
    ("dinov3", "S+/16", 256): 16, ("dinov3", "S+/16", 512): 79,
    ("dinov3", "B/16", 256): 47, ("dinov3", "B/16", 512): 216,
    ("dinov3", "L/16", 256): 163, ("dinov3", "L/16", 512): 721,
    ("dinov3", "H+/16", 256): 450, ("dinov3", "H+/16", 512): 1903,
    ("dinov3", "7B/16", 256): 3550, ("dinov3", "7B/16", 512): 14515,
    ("deit3", "S/16", 224): 2 * 4.6, ("deit3", "M/16", 224): 2 * 8.0,
    ("deit3", "B/16", 224): 2 * 17.5, ("deit3", "L/16", 224): 2 * 61.6,
    ("deit3", "H/14", 224): 2 * 167.4,
}  # fmt: skip


def make(family, size, pixels, num_classes=0):
    options = families.options(family, size) | {"num_classes": num_classes}
    options |= {} if num_classes else {"distill_head": False}
    return vit(image_size=pixels, channels=3, **options)


@pytest.mark.parametrize("key", PARAMS, ids=str)
def test_parameters_equal_other_implementations(key):
    model = make(*key)
    assert sum(shapes.count_params(dict(model.arguments)["geometry"]).values()) == PARAMS[key]


@pytest.mark.parametrize("key", GFLOPS, ids=str)
def test_flops_equal_the_published_ones(key):
    """DINOv3's paper, table 2 and its code; DeiT III's paper, table 4, which counts MACs."""
    assert make(*key).flops_per_image / 1e9 == pytest.approx(GFLOPS[key], rel=0.015, abs=0.51)


@pytest.mark.parametrize(
    ("family", "size"), [(f, s) for f, found in families.FAMILIES.items() for s in found.sizes]
)
def test_every_named_model_is_built_as_counted(family, size):
    model = make(family, size, 224)
    assert sum(shapes.count_params(dict(model.arguments)["geometry"]).values()) == model.num_params


def test_a_config_takes_a_family():
    config = vitjax.config.load_config("vit_s16_i1k")
    config.model.update(families.options("dinov3", "S/16"))
    assert config.model.positions == "rope" and config.model.layer_scale == 1e-5


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="unknown family 'dino2'; did you mean 'dinov2'"):
        families.options("dino2", "B/14")
    with pytest.raises(InputError, match="dinov2 has no size 'B/16'; did you mean 'B/14'"):
        families.options("dinov2", "B/16")
