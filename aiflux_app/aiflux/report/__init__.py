"""The report of a run: figures from journals and status files, and the page that shows them."""
