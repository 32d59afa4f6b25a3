"""Post-training quantisation that stays close: channel factors, thresholds, rounding, biases.

network       the graph in PyTorch, differentiable, with what will be read quantised
groups        which tensors must be scaled alike
observe       ranges, and what an error in each tensor costs at the outputs
equalisation  channel factors from both
rounding      weights to second order
repair        layer after layer: weights for the inputs they will see, biases for what is left
plan          all of it, each part kept where it helps on samples it did not see
"""
