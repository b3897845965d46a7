"""Write the tables of README and docs: `python -m benchmarks.tables`.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`. It names the record that it
comes from, or says that it is predicted. Do not edit it by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.cases import BOUND
from benchmarks.environment import RESULTS, ROOT
from benchmarks.learning import COMMITTED, curve, kept_run
from benchmarks.profiles import newest_record
from benchmarks.support_tables import curve_table, times_table
from benchmarks.supports import PROFILES
from benchmarks.time_model import roofline
from benchmarks.time_model.machines import MACHINES
from benchmarks.train_step import table as race_table

# Each document, and the path of the records' folder in its links.
DOCUMENTS = {
    ROOT / "README.md": "benchmarks/results",
    ROOT / "docs" / "performance.md": "../benchmarks/results",
    ROOT / "docs" / "sparse-backward.md": "../benchmarks/results",
    ROOT / "docs" / "support.md": "../benchmarks/results",
    ROOT / "docs" / "training.md": "../benchmarks/results",
}
LEARNING = ROOT / "docs" / "figures" / "sparse-learning.json"
Row = dict[str, Any]


def newest(kind: str, results: Path = RESULTS) -> Path | None:
    """Return the record of times with the latest date, of a "cpu" or a "cuda" device."""
    dated = []
    for path in results.glob("*.json"):
        record = json.loads(path.read_text())
        # The folder has records of other kinds as well, and of checks alone.
        if record.get("speed") and (record["gpu"] is not None) == (kind == "cuda"):
            dated.append((record["date"], path))
    return max(dated)[1] if dated else None


def speed_table(record: Row, *, mode: str = "loss") -> str:
    """Return time, share of the bound and peak memory, one row for each provider and case."""
    lines = ["| tokens x vocabulary x hidden | implementation | ms (p10-p90) | share | peak MiB |"]
    lines += ["|---|---|---|---|---|"]
    peaks = {_key(row): row for row in record["memory"] if "peak_mib" in row}
    timed = {_key(row) for row in record["speed"]}
    untimed = [row for key, row in peaks.items() if key not in timed]
    for row in record["speed"] + untimed:
        if row["mode"] != mode or row["provider"] == BOUND:
            continue
        peak = row.get("peak_mib", peaks.get(_key(row), {}).get("peak_mib"))
        shown = "-" if peak is None else f"{peak:,.0f}"
        if "median_ms" not in row:
            cells = f"{'failed' if 'failure' in row else 'not timed'} | - | {shown}"
        else:
            times = f"{row['median_ms']:,.0f} ({row['p10_ms']:,.0f}-{row['p90_ms']:,.0f})"
            cells = f"{times} | {row['share_of_bound']:.2f} | {shown}"
        lines.append(f"| {_size(row)} | {row['provider']} | {cells} |")
    return "\n".join(lines)


def accuracy_table(record: Row, *, mode: str = "loss") -> str:
    """Return the distances from the fp64 oracle, one row for each provider and case."""
    lines = ["| tokens x vocabulary x hidden | implementation | log-prob rms | dhidden | dweight |"]
    lines += ["|---|---|---|---|---|"]
    for row in record["accuracy"]:
        if row["mode"] != mode or "errors" not in row:
            continue
        found = row["errors"]
        cells = " | ".join(_scientific(found[k]) for k in ("logps_rms", "dhidden", "dweight"))
        lines.append(f"| {_size(row)} | {row['provider']} | {cells} |")
    return "\n".join(lines)


def summary_table(record: Row) -> str:
    """Return time, memory and the gradient's error of exact fp32 losses, fastest first."""
    errors = {_key(row): row["errors"] for row in record["accuracy"] if "errors" in row}
    peaks = {_key(row): row["peak_mib"] for row in record["memory"] if "peak_mib" in row}
    shown = [
        row
        for row in record["speed"]
        if (row["mode"], row["dtype"]) == ("loss", "float32")
        and row["provider"] not in (BOUND, "fastgrpo sparse")
        and _key(row) in errors.keys() & peaks.keys()
    ]
    shown.sort(key=lambda row: (row["shape"]["vocab"], row["median_ms"]))
    lines = ["| tokens x vocabulary x hidden | implementation | ms | peak MiB | gradient error |"]
    lines += ["|---|---|---|---|---|"]
    for row in shown:
        name = (
            f"**{row['provider']}**" if row["provider"].startswith("fastgrpo") else row["provider"]
        )
        peak, error = peaks[_key(row)], _scientific(errors[_key(row)]["dweight"])
        lines.append(f"| {_size(row)} | {name} | {row['median_ms']:,.0f} | {peak:,.0f} | {error} |")
    return "\n".join(lines)


def modes_table(record: Row) -> str:
    """Return our own times of the modes that skip rows or keep entries, next to the dense loss."""
    own = [row for row in record["speed"] if row["provider"].startswith("fastgrpo")]
    dense = {
        _key(row)[1:3]: row["median_ms"]
        for row in own
        if row["mode"] == "loss" and row["provider"] != "fastgrpo sparse" and "median_ms" in row
    }
    lines = ["| tokens x vocabulary x hidden | mode | implementation | kept | ms | of the loss |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in own:
        if "median_ms" in row and _key(row)[1:3] in dense and row["mode"] != "logps":
            kept = f"{row['kept']:.0f}" if "kept" in row else ""
            share = row["median_ms"] / dense[_key(row)[1:3]]
            cells = f"{kept} | {row['median_ms']:,.0f} | {share:.2f}"
            lines.append(f"| {_size(row)} | {row['mode']} | {row['provider']} | {cells} |")
    return "\n".join(lines)


def conditions_table(record: Row) -> str:
    """Return the times of an fp32 loss on fewer threads and on a busy machine, fastest first."""
    if not record.get("conditions"):
        return "This record has none of these conditions."
    lines = ["| tokens x vocabulary x hidden | condition | implementation | ms (p10-p90) | share |"]
    lines += ["|---|---|---|---|---|"]
    timed = [row for row in record["conditions"] if "median_ms" in row and row["provider"] != BOUND]
    for row in sorted(timed, key=lambda row: (row["condition"], row["median_ms"])):
        times = f"{row['median_ms']:,.0f} ({row['p10_ms']:,.0f}-{row['p90_ms']:,.0f})"
        cells = f"{row['provider']} | {times} | {row['share_of_bound']:.2f}"
        lines.append(f"| {_size(row)} | {row['condition']} | {cells} |")
    return "\n".join(lines)


def profile_table(record: Row) -> str:
    """Return what each policy's rows look like; those of temperature 1 also by entropy."""
    lines = [
        "| rows | share | entropy, nats | mass beyond 64: median / p90 | kept at 1e-2 "
        "| kept at 1e-3: mean / p90 / max | kept at 1e-4 | top-p and top-k: mean / median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for policy in record["policies"]:
        mean, deciles = policy["entropy"]["mean"], policy["entropy"]["deciles"]
        spread = f"{mean:.2f} (p90 {deciles[8]:.2f})"
        lines.append(_rows_like(f"{policy['name']}, all", spread, policy))
        for band in policy["bands"] if policy["temperature"] == 1 else ():
            upper = f" to {band['to']:g}" if band["to"] < 99 else " and more"
            lines.append(_rows_like(policy["name"], f"{band['from']:g}{upper}", band))
    return "\n".join(lines)


def _rows_like(name: str, entropy: str, part: Row) -> str:
    kept, tail, nucleus = part["kept"], part["tail_mass"]["64"], part["nucleus"]
    at = kept["0.001"]
    return (
        f"| {name} | {part['share']:.3f} | {entropy} | {tail['p50']:.1e} / {tail['p90']:.1e} "
        f"| {kept['0.01']['mean']:.1f} | {at['mean']:.1f} / {at['p90']:.1f} / {at['max']:.0f} "
        f"| {kept['0.0001']['mean']:.0f} | {nucleus['mean']:.0f} / {nucleus['p50']:.0f} |"
    )


def clipping_table(record: Row) -> str:
    """Return the tokens that a clip silences after one update, by learning rate."""
    titles = "| learning rate | tokens | clipped | ratio off the range "
    lines = [f"{titles}| log-ratio, absolute: median / p99 |", "|---|---|---|---|---|"]
    for update in record["one_update"]["updates"]:
        for name in ("same_tokens", "other_tokens"):
            found = update[name]
            change = found["log_ratio"]
            lines.append(
                f"| {update['learning_rate']:.0e} | {name.replace('_', ' ')} "
                f"| {found['clipped']:.2%} | {found['outside']:.2%} "
                f"| {change['p50']:.1e} / {change['p99']:.1e} |"
            )
    return "\n".join(lines)


def _recorded(kind: str, render: Callable[[Row], str]) -> Callable[[Path, str], str]:
    """Return the table of the newest record of a kind of device, below a line that names it."""

    def table(results: Path, folder: str) -> str:
        path = newest(kind, results)
        if path is None:
            return "No record yet."
        record = json.loads(path.read_text())
        # Rows of a profile that another one has replaced are not what the documents describe.
        record["speed"] = [row for row in record["speed"] if _current(row)]
        return f"{_caption(path, record, folder)}\n\n{render(record)}"

    return table


def _beside(record: Row) -> str:
    """Return predictions beside measurements; on a CPU of fp32 only, for 16 bits are emulated."""
    if record["gpu"] is None:
        record = record | {"speed": [r for r in record["speed"] if r["dtype"] == "float32"]}
    return roofline.measured_table(roofline.machine_of(record), record)


def _profile(results: Path, folder: str) -> str:
    path, record = newest_record(results)
    model, rows = record["model"], sum(policy["rows"] for policy in record["policies"])
    facts = (
        f"{model['name']}, {model['parameters'] / 1e6:.0f}M parameters, V = {model['vocab']}, "
        f"H = {model['hidden']}, {rows:,} rows"
    )
    return f"{facts}; record {_link(path, folder)}.\n\n{profile_table(record)}"


def _clipping(results: Path, folder: str) -> str:
    path, record = newest_record(results)
    settings = record["one_update"]["settings"]
    facts = (
        f"{record['model']['name']}; {settings['loss']}; {settings['optimizer']}; "
        f"{settings['prompts']} prompts x {settings['group']} completions, "
        f"{settings['tokens_learnt']:,} of {settings['tokens']:,} tokens learnt from; "
        f"{settings['rewards']}"
    )
    return f"{facts}; record {_link(path, folder)}.\n\n{clipping_table(record)}"


def _predicted(results: Path, folder: str) -> str:
    machine, rows = MACHINES["h200"], 16384
    title = f"Predicted, {machine.name}, {rows} tokens: ms (share of the bound)."
    modes = ("logps", "loss", "frozen", "half_zero")
    exact = ("fastgrpo triton", "fastgrpo triton, tiles")
    return f"{title}\n\n{roofline.predicted_table(machine, rows, modes, exact)}"


def _curve(results: Path, folder: str) -> str:
    machine, rows = MACHINES["h200"], 16384
    path, record = newest_record(results)
    means = sorted(round(policy["kept"]["0.001"]["mean"]) for policy in record["policies"])
    title = (
        f"Predicted, {machine.name}, {rows} tokens: ms (in products of the forward, 2NVH). Of the "
        f"kept entries, {means} are the means at tau = 1e-3 in {_link(path, folder)}."
    )
    return f"{title}\n\n{roofline.kept_table(machine, rows, sorted({30, 250, *means}))}"


def _learning(results: Path, folder: str) -> str:
    """Return the runs of examples/sparse_backward.py, whose data lie beside its figure."""
    result = json.loads(LEARNING.read_text())
    exact = [statistics.fmean(curve) for curve in result["runs"]["0"]["rewards"]]
    lines = ["| gradients | entries per row | reward by quarter of the run | minus exact (seeds) |"]
    lines += ["|---|---|---|---|"]
    for tau, run in result["runs"].items():
        mean = [statistics.fmean(column) for column in zip(*run["rewards"], strict=True)]
        part = len(mean) // 4
        quarters = [statistics.fmean(mean[i * part : (i + 1) * part]) for i in range(4)]
        gaps = [statistics.fmean(c) - e for c, e in zip(run["rewards"], exact, strict=True)]
        gap = f"{statistics.fmean(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f})"
        lines.append(
            f"| {'exact' if tau == '0' else f'tau {tau}'} | {run['kept_entries']:,.0f} | "
            f"{' '.join(f'{q:.3f}' for q in quarters)} | {'' if tau == '0' else gap} |"
        )
    spread = statistics.stdev(exact)
    return (
        f"Mean of {len(exact)} seeds, data in [sparse-learning.json](figures/sparse-learning.json);"
        f" the mean reward of the exact runs differs by {spread:.4f} (standard deviation) from seed"
        " to seed.\n\n" + "\n".join(lines)
    )


def _runs(results: Path, folder: str) -> str:
    """Return what a pretrained model learnt in the committed runs of the loop."""
    lines = ["| run | steps | held-out accuracy, from before to after | mean reward of a step: "]
    lines[0] += "first ten, last ten | minutes | threads |"
    lines += ["|---|---|---|---|---|---|"]
    facts = None
    for name in COMMITTED:
        if not (results / "learning" / name).exists():
            continue
        result, steps, facts = kept_run(name, results / "learning")
        accuracies = " ".join(f"{value:.3f}" for value in curve(result, steps).values())
        rewards = [row["reward"] for row in steps]
        ends = ", ".join(f"{statistics.fmean(part):.3f}" for part in (rewards[:10], rewards[-10:]))
        lines.append(
            f"| [{name}]({folder}/learning/{name}/samples.md) | {result['steps']} | {accuracies} "
            f"| {ends} | {result['seconds'] / 60:.0f} | {facts['threads']} |"
        )
    if facts is None:
        return "No run yet."
    installed = ", ".join(f"{p} {facts['versions'][p]}" for p in ("torch", "transformers"))
    return f"{facts['device']}, {installed}.\n\n" + "\n".join(lines)


def _race(results: Path, folder: str) -> str:
    """Return the newest race of a training step against TRL's."""
    records = [(json.loads(p.read_text())["date"], p) for p in results.glob("train-step-*.json")]
    if not records:
        return "No record yet."
    path = max(records)[1]
    record = json.loads(path.read_text())
    rounds = len(record["samples"]["kept"]["ours"]["step half"])
    counted = f"medians of {rounds} rounds" if rounds > 1 else "one round"
    facts = f"{record['model']}, {record['settings']['dtype']}, {counted}"
    return f"{facts}. {_caption(path, record, folder)}\n\n{race_table(record)}"


def _support(render: Callable[[Row], str]) -> Callable[[Path, str], str]:
    """Return a table of the newest record of `benchmarks.support_cost`."""

    def table(results: Path, folder: str) -> str:
        records = [(json.loads(p.read_text())["date"], p) for p in results.glob("support-*.json")]
        if not records:
            return "No record yet."
        path = max(records)[1]
        record = json.loads(path.read_text())
        return f"{_caption(path, record, folder)}\n\n{render(record)}"

    return table


def _predicted_support(results: Path, folder: str) -> str:
    machine, rows = MACHINES["h200"], 16384
    title = f"Predicted, {machine.name}, {rows} tokens, bf16: bytes, ms (share of the dense loss)."
    kept = [round(profile.mean) for profile in PROFILES.values()]
    return f"{title}\n\n{roofline.support_table(machine, rows, kept)}"


# The marker's name -> from the folder of records, and the path of that folder in links, the text.
TABLES: dict[str, Callable[[Path, str], str]] = {
    "summary": _recorded("cpu", summary_table),
    "cpu": _recorded("cpu", speed_table),
    "conditions": _recorded("cpu", conditions_table),
    "cuda": _recorded("cuda", speed_table),
    "accuracy": _recorded("cpu", accuracy_table),
    "modes-cpu": _recorded("cpu", modes_table),
    "modes-cuda": _recorded("cuda", modes_table),
    "accuracy-cuda": _recorded("cuda", accuracy_table),
    "model-cpu": _recorded("cpu", _beside),
    "model-cuda": _recorded("cuda", _beside),
    "profile": _profile,
    "clipping": _clipping,
    "predicted": _predicted,
    "predicted-kept": _curve,
    "sparse-learning": _learning,
    "runs": _runs,
    "race": _race,
    "support": _support(times_table),
    "support-curve": _support(curve_table),
    "predicted-support": _predicted_support,
}


def fill(text: str, results: Path = RESULTS, folder: str = "benchmarks/results") -> str:
    """Return `text` with every marked table written anew; `folder` is the records' path in links.

    Raises ValueError for an unknown table name; a device without a record gets a sentence.
    """

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"table must be one of {sorted(TABLES)}, got {name!r}")
        return f"<!-- table:{name} -->\n{TABLES[name](results, folder)}\n<!-- /table -->"

    return re.sub(r"<!-- table:([\w-]+) -->.*?<!-- /table -->", table, text, flags=re.DOTALL)


def _caption(path: Path, record: Row, folder: str) -> str:
    versions = record["versions"]
    names = [name for name in ("torch", "triton", "trl", "liger-kernel") if name in versions]
    installed = ", ".join(f"{name} {versions[name]}" for name in names)
    return (
        f"{record['device']}, {record['threads']} threads, {installed}; "
        f"commit {record['commit'][:7]}, record {_link(path, folder)}."
    )


def _current(row: Row) -> bool:
    """Return whether a row is not of a policy, or of one whose profile is still there."""
    return "profile" not in row or (RESULTS / row["profile"].partition(",")[0]).exists()


def _link(path: Path, folder: str) -> str:
    return f"[{path.name}]({folder}/{path.name})"


def _key(row: Row) -> tuple:
    return row["provider"], tuple(row["shape"].values()), row["dtype"], row["mode"]


def _size(row: Row) -> str:
    shape = row["shape"]
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[row["dtype"]]
    return f"{shape['rows']} x {shape['vocab']} x {shape['hidden']} {dtype}"


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}" if value == 0 else f"{value:.1e}"


def main(arguments: Iterable[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    for path, folder in DOCUMENTS.items():
        path.write_text(fill(path.read_text(), folder=folder))


if __name__ == "__main__":
    main()
