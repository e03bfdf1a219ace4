"""Lightning modules, callbacks and the commands fit and validate."""
