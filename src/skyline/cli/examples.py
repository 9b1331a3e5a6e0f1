from __future__ import annotations


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "Examples:\n\n" + "\n\n".join(f"[bold]{line}[/bold]" for line in lines)
