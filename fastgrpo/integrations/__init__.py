"""Adapters: the public functions, called the way a trainer calls its own. Nothing else is here."""
