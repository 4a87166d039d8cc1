"""Problems: where they come from, in which order they are asked, and the benchmarks they are measured on."""
