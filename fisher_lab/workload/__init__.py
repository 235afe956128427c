"""The workload: text, tokenizer, corpus, model and checkpoint, and the loop that trains it.

Nothing here is imported before it is needed: torch takes a second, `--help` must not.
"""
