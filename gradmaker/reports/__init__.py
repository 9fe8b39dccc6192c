"""Reports on a maker or a model: summary, verification, spectrum.

A user asks for a report. It reads what a maker has measured, or measures on the side, and changes nothing.
"""
