"""``kdflow algorithms``."""

from __future__ import annotations

import inspect
import json
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python
from rich.markup import escape

from kdflow.cli import app
from kdflow.cli.console import stdout, table
from kdflow.cli.options import Json
from kdflow.plugins import Plugins, Registered, load

commands = typer.Typer(no_args_is_help=True, help="Show the algorithms that a run file can select.")
app.add_typer(commands, name="algorithms")


def _names(incomplete: str) -> list[str]:
    """For completion in a shell."""
    return [entry.name for entry in load().of_kind("algorithm", "divergence") if entry.name.startswith(incomplete)]


@commands.command("list")
def list_algorithms(ctx: typer.Context, as_json: Json = False) -> None:
    """List every algorithm with what it needs and where it comes from."""
    plugins = load(ctx.obj)
    entries = [_entry(plugins, registered) for registered in plugins.of_kind("algorithm", "divergence")]
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    if not entries:
        stdout().print("no algorithms are installed; see 'kdflow plugins list'")
        return
    rows = table("algorithm", "kind", "needs", "distribution", "paper")
    for entry in entries:
        rows.add_row(
            entry["name"],
            entry["kind"],
            ", ".join(entry["needs"]) or "-",
            entry["distribution"],
            escape(entry["paper"] or "-"),
        )
    stdout().print(rows)


@commands.command("show")
def show_algorithm(
    ctx: typer.Context, name: Annotated[str, typer.Argument(autocompletion=_names)], as_json: Json = False
) -> None:
    """Show one algorithm: what it does, its paper, its options with their defaults."""
    plugins = load(ctx.obj)
    registered = plugins.find(name, "algorithm", "divergence")
    cls = plugins.algorithm(name)
    options = {key: _option(field) for key, field in cls.Options.model_fields.items()}
    entry = _entry(plugins, registered)
    if as_json:
        print(json.dumps({**entry, "description": inspect.getdoc(registered.cls) or "", "options": options}, indent=2))
        return
    console = stdout()
    console.print(f"[bold]{name}[/] ({entry['kind']} of {entry['distribution']})")
    console.print(escape(inspect.getdoc(registered.cls) or ""))
    console.print(f"needs: {', '.join(entry['needs']) or 'nothing'}    paper: {escape(entry['paper'] or '-')}")
    rows = table("option", "type", "default", "")
    for key, option in options.items():
        default = "required" if option["required"] else str(option["default"])
        rows.add_row(key, escape(option["type"]), escape(default), escape(option["description"]))
    if options:
        console.print(rows)


def _entry(plugins: Plugins, registered: Registered) -> dict[str, Any]:
    cls = plugins.algorithm(registered.name)
    return {
        "name": registered.name,
        "kind": registered.kind,
        "needs": sorted(cls.needs),
        "paper": cls.paper,
        "distribution": registered.plugin.distribution,
        "version": registered.plugin.version,
    }


def _option(field: FieldInfo) -> dict[str, Any]:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [f"{signs[key]} {getattr(bound, key)}" for bound in field.metadata for key in signs if hasattr(bound, key)]
    return {
        "type": ", ".join([_type(field.annotation), *bounds]),
        "required": field.is_required(),
        "default": None if field.is_required() else to_jsonable_python(_default(field), fallback=str),
        "description": field.description or "",
    }


def _type(kind: Any) -> str:
    """A type as it is written; of a choice its values."""
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(map(_type, get_args(kind)))
    return "None" if kind is NoneType else kind.__name__ if isinstance(kind, type) else str(kind)


def _default(field: FieldInfo) -> Any:
    try:
        return field.get_default(call_default_factory=True)
    except ValueError:
        return None  # it is made of other options
