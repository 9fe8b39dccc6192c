"""From the data, loss and metrics of a task to batches, calls of the model, and numbers.

What belongs here knows the forms of a user's data and nothing of methods: sources of batches, what of a batch the model and the
loss get, and means over a part of the data.
"""
