"""The recipe's JSON schema, by which editors complete and check while one writes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from limbeck.core import catalogue
from limbeck.data.augment import TRANSFORMS
from limbeck.models import zoo
from limbeck.recipes.schema import Recipe


class _Generate(GenerateJsonSchema):
    """An option of a type that JSON does not have, such as a module, can be anything in a schema."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {}


def json_schema() -> dict[str, Any]:
    """The schema of a recipe with every method of limbeck, its options and their defaults.

    >>> json_schema()["properties"]["loss"]["anyOf"][1]["properties"]["kd"]["anyOf"][1]["properties"]["temperature"]
    {'default': 4.0, 'title': 'Temperature', 'type': 'number'}
    """
    schema = Recipe.model_json_schema(schema_generator=_Generate)
    own = {k: m for k, m in catalogue.methods().items() if m.cls.__module__.startswith("limbeck.")}
    term = schema["$defs"]["Term"]
    terms = {
        key: {
            "description": f"{method.card.title} ({method.card.year}). {method.card.use}",
            "anyOf": [
                {"type": "number"},
                _inline(method.options, {**term["properties"], "method": False}, method.preset),
            ],
        }
        for key, method in own.items()
    }
    loss = schema["properties"]["loss"]
    other = {"anyOf": [{"type": "number"}, {"$ref": "#/$defs/Term"}]}
    schema["properties"]["loss"] = {
        "description": loss["description"],
        "anyOf": [
            {"type": "string", "examples": list(own)},
            {"type": "object", "minProperties": 1, "properties": terms, "additionalProperties": other},
        ],
    }
    for name in ("Model", "TeacherModel"):
        schema["$defs"][name]["properties"]["model"]["examples"] = zoo.available()
    schema["$defs"]["Data"]["properties"]["augment"]["items"] = {
        "anyOf": [
            {"enum": list(TRANSFORMS)},
            {"type": "object", "minProperties": 1, "maxProperties": 1, "propertyNames": {"enum": list(TRANSFORMS)}},
        ]
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "limbeck recipe"}


def _inline(options: type[BaseModel], beside: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    """One method's term: its options, and what every term has."""
    try:
        own = options.model_json_schema(schema_generator=_Generate)
    except PydanticInvalidForJsonSchema:  # pragma: no cover - the generator lets everything pass
        own = {"properties": {}}
    properties = {**beside, **own["properties"]}
    for name, value in preset.items():
        properties[name] = {**properties[name], "default": value}
    return {"type": "object", "properties": properties, "additionalProperties": False}
