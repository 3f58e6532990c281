"""The results as tables: one row a step of a case, one row a timeline."""
import json

PHASES = [
    "freeze", "discover", "lock", "hold", "cuda-checkpoint", "save-memory", "remap", "save-shm", "dump", "rewrite",
    "publish", "inspect", "load-shm", "prepare", "cgroup", "restore", "hooks", "resume", "fill", "cuda-restore", "unlock", "release",
]


def gib(count):
    return f"{count / 2**30:.2f}"


def text(rows, results, facts):
    """Markdown."""
    lines = ["# GPU suite", "", ", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += ["| case | result | s | |", "|---|---|---|---|"]
    for name, result in results.items():
        lines.append(f"| {name} | {result['result']} | {result['seconds']:.0f} | {result.get('why', '').replace('|', '/')[:400]} |")
    timed = [row for row in rows if row.get("timeline")]
    phases = {name for row in timed for name, _ in row["timeline"]}
    used = [name for name in PHASES if name in phases] + sorted(phases - set(PHASES))
    lines += ["", "## Timelines, seconds", ""]
    head = ["case", "step", "cold", "took or first answer", "images GiB", "staged GiB", "processes", *used]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in timed:
        sums = {}
        for name, seconds in row["timeline"]:
            sums[name] = sums.get(name, 0.0) + seconds
        took = row.get("first answer", row.get("took"))
        cells = [
            row["case"],
            row["step"],
            f"{row['cold']:.1f}" if "cold" in row else "",
            f"{took:.2f}" if took is not None else "",
            gib(row["bytes"]) if "bytes" in row else "",
            gib(row["staged"]) if "staged" in row else "",
            str(row.get("processes", row.get("cuda processes", ""))),
            *(f"{sums[name]:.3f}" if name in sums else "" for name in used),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## All else", ""]
    for row in rows:
        rest = {name: value for name, value in row.items() if name not in ("case", "step", "timeline")}
        if not row.get("timeline"):
            lines.append(f"- {row['case']}: {row['step']}: {short(rest)}")
    return "\n".join(lines) + "\n"


def short(facts):
    """Facts on a line."""
    def value(found):
        if isinstance(found, float):
            return f"{found:.3f}"
        return found if isinstance(found, str) else json.dumps(found)

    return ", ".join(f"{name} {value(found)}" for name, found in facts.items())


def table(rows):
    """Tab-separated: case, step, and facts as JSON."""
    lines = ["case\tstep\tfacts"]
    for row in rows:
        rest = {name: value for name, value in row.items() if name not in ("case", "step")}
        lines.append(f"{row['case']}\t{row['step']}\t{json.dumps(rest)}")
    return "\n".join(lines) + "\n"
