"""Reports on a maker or a model: summary, verification, spectrum."""
