"""Find and build smaller models by structured pruning."""

import lazy_loader

# Parts are imported when they are asked for (`__init__.pyi` lists them): torch takes seconds, which `--help` need not
# wait for. The function `search` takes the place of the folder's name; import the folder's parts with `from`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
