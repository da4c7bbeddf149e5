"""The Apptainer image: building it and reading what is in it.

It is built from a checkout of the repository, which holds the definition (``container/``) and the
entry point. Nothing is imported here: the worker, which runs in the image without the libraries
that build it, imports ``image.container`` and ``image.sif``.
"""
