"""Bundles: the image, models and packages in one file, for clusters without internet."""
