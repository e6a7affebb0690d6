"""Runs of circuits: by hooks (the definition), many at once, and with edges removed one after the other."""
