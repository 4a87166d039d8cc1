"""Is this machine able, what is wrong, how to mend it: checks on the document that `machine.probe` makes."""
