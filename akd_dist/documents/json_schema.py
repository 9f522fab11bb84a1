"""The JSON Schemas of all documents, as they ship."""

import json
from pathlib import Path
from typing import Any

from akd_dist.documents.base import Document
from akd_dist.documents.cache import CacheDocument, PlanDocument
from akd_dist.documents.encodings import EncodingsDocument
from akd_dist.documents.error import ErrorDocument
from akd_dist.documents.fleet import FleetDocument
from akd_dist.documents.imported import ImportedDocument
from akd_dist.documents.plan import FleetPlanDocument
from akd_dist.documents.report import CompareDocument, ReportDocument
from akd_dist.documents.status import StatusDocument
from akd_dist.documents.stores import GcDocument, RepairDocument, StoreDocument, StoresDocument, VerifyDocument
from akd_dist.documents.tune import TuneDocument
from akd_dist.documents.use import (
    EvaluationDocument,
    ExportDocument,
    GenerationDocument,
    ModelImportDocument,
    PredictionDocument,
)
from akd_dist.recipe import recipe_schema

SCHEMAS = Path(__file__).parent / "schemas"


def schemas() -> dict[str, dict[str, Any]]:
    """Every JSON Schema of the package, by name."""
    documents: dict[str, type[Document]] = {
        "cache": CacheDocument,
        "cache-plan": PlanDocument,
        "plan": EncodingsDocument,
        "fleet-plan": FleetPlanDocument,
        "stores": StoresDocument,
        "store": StoreDocument,
        "verify": VerifyDocument,
        "repair": RepairDocument,
        "gc": GcDocument,
        "stores-import": ImportedDocument,
        "fleet": FleetDocument,
        "compare": CompareDocument,
        "tune": TuneDocument,
        "report": ReportDocument,
        "status": StatusDocument,
        "evaluate": EvaluationDocument,
        "predict": PredictionDocument,
        "generate": GenerationDocument,
        "export": ExportDocument,
        "model-import": ModelImportDocument,
        "error": ErrorDocument,
    }
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    generated = {name: dialect | document.model_json_schema() for name, document in documents.items()}
    return {"recipe": recipe_schema(), **generated}


def schema_text(name: str) -> str:
    """A schema as it ships."""
    return json.dumps(schemas()[name], indent=2, ensure_ascii=False) + "\n"
