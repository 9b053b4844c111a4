"""What may be removed from a model: trace, groups, plans, candidates and their exact cost."""

import lazy_loader

# Parts are imported when they are asked for; `__init__.pyi` lists them.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
