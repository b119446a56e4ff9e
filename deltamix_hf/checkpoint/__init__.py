"""Files of a delta repo or a base against a model: what they hold, whether and how they fit."""
