"""Adapters that let other compression frameworks use `bgd_plugin`, one module per framework.

Importing this package imports no framework. Each adapter is a module of its own, declared as an entry point of the
group ``bgd_plugin.adapters`` and loaded by ``bgd_plugin.load_adapter(name)``. Adapters import the core and never each
other.
"""
