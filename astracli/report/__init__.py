"""What a run looks like: the live view, the summary table, what limited it, the HTML page, samples."""
