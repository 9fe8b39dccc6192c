"""How long a training lasts, and how the options of a row are searched."""
