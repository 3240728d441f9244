"""The scorer and the store of references under the name that they had before `mopl.language_models`."""

from mopl.language_models.reference_store import ReferenceStore
from mopl.language_models.scoring import score_lists

__all__ = ["ReferenceStore", "score_lists"]
