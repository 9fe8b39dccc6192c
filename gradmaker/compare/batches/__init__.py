"""From the data, loss and metrics of a task to batches, calls of the model, and numbers."""
