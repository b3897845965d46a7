"""Write the reference of the public functions from their docstrings to build/api: `make docs`."""

import dataclasses
import inspect
import typing
import warnings
from pathlib import Path

import pdoc

import fastgrpo

warnings.simplefilter("error")  # a name or a type that pdoc cannot resolve
for value in vars(fastgrpo).values():
    # pdoc looks for the names of these annotations where Python generated the function.
    if dataclasses.is_dataclass(value):
        value.__init__.__annotations__ = typing.get_type_hints(value)
    elif inspect.isclass(value) and hasattr(value, "_fields"):
        value.__new__.__annotations__ = typing.get_type_hints(value)
pdoc.render.configure(docformat="google")
pdoc.pdoc("fastgrpo", output_directory=Path("build/api"))
