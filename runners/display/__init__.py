"""What the command line shows: tables and log messages, all on one console."""

import lazy_loader

# Parts are imported when they are asked for; `__init__.pyi` lists them.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
