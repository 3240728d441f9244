"""`load_preferences` under the name that it had before `mopl.language_models`."""

from mopl.language_models.readers import load_preferences

__all__ = ["load_preferences"]
