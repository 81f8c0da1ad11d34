# apex's name
"""Has the interface of apex.RNN, by torch's recurrent layers."""

from apex_compat.RNN.models import GRU, LSTM, ReLU, Tanh, mLSTM

__all__ = ["GRU", "LSTM", "ReLU", "Tanh", "mLSTM"]
