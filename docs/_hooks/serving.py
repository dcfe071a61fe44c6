"""Figures of the server beside the clients that people use."""

from __future__ import annotations

from drawing import Figure, figure, results


@figure("server-clients")
def server_clients() -> Figure:
    """What each client's checks found."""
    rows = []
    for name, entry in results("server_clients")["clients"].items():
        checks = entry.get("checks", {})
        good = sum(value is True for value in checks.values())
        failed = ", ".join(check for check, value in checks.items() if value is not True)
        kept = f"{good} of {len(checks)}" if checks else "left out"
        rows.append([name.replace("_", " "), entry.get("version", "-"), kept, failed or "-"])
    headers = ["client", "version", "checks that hold", "those that do not"]
    return Figure("Stock clients against one server", ("server_clients",), headers, rows)
