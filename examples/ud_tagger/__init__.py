"""Parts of the tagging experiment that `ud_tagger.py` beside this folder runs."""
