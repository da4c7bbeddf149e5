"""Bundles: image, models and packages in a single file, for clusters without internet."""
