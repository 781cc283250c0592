"""The smallest settings with which every stage of a round really trains."""

TINY = {
    # so few steps teach one network a liver, not two
    "nested_fraction": 0,
    "ssl_iterations": 70,
    "retrain_iterations": 5,
    "sam_iterations": 2,
    "adapter_iterations": 8,
    "patch_voxels": 16000,
    "batch_unlabelled": 1,
    "batch_labelled": 1,
    "sam_batch": 2,
    "overlap": 0.25,
    "label_folds": 0,
    "promote_floor": 0,
}
TINY_SHAPE = (56, 48, 24)
