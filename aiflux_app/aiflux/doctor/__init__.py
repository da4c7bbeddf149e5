"""The site checks of `aiflux doctor`."""
