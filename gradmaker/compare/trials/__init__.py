"""Trainings of a comparison: one after the other or in processes, read from the store where they were completed before."""
