"""How long a training lasts, and how the options of a row are searched.

What belongs here proposes options and is told scores; it trains nothing.
"""
