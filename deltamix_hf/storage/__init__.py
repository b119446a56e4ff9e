"""Files of a delta repo without a model: tensor names, headers, sizes, and paths not to trust."""
