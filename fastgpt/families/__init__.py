"""The families that fastgpt knows: where the parts of a model are, and its weights by fastgpt's names.

Hugging Face's GPT-2 (gpt2, and huggingface for its own door), nanoGPT, and the models of the book.
"""
