"""megavar trains language models by variational reasoning; start reading at `megavar/rounds.py`."""

__version__ = "0.1.0"
