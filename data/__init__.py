"""From images to batches: shards, index, sample order, read-ahead, augmentation, DALI. Independent of models."""
