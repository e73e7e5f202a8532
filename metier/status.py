"""``metier status``: what runs, and what there is to run."""

from __future__ import annotations

from metier import process
from metier.console import print_json, table
from metier.options import ConfigOption, JsonOption, SetOption, open_config, open_registry


def status(config: ConfigOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """Show the server, the knowledge, the adapters and the releases of this configuration."""
    settings = open_config(config, set_)
    registry = open_registry(settings)
    running = process.read(settings)
    adapters = registry.adapters()
    releases = registry.releases()
    prod = next((made for made in releases if made.name == settings.name and "prod" in made.aliases), None)
    state = {
        "server": {"url": running.url, "pid": running.pid} if running else None,
        "knowledge": {"name": settings.knowledge.name, "version": registry.knowledge_head(settings.knowledge.name)},
        "adapters": len(adapters),
        "releases": len(releases),
        "prod": prod.digest if prod else None,
    }
    if json:
        print_json(state)
        return
    newest = max(adapters, key=lambda adapter: adapter.created, default=None)
    knowledge = state["knowledge"]["version"]  # type: ignore[index]
    table(
        ("what", "state"),
        [
            ("server", f"up at {running.url} (process {running.pid})" if running else "down; `metier up` starts it"),
            ("knowledge", f"{settings.knowledge.name} v{knowledge}" if knowledge else "empty; `metier index` fills it"),
            ("adapters", f"{len(adapters)}, newest {newest.ref}" if newest else "none; `metier train` makes one"),
            ("releases", str(len(releases)) if releases else "none; `metier release create` makes one"),
            (f"{settings.name}@prod", prod.digest[:12] if prod else "-"),
        ],
    )
