"""vLLM: the process that watches its server, the server around its engine, the loader inside its worker."""
