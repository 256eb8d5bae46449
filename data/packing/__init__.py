"""Packs image sources into datasets of shards, adopts shards that other tools wrote, and verifies datasets."""
