"""A stand-in: SGLang imports the display of notebooks."""
