"""What a transfer config holds, and its defaults."""

from ml_collections import ConfigDict

from vitjax import config as config_lib
from vitjax.config import Config, base_config

PRESETS = ("knn", "linear", "lp_ft", "freeze", "lora", "full", "bit_hyper")
FLOORS = ("majority", "pixels", "scratch", "cnn")
IMBALANCE = ("none", "class_weights", "balanced_sampling", "logit_adjustment", "focal")


def transfer_config() -> Config:
    """Every key of a transfer, with a comment where its name does not say all."""
    return ConfigDict(
        {
            "root": "",  # where the data lies; a reader may refer to it
            "cohort": {"target": ""},  # a reader in vitjax.medical.readers
            "slides": {"target": ""},  # instead of a cohort: slides, in vitjax.medical.slides
            "tiling": {
                "tile_size": 224,
                "microns_per_pixel": 0.5,
                "level": None,  # instead of a resolution: a level of the file
                "overlap": 0,
                "min_tissue": 0.5,
                "tissue": "otsu",  # or saturation
            },
            "mil": {
                "epochs": 50,
                "peak_lr": 2e-4,
                "weight_decay": 1e-2,
                "batch_size": 4,
                "bag_dropout": 0.2,
                "max_instances": 4096,
                "class_weights": "balanced",
                "patience": 15,
            },
            "val_fraction": 0.15,  # carved from train, by group, where the data has no split
            "test_fraction": 0.2,
            "folds": 0,  # above 1: cross-validation of train and val, each seed holds out a fold
            "presets": PRESETS,  # tried; the best on the validation split is reported first
            "floors": FLOORS,  # printed beside them
            "seeds": (0, 1, 2),
            "inputs": (),  # columns, such as age and sex, that the model sees beside the image
            "allow": (),  # findings of the privacy lint that are no matter
            "drop_colour": False,  # let a checkpoint of grey images see colour images in grey
            "pretraining": "",  # the run directory of the checkpoint: count images that it has seen
            "image_size": None,  # None: what the checkpoint was trained on
            "policy": "auto",  # augmentation: a name of data.policies, None, or what suits the data
            "transforms": (),  # on the host, in training, such as a RandomResizedCrop
            "imbalance": "none",  # or class_weights, balanced_sampling, logit_adjustment, focal
            "focal_gamma": 2.0,
            "label_smoothing": 0.0,
            "train": {
                "batch_size": 64,
                "epochs": 20.0,  # over the training split, within these steps
                "min_steps": 200,
                "max_steps": 20000,
                "evaluations": 20,  # of the validation split in a whole run
                "patience": 6,  # of them without a gain end it
                "peak_lr": {
                    "lp_ft": 1e-4,
                    "freeze": 5e-4,
                    "lora": 2e-3,
                    "full": 5e-4,
                    "bit_hyper": 0.003,  # at a batch of 512
                    "scratch": 1e-3,
                    "cnn": 1e-3,
                    "vit": 1e-3,
                    "hybrid": 1e-3,
                },
                "weight_decay": 0.05,
                "layer_decay": 0.75,
                "drop_path_rate": 0.1,
                "ema_decay": None,  # of an average of the weights, which is then evaluated
                "noise": 0.2,  # the most of "+noise": standard deviation, of the full range
                "frozen_blocks": None,  # None: half of them
                "lora_rank": 8,
                "mesh": config_lib.plain(base_config().mesh),
                "num_threads": None,
            },
            "low_data": {
                "labelled": (),  # images or shares, such as (50, 100, 0.5); (): no curves
                "methods": ("linear", "full", "scratch", "hybrid", "cnn"),
                "seeds": (0, 1, 2, 3, 4),
            },
            # The chosen preset, the same trained on noisy images, and what was drawn afresh, under
            # corruptions of the test images.
            "robustness": True,
            "report": {
                "num_bootstraps": 2000,
                "level": 0.95,
                "min_cases": 50,  # of a subgroup
                "min_positives": 10,
                "goals": {},  # of the official metric, such as {"auc": 0.95}: reached or missed
                "sensitivity_at": 0.9,  # specificity, with thresholds from the validation split
                "views": 8,  # of a test image, by the policy, for test-time augmentation; 1: none
                "duplicates": True,  # search for them; within and across splits
                "predict_train": False,  # put the training images into predictions.csv too
            },
        }
    )
