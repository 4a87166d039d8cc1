"""From a recipe and facts to processes, their places and their memory. Pure: nothing is started, nothing is read."""
