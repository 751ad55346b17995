"""One module a data set family; each has `prepare(path, ...)` with plain keyword arguments."""
