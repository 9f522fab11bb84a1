"""python -m akd_dist.documents: write akd_dist/documents/schemas/*.schema.json afresh."""

from akd_dist.documents.json_schema import SCHEMAS, schema_text, schemas

if __name__ == "__main__":
    for name in schemas():
        (SCHEMAS / f"{name}.schema.json").write_text(schema_text(name))
