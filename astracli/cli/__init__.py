"""The command line, one thin file per command: parse, call one function, hand its result to the output."""
