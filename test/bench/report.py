#!/usr/bin/env python3
"""What test/bench/run.sh calculates: percentiles, and the table at the end.

    report.py latency SENT ARRIVALS                       p50 p99 of the way, p50 p99 of the commit, in ms
    report.py table RESULTS [JSON] VERSIONS DISK LOAD     Markdown on standard output
"""
import json
import os
import statistics
import sys
import time


def percentile(values, share):
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def latency(sent_file, arrivals_file):
    """From the confirmed commit to the arrival; and from the call to the confirmed commit."""
    arrived = {}
    for line in open(arrivals_file):
        key, at = line.split()
        arrived.setdefault(key[len("sentdm-"):-len("-1")], int(at))
    way, commit = [], []
    late = 0
    for line in open(sent_file):
        message, before, after = line.split()
        if message not in arrived:
            late += 1
            continue
        way.append((arrived[message] - int(after)) / 1000)
        commit.append((int(after) - int(before)) / 1000)
    if late:
        sys.exit("%d messages have not arrived" % late)
    print("%.3f %.3f %.3f %.3f" % (percentile(way, 0.5), percentile(way, 0.99),
                                   percentile(commit, 0.5), percentile(commit, 0.99)))


def read_results(results_file):
    rows = {}
    for line in open(results_file):
        name, side, value, unit = line.rstrip("\n").split("\t")
        row = rows.setdefault(name, {"unit": unit, "ours": [], "reference": []})
        row["reference" if side == "reference" else "ours"].append(float(value))
    for row in rows.values():
        row["ratios"] = [a / b for a, b in zip(row["ours"], row["reference"]) if b]
    return rows


def figure(value):
    return "{:,.0f}".format(value) if abs(value) >= 100 else "{:.3g}".format(value)


def cells(name, row):
    """Medians; the ratio is the median of the ratios of each round, the spread their range."""
    reference = figure(statistics.median(row["reference"])) if row["reference"] else ""
    ratios = row["ratios"]
    values = ratios or row["ours"]
    return [name.strip() if name[0] != " " else "... " + name.strip(),
            "%s %s" % (figure(statistics.median(row["ours"])), row["unit"]), reference,
            "%.2f" % statistics.median(ratios) if ratios else "",
            "%s to %s" % (("%.2f" % min(values), "%.2f" % max(values)) if ratios
                          else (figure(min(values)), figure(max(values))))]


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return os.uname().machine


def table(results_file, *rest):
    versions, disk, load = rest[-3:]
    rows = read_results(results_file)
    machine = "%d x %s, Linux %s, disk %s; %s; load average %s before, %.2f after" % (
        os.cpu_count(), processor(), os.uname().release, disk, versions, load, os.getloadavg()[0])
    print("%s, %s\n" % (time.strftime("%Y-%m-%d"), machine))
    print("| measurement | ours | reference | ratio | spread |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print("| %s |" % " | ".join(cells(name, row)))
    if len(rest) == 4:
        with open(rest[0], "w") as out:
            json.dump({"machine": machine, "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                       "measurements": rows}, out, indent=1)


if __name__ == "__main__":
    {"latency": latency, "table": table}[sys.argv[1]](*sys.argv[2:])
