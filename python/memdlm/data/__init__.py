"""Batches and datasets."""
