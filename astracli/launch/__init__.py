"""Where a launch plan runs: fetching, the supervised processes of one machine, and what the commands do with them."""
