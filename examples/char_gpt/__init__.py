"""The parts of the example `char_gpt.py`: text, model, rows, trainings, report."""
