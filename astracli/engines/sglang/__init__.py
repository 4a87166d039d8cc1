"""SGLang: its server process, the directory it is started on, what an update wants, the loader inside the engine."""
