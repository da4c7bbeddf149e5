"""The Apptainer image: building, reading, signing and running it.

The image is built from a checkout of the repository, which contains the definition
(``container/``) and the entry point. This package imports nothing: the worker runs in the image
without the libraries for building, and imports ``image.container`` and ``image.sif``.
"""
