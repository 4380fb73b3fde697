"""What fastgpt is measured with: `pytest bench/`, and `python -m bench COMMAND`."""
