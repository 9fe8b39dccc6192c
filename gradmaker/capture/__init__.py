"""What a forward and a backward pass show of layers: tapes, sites, layer rules, one-hot inputs, shapes of tensors."""
