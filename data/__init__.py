"""From images to batches: shards, index, sample order, reading ahead, augmentation, DALI. Knows nothing of models."""
