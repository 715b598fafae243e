#!/usr/bin/env python3
"""What test/bench/run.sh calculates: percentiles, and the table at the end.

    report.py latency SENT ARRIVALS                   p50 p99 longest of the way, p50 p99 of the commit, in ms
    report.py session SECONDS < pgbench's log         for each client p50 of the first and last seconds, in ms
    report.py profile US < perf script's output       shares of the worker's CPU time, US for each message
    report.py table RESULTS JSON VERSIONS DISK SECONDS LOAD
                                                      Markdown on standard output, all values in JSON
    report.py document JSON PAGE                      the same Markdown again, into docs/performance.md
"""
import collections
import itertools
import json
import os
import statistics
import sys
import time


# What is to be reached: (beginning of the measurement's name, what, at least or at most, how much).
TARGETS = [
    ("the stand-in alone", "ours", ">=", 100000),
    ("drain, 1 recipient a request: of bare", "ours", ">=", 20000),
    ("drain, 1 recipient a request: of bare", "ratio", ">=", 0.3),
    ("drain, 1 recipient a request: of the tuned", "ratio", ">=", 1),
    ("drain, 1 recipient a request: of the SDK", "ratio", ">=", 5),
    ("CPU per 10,000 messages: worker and database", "ours", "<", 0.45),
    ("CPU per 10,000 messages, database included: of the tuned", "ratio", "<", 1),
    ("memory of the worker", "ours", "<", 40),
    ("memory of the worker over", "ratio", "<", 1.1),
    ("50 ms latency, 64 in flight: of in-flight", "ratio", ">=", 0.95),
    ("50 ms latency, 256 in flight: of in-flight", "ratio", ">=", 0.95),
    ("TLS and HTTP/2, 1 recipient", "ratio", ">=", 0.3),
    ("TLS and HTTP/2, 50 ms latency, 1024", "ours", ">=", 13000),
    ("50 ms latency, 1024 in flight: of in-flight", "ours", ">=", 13000),
    ("drain, 1,000 recipients", "ours", ">=", 60000),
    ("drain with", "ratio", ">=", 0.9),
    ("drain, a snapshot held", "ratio", ">=", 0.7),
    ("drain, 10 s after that snapshot", "ratio", ">=", 0.9),
    ("1,000,000 scheduled, 100 due: from due to arrival, longest", "ours", "<", 50),
    ("commit to arrival, one per 3000 ms: median, of the commit", "ours", "<", 0.8),
    ("commit to arrival, one per 3000 ms: p99, of the commit", "ours", "<", 3),
    ("commit to arrival, one per 1000 ms: median, of the commit", "ours", "<", 0.8),
    ("commit to arrival, one per 1000 ms: p99, of the commit", "ours", "<", 3),
    ("commit to arrival, one per 100 ms: median, of the commit", "ours", "<", 0.8),
    ("commit to arrival, one per 100 ms: p99, of the commit", "ours", "<", 3),
    ("commit to arrival, one per 10 ms: median, of the commit", "ours", "<", 0.8),
    ("commit to arrival, one per 10 ms: p99, of the commit", "ours", "<", 3),
    ("commit to arrival, 1,000 requests hang: median, of the commit", "ours", "<", 0.8),
    ("commit to arrival, 1,000 requests hang: p99, of the commit", "ours", "<", 3),
    ("commit to arrival, the worker had left", "ours", "<", 100),
    ("enqueue 50,000 in one", "ratio", ">=", 0.6),
    ("enqueue, 8 clients", "ratio", ">=", 0.85),
    ("single sends over", "ratio", "<", 1.1),
    ("verify_signature, v1: of pgcrypto", "ratio", ">=", 1.5),
    ("verify_signature, hex: of pgcrypto", "ratio", ">=", 1.5),
    ("receive_webhooks, batches", "ours", ">=", 20000),
    ("receive_webhooks with", "ratio", ">=", 0.9),
    ("idle, with the worker waiting: transactions", "ours", "<", 1),
    ("idle, with the worker gone: transactions", "ours", "<", 1),
    ("idle, with the worker waiting: CPU", "ours", "<", 0.05),
    ("idle, with the worker gone: CPU", "ours", "<", 0.05),
]


# Purposes of the worker's CPU time, by the functions that a sample's stack contains; the first
# that fits counts.  A tuple has to be there as a whole.
PURPOSES = [
    ("claim", ["sentdm_outbox_claim", "sentdm_outbox_next_due"]),
    ("settle", ["sentdm_outbox_settle"]),
    ("commit: waiting for the disk", ["XLogFlush"]),
    ("begin and commit", ["sentdm_transact", "sentdm_begin", "sentdm_commit", "transact"]),
    ("send() to the server, in which the kernel also wakes it", [("sentdm_http_run", "send"), ("sentdm_http_run", "__send"),
                                                                  ("sentdm_http_run", "__libc_send")]),
    ("recv() from the server", [("sentdm_http_run", "recv"), ("sentdm_http_run", "__recv"), ("sentdm_http_run", "__libc_recv")]),
    ("epoll and timer", ["epoll_ctl", "timerfd_settime", "epoll_wait", "arm_timer", "on_socket"]),
    ("libcurl, the rest", ["sentdm_http_run"]),
    ("submitting a request to libcurl", ["sentdm_http_submit"]),
    ("handing over between the threads", ["sentdm_http_thread_submit", "sentdm_http_thread_run",
                                          "sentdm_http_thread_next_result", "serve"]),
    ("reading answers", ["sentdm_answer_parse", "sentdm_flight_collect"]),
    ("waiting", ["WaitEventSetWait"]),
]


def percentile(values, share):
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def latency(sent_file, arrivals_file):
    """From the confirmed commit to the arrival; and from the call to the confirmed commit."""
    arrived = {}
    for line in open(arrivals_file):
        key, at = line.split()
        arrived.setdefault(key[len("sentdm-"):-len("-1")] if key.startswith("sentdm-") else key, int(at))
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
    print("%.3f %.3f %.3f %.3f %.3f" % (percentile(way, 0.5), percentile(way, 0.99), max(way),
                                        percentile(commit, 0.5), percentile(commit, 0.99)))


def session(seconds):
    """pgbench's log: client, transaction, latency in us, script, end in s and us."""
    clients = {}
    for line in sys.stdin:
        client, _, latency_us, _, at_s, at_us = line.split()[:6]
        clients.setdefault(client, []).append((int(at_s) + int(at_us) / 1e6, int(latency_us) / 1000))
    for client, sends in sorted(clients.items()):
        begin, end = min(sends)[0], max(sends)[0]
        first = [ms for at, ms in sends if at <= begin + float(seconds)]
        last = [ms for at, ms in sends if at >= end - float(seconds)]
        print(client, "%.4f %.4f" % (percentile(first, 0.5), percentile(last, 0.5)))


def purpose_of(stack):
    for purpose, patterns in PURPOSES:
        for pattern in patterns:
            if all(name in stack for name in ([pattern] if isinstance(pattern, str) else pattern)):
                return purpose
    return "the rest of the worker, and what could not be attributed"


def profile(us_per_message):
    shares = collections.Counter()
    stack = set()
    for line in itertools.chain(sys.stdin, "\n"):
        words = line.split()
        if words:
            stack.add(words[1].split("+")[0].split("@")[0])
        elif stack:
            shares[purpose_of(stack)] += 1
            stack = set()
    total = sum(shares.values())
    print("%d samples, %s us of the worker's CPU for each message\n" % (total, us_per_message))
    print("| us | share | what |\n|---|---|---|")
    for purpose, samples in shares.most_common():
        print("| %.1f | %.1f %% | %s |" % (float(us_per_message) * samples / total, 100.0 * samples / total, purpose))


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


def targets_of(name, row):
    """What is to be reached, and whether it was, by the median."""
    words, reached = [], True
    for beginning, what, relation, bound in TARGETS:
        if not name.startswith(beginning) or not row["ratios" if what == "ratio" else "ours"]:
            continue
        value = statistics.median(row["ratios"] if what == "ratio" else row["ours"])
        reached = reached and (value >= bound if relation == ">=" else value < bound)
        words.append("%s%s %s" % ("ratio " if what == "ratio" else "", relation, "{:,}".format(bound)))
    return ", ".join(words) + ("" if not words else ": met" if reached else ": **missed**")


def cells(name, row):
    """Medians; the ratio is the median of the ratios of each round, the spread their range."""
    reference = figure(statistics.median(row["reference"])) if row["reference"] else ""
    ratios = row["ratios"]
    values = ratios or row["ours"]
    return [name, "%s %s" % (figure(statistics.median(row["ours"])), row["unit"]), reference,
            "%.2f" % statistics.median(ratios) if ratios else "",
            "%s to %s" % (("%.2f" % min(values), "%.2f" % max(values)) if ratios
                          else (figure(min(values)), figure(max(values)))),
            targets_of(name, row)]


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return os.uname().machine


def markdown(machine, rows):
    lines = [machine, "", "| measurement | ours | reference | ratio | spread | target |", "|---|---|---|---|---|---|"]
    return lines + ["| %s |" % " | ".join(cells(name, row)) for name, row in rows.items()]


def table(results_file, json_file, versions, disk, seconds, load):
    rows = read_results(results_file)
    machine = "%s, %d x %s, Linux %s, disk %s; %s; load average %s before, %.2f after; %s s" % (
        time.strftime("%Y-%m-%d"), os.cpu_count(), processor(), os.uname().release, disk, versions, load,
        os.getloadavg()[0], seconds)
    for name, row in rows.items():
        row["target"] = targets_of(name, row).replace("**", "")
    print("\n".join(markdown(machine, rows)))
    with open(json_file, "w") as out:
        json.dump({"machine": machine, "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                   "measurements": rows}, out, indent=1)


def document(json_file, page):
    """Put the table of a run into the page, between its marks."""
    run = json.load(open(json_file))
    before, rest = open(page).read().split("<!-- the table -->\n")
    after = rest[rest.index("<!-- its end -->"):]
    with open(page, "w") as out:
        out.write(before + "<!-- the table -->\n" + "\n".join(markdown(run["machine"], run["measurements"])) + "\n" + after)


if __name__ == "__main__":
    {"latency": latency, "session": session, "profile": profile, "table": table,
     "document": document}[sys.argv[1]](*sys.argv[2:])
