"""Reading checkpoints: names, files and folding; nothing here knows a model class."""
