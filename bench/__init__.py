"""What fastgpt is measured with: `python -m bench compile` so far."""
