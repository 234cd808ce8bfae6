"""What a command takes, from the dataclass of its settings: for --help, and for docs/settings.md."""

from collections.abc import Iterable, Mapping

from msae.settings import Key, keys

MORE = "docs/settings.md has every key with its range, default and meaning; --cfg job shows a composed configuration."
EXAMPLES = {
    "train": "python -m msae.train +experiment=gpt2_l8 model.k=64 tokens=10_000_000",
    "harvest": "python -m msae.harvest +experiment=gpt2_l8",
    "evaluate": "python -m msae.evaluate sae='[runs/<run>,runs/<run>/<arm>]'",
    "export": "python -m msae.export sae=runs/<run> to=saelens out=exported",
    "explore": "python -m msae.explore run=runs/<run>",
    "runs": "python -m msae.runs",
}


def help_text(command: str, cls: type, groups: Mapping[str, Iterable[str]]) -> str:
    """The groups of a command, each with its keys, and where to read on."""
    lines = [f"{EXAMPLES.get(command, f'python -m msae.{command}')}", ""]
    if command in ("train", "harvest"):
        lines += [
            "Configurations to choose from, as model=vanilla, preset=bussmann, +experiment=forest, +sweeps=fading:"
        ]
        lines += [f"  {name:11} {', '.join(choices)}" for name, choices in groups.items()] + [""]
    lines += ["Settings, as key=value:"]
    members: dict[str, list[str]] = {}
    for key in keys(cls):
        group, _, name = key.name.rpartition(".")
        members.setdefault(group + "." if group else "", []).append(name)
    lines += [f"  {group:20} {', '.join(names)}" for group, names in members.items()]
    return "\n".join([*lines, "", MORE])


def markdown_table(listed: Iterable[Key]) -> str:
    """Keys as a table: name, what it may be, default, meaning."""
    rows = [
        (f"`{key.name}`", key.expected, f"`{key.default}`" if key.default else "", key.meaning.replace("<", "\\<"))
        for key in listed
    ]
    cells = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(["| key | may be | default | meaning |", "|---|---|---|---|", *(f"| {row} |" for row in cells)])
