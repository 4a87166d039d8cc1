"""The rollout worker: leases, groups, and the weights of its engines."""
