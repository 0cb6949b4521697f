"""``kdflow plugins`` and ``kdflow --version``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kdflow.cli import app
from kdflow.cli.console import stdout, table
from kdflow.cli.new_plugin import Kind, write_plugin
from kdflow.cli.options import Json
from kdflow.contracts import KdflowError
from kdflow.plugins import Plugin, installed, load
from kdflow.validation import nearest

commands = typer.Typer(no_args_is_help=True, help="Show which plugins are installed, and what became of them.")
app.add_typer(commands, name="plugins")


def _names(incomplete: str) -> list[str]:
    """For completion in a shell."""
    return [plugin.name for plugin in installed() if plugin.name.startswith(incomplete)]


@commands.command("list")
def list_plugins(ctx: typer.Context, as_json: Json = False) -> None:
    """List every plugin: loaded, blocked or failed."""
    plugins = load(ctx.obj).plugins
    if as_json:
        print(json.dumps([asdict(plugin) for plugin in plugins], indent=2))
        return
    rows = table("plugin", "distribution", "status", "provides")
    for plugin in plugins:
        status = {"loaded": "loaded", "blocked": "[yellow]blocked[/]", "failed": "[red]failed[/]"}[plugin.status]
        told = ", ".join(plugin.provides) or (plugin.error or "")
        rows.add_row(escape(plugin.name), f"{plugin.distribution} {plugin.version}", status, escape(told))
    stdout().print(rows if plugins else "no plugins are installed")


@commands.command("show")
def show_plugin(
    ctx: typer.Context, name: Annotated[str, typer.Argument(autocompletion=_names)], as_json: Json = False
) -> None:
    """Show one plugin, by its entry point's name."""
    plugins = load(ctx.obj).plugins
    found = next((plugin for plugin in plugins if plugin.name == name), None)
    if found is None:
        names = [plugin.name for plugin in plugins]
        hint = nearest(name, names) or "."
        raise KdflowError(f"plugin '{name}' is not installed{hint} Installed: {', '.join(names) or 'none'}.")
    print(json.dumps(asdict(found), indent=2) if as_json else _described(found))


@commands.command("new")
def new_plugin(
    name: Annotated[str, typer.Argument(help="What run files will call it, such as my_divergence.")],
    kind: Annotated[Kind, typer.Option(help="What it brings.")] = Kind.divergence,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The directory to make. [kdflow-NAME]", show_default=False)
    ] = None,
) -> None:
    """Write a package with a plugin that works, and with its tests."""
    print(write_plugin(name, kind, output))


def _described(plugin: Plugin) -> str:
    lines = [f"{plugin.name}: {plugin.status}", f"  distribution  {plugin.distribution} {plugin.version}",
             f"  module        {plugin.module}"]  # fmt: skip
    lines += [f"  provides      {entry}" for entry in plugin.provides]
    return "\n".join([*lines, f"  error         {plugin.error}"] if plugin.error else lines)


def print_versions() -> None:
    """kdflow's version, and those of distributions with plugins."""
    import kdflow

    print(f"kdflow {kdflow.__version__}")
    others = {f"{plugin.distribution} {plugin.version}" for plugin in installed() if plugin.distribution != "kdflow"}
    for other in sorted(others):
        print(f"plugin {other}")
