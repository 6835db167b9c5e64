"""How every benchmark prints: a table for people, or with JSON=1 one JSON object."""

import json
import os
import sys

from rich.console import Console
from rich.table import Table


def report(title: str, results: dict[str, float | int | str], notes: dict[str, str] | None = None) -> None:
    """Print `results`; `notes` explain single rows (a bar to hold, a unit)."""
    if os.environ.get("JSON") == "1":
        sys.stdout.write(json.dumps(results) + "\n")
        return
    table = Table(title=title, title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("")
    for name, value in results.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        table.add_row(name, shown, (notes or {}).get(name, ""))
    Console().print(table)
