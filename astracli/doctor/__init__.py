"""Is this machine able, what is wrong, how to mend it: checks on the facts of it."""
