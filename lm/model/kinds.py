"""The kinds of layer that the model can have. Options name them too, so this file imports no torch."""

KINDS = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU", "Transformer")
