"""Transfer of checkpoints to medical images: readers, metrics, guards, presets, reports."""
