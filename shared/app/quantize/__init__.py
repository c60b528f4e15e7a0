"""`quantize`: convert a transformer's or a ControlNet's file into another format, report on it, make it a preset."""

from shared.app.quantize.recipes import recipe_names
from shared.app.quantize.request import QuantizeRequest
from shared.app.quantize.result import Chosen, QuantizeResult
from shared.app.quantize.run import quantize

__all__ = ["Chosen", "QuantizeRequest", "QuantizeResult", "quantize", "recipe_names"]
