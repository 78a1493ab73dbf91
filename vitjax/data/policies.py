"""Named augmentation policies for kinds of images: one line in a config.

`{"target": "vitjax.data.policies:Policy", "name": "chest_xray"}`
"""

import dataclasses
import functools
from collections.abc import Callable

import jax

from vitjax import config as config_lib
from vitjax.data.augment import Batch
from vitjax.errors import InputError, suggest

Blocks = tuple[dict, ...]


def _block(target: str, **arguments) -> dict:
    return {"target": f"vitjax.data.{target}", **arguments}


def natural(image_size: int) -> Blocks:
    """Photographs: a flip, then 3-Augment; after a random crop on the host.

    Source: Touvron et al. 2022 (DeiT III, arXiv 2204.07118). The blur's sigma is that of 224
    pixels and shrinks with the image.
    """
    sigma = (0.1 * image_size / 224, 2.0 * image_size / 224)
    return (_block("augment:RandomFlip"), _block("colour:ThreeAugment", sigma=sigma))


def chest_xray(image_size: int) -> Blocks:
    """Chest radiographs: how a patient stands and how a film is exposed, and no more.

    No flip: it moves the heart to the other side and turns the letter of the marker, so it makes
    situs inversus of a healthy chest. Rotations are those of posture, to 10 degrees as in
    MoCo-CXR (Sowrirajan et al. 2021, arXiv 2010.05352, which does flip); what comes into view is
    black, as beyond the collimator. Brightness, contrast and gamma stand for exposure and the
    maker's look-up table; none hides a faint opacity. No blur, noise or erasing: nodules are small.
    """
    del image_size
    return (
        _block("geometry:RandomAffine", degrees=10.0, scale=(0.9, 1.1), translate=0.05, fill=0.0),
        _block("colour:ColourJitter", brightness=0.15, contrast=0.2),
        _block("colour:Gamma", low=0.8, high=1.25),
    )


def dermatology(image_size: int) -> Blocks:
    """Skin lesions: no upright, any angle, some light.

    A dermatoscope has no fixed orientation. Flips, affine maps and colour are among the scenarios
    that Perez et al. 2018 (arXiv 1809.01442) compare for melanoma. Colour is a diagnostic sign, so
    hue moves by 2% of the circle only. Skin goes on beyond the picture: the edge
    fills, and magnifying leaves less of it to fill.
    """
    del image_size
    return (
        _block("augment:RandomFlip", vertical=True),
        _block("geometry:RandomAffine", degrees=180.0, scale=(0.9, 1.3), shear=10.0, fill="edge"),
        _block("colour:ColourJitter", brightness=0.15, contrast=0.15, saturation=0.15, hue=0.02),
    )


def histology(image_size: int) -> Blocks:
    """Stained tissue: the eight symmetries of the square, stain and scanner.

    Stains differ between laboratories, and colour augmentation is what helps most against that:
    Tellez et al. 2019 (arXiv 1902.06543); hue and saturation stand for the stain, brightness and
    contrast for the scanner, blur for its focus. Quarter turns need no resampling.
    """
    sigma = (0.1 * image_size / 224, 1.5 * image_size / 224)
    return (
        _block("augment:RandomFlip"),
        _block("geometry:RandomQuarterTurn"),
        _block("colour:ColourJitter", brightness=0.2, contrast=0.2, saturation=0.25, hue=0.06),
        _block("colour:GaussianBlur", sigma=sigma, probability=0.25),
    )


def ct(image_size: int) -> Blocks:
    """Slices of computed tomography, windowed to [0, 1].

    A subset of nnU-Net's (Isensee et al. 2021, arXiv 1904.08128): rotation, scaling, noise and
    gamma, weaker, for windowed values. nnU-Net mirrors; here flips are off, because sides matter
    for organs: where they do not, put a RandomFlip before. Outside is air, black.
    """
    del image_size
    return (
        _block("geometry:RandomAffine", degrees=15.0, scale=(0.85, 1.2), translate=0.05, fill=0.0),
        _block("colour:GaussianNoise", std=(0.0, 0.03)),
        _block("colour:Gamma", low=0.7, high=1.5),
    )


def ultrasound(image_size: int) -> Blocks:
    """B-mode ultrasound: left and right may change places, near and far may not.

    The beam comes from above, and shadows and enhancement lie below what casts them: no vertical
    flip and no large rotation. Gain and compression are set by hand, so brightness, contrast and
    gamma vary.
    """
    del image_size
    return (
        _block("augment:RandomFlip"),
        _block("geometry:RandomAffine", degrees=10.0, scale=(0.85, 1.15), translate=0.06,
               fill="edge"),
        _block("colour:ColourJitter", brightness=0.2, contrast=0.2),
        _block("colour:Gamma", low=0.7, high=1.4),
    )  # fmt: skip


POLICIES: dict[str, Callable[[int], Blocks]] = {
    "natural": natural,
    "chest_xray": chest_xray,
    "dermatology": dermatology,
    "histology": histology,
    "ct": ct,
    "ultrasound": ultrasound,
}


def policy(name: str, image_size: int) -> Blocks:
    """The config blocks of a policy, in the order in which they run.

    Args:
      image_size: of the model, in pixels; lengths that are given in pixels depend on it.

    Raises:
      InputError: no such policy.
    """
    if name not in POLICIES:
        raise InputError(f"unknown policy {name!r}; {suggest(name, POLICIES)}")
    return POLICIES[name](image_size)


@functools.cache
def _operations(name: str, image_size: int) -> list[Callable]:
    return config_lib.build_all(policy(name, image_size))


@dataclasses.dataclass(frozen=True)
class Policy:
    """Applies a named policy, each operation with a key of its own.

    Attributes:
      name: "natural", "chest_xray", "dermatology", "histology", "ct" or "ultrasound"; the
        function of that name says what it does and why. For other strengths, put the blocks of
        `policy(name, size)` into the config, and change them there.
    """

    name: str

    def __post_init__(self):
        policy(self.name, 224)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        _, height, width, _ = batch["images"].shape
        operations = _operations(self.name, min(height, width))
        keys = jax.random.split(key, len(operations))
        for operation, operation_key in zip(operations, keys, strict=True):
            batch = operation(operation_key, batch)
        return batch
