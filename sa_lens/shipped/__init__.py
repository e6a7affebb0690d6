"""The shipped models, a folder each, and the command that makes them: `python -m sa_lens.shipped.make`.

`recipes.py` says how each is trained, `measuring.py` what is measured and what a model must reach, `make.py` trains,
rounds, measures and packs. `sa_lens.catalogue` finds the folders by name.
"""
