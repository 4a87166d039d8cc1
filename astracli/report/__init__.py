"""What a run looks like: the live view, the closing table, what limited it, the HTML page, samples."""
