"""Where a launch plan runs: the supervised processes of one machine, and what the commands do with them."""
