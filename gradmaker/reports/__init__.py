"""Reports on a maker or a model: summary, verification, spectrum.

What is here is asked for by a user, reads what a maker has measured or measures on the side, and changes nothing.
"""
