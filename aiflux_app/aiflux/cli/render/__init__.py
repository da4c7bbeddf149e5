"""Text for the terminal, made from values: runs, models, estimates, progress."""
