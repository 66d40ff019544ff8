"""Sources of data, one kind a file, and the splits they are made of."""
