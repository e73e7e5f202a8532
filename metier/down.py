"""``metier down``: end what ``metier up`` started."""

from __future__ import annotations

from metier import process
from metier.console import say
from metier.options import ConfigOption, SetOption, open_config


def down(config: ConfigOption = None, set_: SetOption = None) -> None:
    """End the server of this configuration, with its Ray and its embedded Milvus; nothing is left running."""
    settings = open_config(config, set_)
    if settings.ray.address != "local":
        from serving.up import undeploy

        undeploy(settings)
        say(f"application '{settings.name}' is removed from the Ray cluster at {settings.ray.address}")
        return
    running = process.read(settings)
    if running is None:
        say("nothing is up")
        return
    by_itself = process.stop(running)
    say("down" if by_itself else f"process {running.pid} did not end in time and was killed")
