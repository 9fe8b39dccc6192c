"""Trainings of a comparison: one after the other or in processes, read from the store where they were completed before.

What belongs here runs many trainings; one training is `gradmaker.compare.trial`.
"""
