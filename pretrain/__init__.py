"""Trains models, from batches to weights: the VAN family, the DeepSpeed engine, checkpoints, the training loop, evaluation and export."""
