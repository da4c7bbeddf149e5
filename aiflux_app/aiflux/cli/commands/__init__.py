"""The commands of `aiflux`, one module for each."""
