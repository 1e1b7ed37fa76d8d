"""What a recipe would take, without loading its model: parameters, memory, hours, and what to change."""

from .forecasting import Forecast, forecast
from .training_plan import read_launch


__all__ = ["Forecast", "forecast", "read_launch"]
