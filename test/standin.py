#!/usr/bin/env python3
"""A stand-in for the Sent API v3, for the demo and the tests.

It answers as the real API does, keeps a ledger of every message request that arrived and of
what it accepted (the evidence behind "never lost, never twice"), moves messages through their
life, posts signed webhooks, and misbehaves on demand.  Everything under /_control/ is for the
test that drives it; everything else is the API's contract.

One process, one event loop, no threads: nothing here may block, so that a slow answer to one
request never holds up another.  State lives in memory and ends with the process.
"""
import argparse
import asyncio
import base64
import collections
import datetime
import fnmatch
import functools
import gc
import hashlib
import hmac
import json
import math
import os
import random
import re
import signal
import socket
import ssl
import string
import struct
import sys
import time
import traceback
import types
import uuid
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import parse_qsl, unquote, urlsplit

MAX_HEAD = 64 * 1024            # bytes of request line and headers
DAY_S = 86400
PAGE_SIZE_MAX = 100
FAILURES_TO_DISABLE = 10        # failed events in a row that switch a webhook off

E164 = re.compile(r"\+[1-9][0-9]{1,14}")
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
IDEMPOTENCY_KEY = re.compile(r"[A-Za-z0-9_-]{1,255}")
UNSENDABLE = re.compile(r"[\r\n\t]| {5}")       # what WhatsApp refuses in a parameter
SHORT_CODE = re.compile(r"[A-Za-z0-9-]{1,15}")  # what an AUTHENTICATION template takes
TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d)(:\d\d)?(?:\.\d{1,9})?(Z|[+-]\d\d(?::?\d\d)?)")
REQUEST_LINE = re.compile(r"([A-Z]+) (/[!-~]*) HTTP/1\.([01])")
FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")
SINGLE_FIELDS = {"host", "content-length", "content-type", "x-api-key", "x-profile-id", "idempotency-key"}

CHANNELS = ("sent", "sms", "whatsapp", "rcs", "mms")
PRICES = {"sms": 0.0075, "mms": 0.02, "whatsapp": 0.005, "rcs": 0.01}
FAMILIES = {
    "message": ("queued", "scheduled", "routed", "sent", "delivered", "read", "failed", "filtered",
                "blocked", "cancelled", "received"),
    "templates": (),
    "contact": ("opt_in", "opt_out", "help"),
}

# How the life of a message ends, by the last four digits of its recipient.
ENDINGS = {
    "0001": ("FAILED", "DELIVERY_007", "The recipient is not registered on this channel"),
    "0002": ("BLOCKED", "BUSINESS_003", "Insufficient balance"),
    "0003": ("FILTERED", "ERR_CONSENT_BLOCKED", "The recipient has opted out"),
    "0004": ("SENT", None, None),
}

ERROR_CODES = {400: "VALIDATION_001", 401: "AUTH_002", 403: "AUTH_004", 404: "RESOURCE_002", 409: "CONFLICT_001",
               422: "BUSINESS_006", 429: "BUSINESS_002", 500: "INTERNAL_001", 502: "INTERNAL_003",
               503: "SERVICE_001", 504: "INTERNAL_004"}

# Everything that can be changed while it runs, with its value at the start.
DEFAULTS = {
    "keys": [],                 # API keys accepted; none listed: any
    "one_account": False,       # all keys share one account, as after a key rotation
    "rate_limit": 0,            # requests per window; 0: none
    "rate_window_s": 60.0,
    "clock_skew_s": 0.0,        # seconds by which the Date of answers is wrong
    "lockout_after": 10,        # wrong keys in a row until 429; 0: never
    "latency_ms": 0,            # added to every API request
    "inflight_wait": 5.0,       # seconds a duplicate waits for the first of its key
    "idempotency_ttl": DAY_S,   # seconds an answer is kept for its key
    "max_body": 4 << 20,
    "strict_parameters": False,     # refuse when a template's variable has no value
    "lifecycle": "auto",
    "step_ms": 50,              # between two statuses of a message
    "webhook_url": "",
    "webhook_secret": "whsec_" + base64.b64encode(b"stand-in webhook signing secret!").decode(),
    "webhook_id": "d4f5a6b7-c8d9-4e0f-a1b2-c3d4e5f6a7b8",
    "webhook_retries": 3,       # further attempts after the first
    "webhook_retry_ms": 200,
    "webhook_timeout_s": 30.0,
    "webhook_workers": 4,       # deliveries at once to one webhook
    "resign_retries": False,    # a retry carries a new timestamp and signature
}


def template(number, name, category, text):
    return {"id": f"7ba7b820-9dad-41d1-80b4-{number:012d}", "name": name, "category": category, "text": text,
            "variables": re.findall(r"{{(\w+)}}", text)}


TEMPLATES = (
    template(1, "order_confirmation", "UTILITY", "Hi {{name}}, order {{order_id}} is confirmed."),
    template(2, "order_shipped", "UTILITY", "Hi {{name}}, order {{order_id}} is on its way."),
    template(3, "otp", "AUTHENTICATION", "{{code}} is your verification code."),
    template(4, "welcome", "MARKETING", "Welcome, {{name}}!"),
)


# ---------------------------------------------------------------------------------------------
# Small things

def refuse_constant(name):
    raise ValueError(name + " is not JSON")


ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
DECODE = json.JSONDecoder(parse_constant=refuse_constant).decode


def to_json(value):
    return ENCODE(value).encode()


def from_json(data):
    """Strict: UTF-8 only, no NaN, no half surrogate pair; ValueError otherwise."""
    try:
        value = DECODE(data.decode("utf-8"))
        if b"\\u" in data:
            to_json(value)
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None


@functools.lru_cache(maxsize=64)
def clock_text(second):
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def iso(unix):
    """To the second, as webhooks have it."""
    return clock_text(int(unix)) + "Z"


def iso_precise(unix):
    """With seven decimals, as the envelope's meta has it."""
    return f"{clock_text(int(unix))}.{int(unix % 1 * 1e6):06d}0+00:00"


def moment(unix):
    return None if unix is None else iso_precise(unix)


def parse_time(text):
    """Unix seconds of an ISO 8601 time with an explicit offset; None for anything else."""
    parts = TIMESTAMP.fullmatch(text) if isinstance(text, str) else None
    if parts is None:
        return None
    minute, second, offset = parts.groups()
    if offset != "Z":
        offset = (offset.replace(":", "") + "00")[:5]
    try:
        return datetime.datetime.strptime(minute + (second or ":00") + offset, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


@functools.lru_cache(maxsize=1024)
def stable_uuid(*names):
    """The same names give the same id: accounts, contacts and templates that tests make up."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(names)))


class Refusal(Exception):
    """An error of the API: raised anywhere below Api, answered as an envelope."""

    def __init__(self, status, code, message, details=None, headers=()):
        super().__init__(message)
        self.status, self.code, self.message, self.details, self.headers = status, code, message, details, headers

    def answer(self, request_id):
        error = {"code": self.code, "message": self.message, "details": self.details, "doc_url": None}
        answer = Answer(self.status, envelope(request_id, None, error), list(self.headers))
        answer.code = self.code
        return answer


def fail(code, message, field=None):
    raise Refusal(400, code, message, {field: [message]} if field else None)


def too_many(wait_s, limit=0):
    wait_s = max(1, math.ceil(wait_s))
    return Refusal(429, "BUSINESS_002", "Rate limit exceeded.", None, [
        ("Retry-After", str(wait_s)), ("X-RateLimit-Limit", str(limit)), ("X-RateLimit-Remaining", "0"),
        ("X-RateLimit-Reset", str(math.ceil(time.time() + wait_s)))])


class Answer:
    """What goes back for one request; `outcome` and `rows` are for the ledger."""
    __slots__ = ("status", "body", "headers", "code", "outcome", "rows")

    def __init__(self, status, body=b"", headers=(), outcome="refused", rows=None):
        self.status, self.body, self.headers, self.outcome, self.rows = status, body, headers, outcome, rows
        self.code = None


def envelope(request_id, data, error=None):
    return to_json({"success": error is None, "data": data, "error": error, "meta": {
        "request_id": request_id, "timestamp": iso_precise(time.time()), "version": "v3"}})


def ok(request, data, status=200):
    return Answer(status, envelope(request.id, data))


# ---------------------------------------------------------------------------------------------
# HTTP: strict on purpose, so that a client's sloppiness is found here and not in production

class Request:
    __slots__ = ("method", "path", "query", "headers", "keep_alive", "body", "unix_us", "mono_us", "connection",
                 "id", "parsed")

    def __init__(self, method, target, minor, headers):
        path, _, query = target.partition("?")
        self.method, self.path, self.query, self.headers = method, unquote(path), query, headers
        self.keep_alive = minor == "1" and "close" not in headers.get("connection", "").lower()
        self.body, self.parsed = b"", None

    def arrived(self, body, connection):
        self.body, self.connection = body, connection
        self.unix_us, self.mono_us = time.time_ns() // 1000, time.monotonic_ns() // 1000
        self.id = "req_" + "".join(random.choices(string.ascii_letters + string.digits, k=10))

    def json(self):
        """The body, which must be a JSON object."""
        if self.parsed is None:
            try:
                self.parsed = from_json(self.body)
            except ValueError:
                fail("VALIDATION_001", "The request body is not valid JSON.")
        if not isinstance(self.parsed, dict):
            fail("VALIDATION_001", "The request body must be a JSON object.")
        return self.parsed

    def recipients(self):
        """The numbers a message request names, however wrong the rest of it is."""
        try:
            to = self.json().get("to")
        except Refusal:
            return []
        return [number for number in to if isinstance(number, str)] if isinstance(to, list) else []

    def parameters(self):
        return dict(parse_qsl(self.query, keep_blank_values=True))


def parse_head(text):
    start, *lines = text.split("\r\n")
    asked = REQUEST_LINE.fullmatch(start)
    if asked is None:
        fail("VALIDATION_001", "Malformed request line.")
    headers = {}
    for line in lines:
        field = FIELD.fullmatch(line)
        if field is None:
            fail("VALIDATION_001", "Malformed header.")
        name = field.group(1).lower()
        if name not in headers:
            headers[name] = field.group(2)
        elif name in SINGLE_FIELDS:
            fail("VALIDATION_001", f"Header {name} given twice.")
        else:
            headers[name] += ", " + field.group(2)
    if asked.group(3) == "1" and "host" not in headers:
        fail("VALIDATION_001", "Header host is missing.")
    if "transfer-encoding" in headers:
        raise Refusal(411, "VALIDATION_001", "Content-Length is required.")
    if not re.fullmatch(r"[0-9]{1,12}", headers.get("content-length", "0")):
        fail("VALIDATION_001", "Malformed content-length.")
    return Request(*asked.groups(), headers)


class Connection(asyncio.Protocol):
    """One client: bytes in, requests out, answers back in order.  (asyncio sets TCP_NODELAY.)"""

    def __init__(self, standin):
        self.standin = standin
        self.buffer, self.head, self.busy, self.transport, self.number = bytearray(), None, False, None, 0

    def connection_made(self, transport):
        self.transport = transport
        self.number = self.standin.connected(self)

    def connection_lost(self, exc):
        self.standin.connections.discard(self)

    @property
    def closed(self):
        return self.transport.is_closing()

    def data_received(self, data):
        self.buffer += data
        self.advance()

    def advance(self):
        """Serve the complete requests in the buffer, each after the one before it."""
        while not self.busy and not self.closed:
            try:
                request = self.next_request()
            except Refusal as refusal:
                self.refuse(refusal)
                return
            if request is None:
                return
            self.serve(request)

    def next_request(self):
        if self.head is None:
            end = self.buffer.find(b"\r\n\r\n")
            if end > MAX_HEAD or end < 0 and len(self.buffer) > MAX_HEAD:
                raise Refusal(431, "VALIDATION_001", "The headers are too large.")
            if end < 0:
                return None
            self.head = parse_head(self.buffer[:end].decode("latin-1"))
            del self.buffer[:end + 4]
            if self.head.headers.get("expect", "").lower() == "100-continue":
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(self.head.headers.get("content-length", "0"))
        if length > self.standin.config.max_body:
            raise Refusal(413, "VALIDATION_001", "The request body is too large.")
        if len(self.buffer) < length:
            return None
        request, self.head = self.head, None
        request.arrived(bytes(self.buffer[:length]), self.number)
        del self.buffer[:length]
        return request

    def refuse(self, refusal):
        """Answer what is not HTTP as we want it, and hang up: the next request's start is unknown."""
        request = Request("GET", "/", "0", {})
        request.arrived(b"", self.number)
        self.send(refusal.answer(request.id), request)

    def serve(self, request):
        try:
            served = self.standin.handle(request, self)
        except Exception:
            served = self.failed(request)
        if isinstance(served, Answer):
            self.send(served, request)
        else:
            self.busy = True
            self.standin.spawn(self.wait_for(served, request))

    async def wait_for(self, coroutine, request):
        """The slow path: an answer that has to wait, or that a fault spoils (then it is None)."""
        try:
            answer = await coroutine
        except Exception:
            answer = self.failed(request)
        if answer is not None:
            self.send(answer, request)
        self.busy = False
        self.advance()

    @staticmethod
    def failed(request):
        traceback.print_exc()
        return Refusal(500, "INTERNAL_001", "The stand-in itself failed; see its stderr.").answer(request.id)

    def render(self, answer, request, framing=None):
        """The answer as bytes: head and body.  `framing` replaces the Content-Length line."""
        elapsed_ms = (time.monotonic_ns() // 1000 - request.mono_us) // 1000
        lines = [f"HTTP/1.1 {answer.status} {reason_phrase(answer.status)}", f"X-Request-Id: {request.id}",
                 f"X-Response-Time: {elapsed_ms}ms", "X-API-Version: v3",
                 "Date: " + http_date(int(time.time() + self.standin.config.clock_skew_s))]
        if answer.status < 300 and "x-profile-id" in request.headers:
            lines.append("X-Profile-Id: " + request.headers["x-profile-id"])
        body = b"" if answer.status in (204, 304) else answer.body
        if body and not any(name.lower() == "content-type" for name, _ in answer.headers):
            lines.append("Content-Type: application/json; charset=utf-8")
        if answer.status not in (204, 304):
            lines.append(framing or f"Content-Length: {len(body)}")
        if not request.keep_alive:
            lines.append("Connection: close")
        lines += [f"{name}: {value}" for name, value in answer.headers]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace"), body

    def send(self, answer, request):
        if self.closed:
            return
        head, body = self.render(answer, request)
        self.transport.write(head + body)
        if not request.keep_alive:
            self.transport.close()


@functools.lru_cache(maxsize=2)
def http_date(unix):
    return formatdate(unix, usegmt=True)


@functools.lru_cache(maxsize=None)
def reason_phrase(status):
    return HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Status"


# ---------------------------------------------------------------------------------------------
# Faults on demand

def fault_status(fault, request_id):
    """The answer of the actions "status" and "retry_after"."""
    spec = fault.spec
    code = 429 if fault.action == "retry_after" else spec.get("code", 500)
    headers = {"Retry-After": spec.get("retry_after", spec.get("value")), **(spec.get("headers") or {})}
    pairs = [(name, value) for name, value in headers.items() if value is not None]
    if "body" in spec:
        return Answer(code, spec["body"].encode(), pairs)
    error_code = spec.get("error_code") or ERROR_CODES.get(code) or f"HTTP_{code}"
    return Refusal(code, error_code, spec.get("message", "A fault on demand."), spec.get("details"),
                   pairs).answer(request_id)


async def spoil_status(fault, connection, request, answer):
    connection.send(fault_status(fault, request.id), request)


async def spoil_drop(fault, connection, request, answer):
    connection.transport.abort()


async def spoil_reset(fault, connection, request, answer):
    # A zero linger time makes the kernel send RST instead of FIN.
    sock = connection.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.transport.abort()


async def spoil_hang(fault, connection, request, answer):
    await connection.standin.stopping.wait()


async def spoil_truncate(fault, connection, request, answer):
    head, body = connection.render(answer, request)
    connection.transport.write(head + body[:len(body) // 2])
    connection.transport.close()


async def spoil_slow(fault, connection, request, answer):
    data, step = b"".join(connection.render(answer, request)), fault.spec.get("bytes", 1)
    for at in range(0, len(data), step):
        if connection.closed:
            return
        connection.transport.write(data[at:at + step])
        await asyncio.sleep(fault.spec.get("delay_ms", 10) / 1000)
    if not request.keep_alive:
        connection.transport.close()


async def spoil_endless(fault, connection, request, answer):
    head, _ = connection.render(answer, request, "Transfer-Encoding: chunked")
    connection.transport.write(head + b'14\r\n{"success":true,"x":\r\n')
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    while not connection.closed:
        if connection.transport.get_write_buffer_size() < 1 << 20:
            connection.transport.write(chunk)
        await asyncio.sleep(fault.spec.get("delay_ms", 1) / 1000)


async def spoil_garbage(fault, connection, request, answer):
    text = fault.spec.get("body", "<html><body>It works!</body></html>").encode()
    connection.send(Answer(answer.status, text, [("Content-Type", "text/html")]), request)


async def spoil_close_idle(fault, connection, request, answer):
    connection.send(answer, request)
    await asyncio.sleep(fault.spec.get("ms", 0) / 1000)
    connection.transport.close()


# Action: how the answer is spoilt; whether the request is processed first (with "accept": true
# it always is); whether the client gets to see a status line.
ACTIONS = {
    "latency": (None, True, True),
    "status": (spoil_status, False, True),
    "retry_after": (spoil_status, False, True),
    "drop_before": (spoil_drop, False, False),
    "drop_after": (spoil_drop, True, False),
    "reset": (spoil_reset, False, False),
    "hang": (spoil_hang, False, False),
    "truncate": (spoil_truncate, True, True),
    "slow": (spoil_slow, True, True),
    "endless": (spoil_endless, True, True),
    "garbage": (spoil_garbage, True, True),
    "close_idle": (spoil_close_idle, True, True),
}
FAULT_FIELDS = {"match", "times", "probability", "seed", "action", "accept", "ms", "delay_ms", "bytes", "code",
                "error_code", "message", "details", "headers", "body", "retry_after", "value"}
MATCH_FIELDS = {"nth", "every", "attempt", "to", "body_contains", "key", "path", "method"}


class Fault:
    """One entry of the list of faults, with its own count of the requests that it has seen."""

    def __init__(self, spec):
        if not isinstance(spec, dict) or spec.get("action") not in ACTIONS:
            fail("VALIDATION_001", "A fault is an object with an action of: " + ", ".join(ACTIONS))
        match = spec.get("match") or {}
        unknown = (set(spec) - FAULT_FIELDS) | (set(match) - MATCH_FIELDS)
        if unknown:
            fail("VALIDATION_001", "Unknown in a fault: " + ", ".join(sorted(unknown)))
        self.spec, self.action, self.match = spec, spec["action"], match
        self.spoil, accepts, self.answers = ACTIONS[self.action]
        self.accepts = accepts or bool(spec.get("accept"))
        self.left, self.seen, self.applied = spec.get("times", 1), 0, 0
        self.random = random.Random(spec.get("seed"))

    def fits(self, request, attempt):
        match = self.match
        return (request.method == match.get("method", request.method)
                and fnmatch.fnmatchcase(request.path, match.get("path", "*"))
                and ("attempt" not in match or attempt == match["attempt"])
                and ("key" not in match
                     or fnmatch.fnmatchcase(request.headers.get("idempotency-key", ""), match["key"]))
                and ("body_contains" not in match or match["body_contains"].encode() in request.body)
                and ("to" not in match or bool(fnmatch.filter(request.recipients(), match["to"]))))

    def wants(self, request, attempt):
        """Whether it applies; counts the request if it fits, also when another fault takes it."""
        if not self.left or not self.fits(request, attempt):
            return False
        self.seen += 1
        return (self.seen == self.match.get("nth", self.seen)
                and self.seen % self.match.get("every", 1) == 0
                and self.random.random() < self.spec.get("probability", 1))


class Faults:
    def __init__(self):
        self.list = []

    def replace(self, specs):
        self.list = [Fault(spec) for spec in specs]

    def pick(self, request, attempt):
        """The first that applies, its count lowered; every fault sees the request, so that the
        nth of each means the nth request and does not depend on the faults before it."""
        wanting = [fault for fault in self.list if fault.wants(request, attempt)]
        if not wanting:
            return None
        wanting[0].applied += 1
        wanting[0].left -= wanting[0].left > 0
        return wanting[0]

    def describe(self):
        return [{**fault.spec, "left": fault.left, "seen": fault.seen, "applied": fault.applied}
                for fault in self.list]


# ---------------------------------------------------------------------------------------------
# The ledger

class Entry:
    """One POST /v3/messages that arrived.  Slots, because there may be hundreds of thousands."""
    __slots__ = ("n", "unix_us", "mono_us", "connection", "key", "attempt", "profile_id", "sha256", "bytes", "to",
                 "outcome", "status", "code", "request_id", "fault", "rows")

    def describe(self):
        record = {name: getattr(self, name) for name in self.__slots__ if name != "rows"}
        record["sha256"] = self.sha256.hex()
        return record

    def effects(self):
        return [{"n": self.n, "key": self.key, "to": row.to, "channel": row.channel, "message_id": row.id}
                for row in self.rows or ()]


class Ledger:
    """Every message request, and its effects: what was accepted and was not a replay."""

    def __init__(self):
        self.entries = []
        self.keys = {}                              # key: [sha256 of the first body, arrivals, acceptances]
        self.reused = {}                            # keys that came with another body (an ordered set)
        self.per_recipient = collections.Counter()  # effects by (to, channel)
        self.outcomes = collections.Counter()
        self.refused = collections.Counter()        # by error code
        self.faults = collections.Counter()         # by action
        self.keyless = self.recipients = self.processing = self.most_processing = 0

    def arrive(self, request):
        entry = Entry()
        entry.n, entry.unix_us, entry.mono_us = len(self.entries) + 1, request.unix_us, request.mono_us
        entry.connection, entry.request_id = request.connection, request.id
        entry.key, entry.profile_id = request.headers.get("idempotency-key"), request.headers.get("x-profile-id")
        entry.sha256, entry.bytes = hashlib.sha256(request.body).digest(), len(request.body)
        entry.to, entry.outcome = request.recipients(), "pending"
        entry.status = entry.code = entry.fault = entry.rows = None
        entry.attempt = self.track(entry)
        self.entries.append(entry)
        return entry

    def track(self, entry):
        """Count the arrivals of the entry's key; which one this is."""
        if entry.key is None:
            self.keyless += 1
            return 1
        known = self.keys.setdefault(entry.key, [entry.sha256, 0, 0])
        known[1] += 1
        if known[0] != entry.sha256:
            self.reused[entry.key] = True
        return known[1]

    def settle(self, entry, answer):
        entry.status, entry.code, entry.outcome = answer.status, answer.code, answer.outcome
        self.outcomes[entry.outcome] += 1
        if entry.outcome == "refused":
            self.refused[answer.code or f"HTTP_{answer.status}"] += 1
        elif entry.outcome == "accepted":
            entry.rows = answer.rows
            self.recipients += len(answer.rows)
            self.per_recipient.update((row.to, row.channel) for row in answer.rows)
            if entry.key is not None:
                self.keys[entry.key][2] += 1

    def spoil(self, entry, fault):
        """Note what a fault made of the request: what the client saw is not what was done."""
        entry.fault = fault.action
        self.faults[fault.action] += 1
        told = fault_status(fault, entry.request_id) if fault.spoil is spoil_status else None
        if told and not fault.accepts:
            self.settle(entry, told)
        elif not fault.accepts:
            entry.outcome = "dropped"
            self.outcomes["dropped"] += 1
        elif told:
            entry.status, entry.code = told.status, told.code
        if not fault.answers:
            entry.status = None

    def summary(self):
        return {
            "requests": len(self.entries), "accepted_requests": self.outcomes["accepted"],
            "accepted_recipients": self.recipients, "distinct_recipients": len(self.per_recipient),
            "replays": self.outcomes["replayed"], "sandbox": self.outcomes["sandbox"],
            "dropped": self.outcomes["dropped"], "refused_requests": self.outcomes["refused"],
            "refused": dict(self.refused), "faults": dict(self.faults),
            "pending": len(self.entries) - sum(self.outcomes.values()), "most_in_flight": self.most_processing,
            "distinct_keys": len(self.keys), "keyless": self.keyless,
            "max_effects_per_key": max((known[2] for known in self.keys.values()), default=0),
            "max_effects_per_recipient": max(self.per_recipient.values(), default=0),
            "duplicate": len(self.reused), "duplicate_keys": list(self.reused)[:20],
        }


# ---------------------------------------------------------------------------------------------
# A message request: what is wrong with it

class Order:
    """A valid message request."""
    __slots__ = ("to", "channels", "template", "text", "sandbox", "scheduled_at", "blocked")


def read_order(body, config):
    order = Order()
    order.to = read_recipients(body.get("to"))
    text, chosen = body.get("text"), body.get("template")
    if (text is None or text == "") == (chosen is None):
        fail("VALIDATION_001", "Provide exactly one of 'template' or 'text'.")
    order.template, order.text = read_template(chosen, config) if chosen is not None else (None, text)
    if not isinstance(order.text, str):
        fail("VALIDATION_001", "'text' must be a string.", "text")
    order.channels = read_channels(body.get("channel"))
    if chosen is None and "whatsapp" in order.channels and UNSENDABLE.search(text):
        fail("VALIDATION_008", "'text' must not contain new lines, tabs or more than four spaces in a row.", "text")
    order.sandbox = body.get("sandbox")
    if not isinstance(order.sandbox, (bool, type(None))):
        fail("VALIDATION_001", "'sandbox' must be a boolean.", "sandbox")
    order.scheduled_at = read_schedule(body.get("scheduled_at"))
    order.blocked = read_senders(body.get("channels"))
    read_media(body)
    return order


def read_recipients(to):
    if to is None:
        fail("VALIDATION_004", "'to' is required.", "to")
    if not isinstance(to, list):
        fail("VALIDATION_001", "'to' must be an array of phone numbers.", "to")
    if not 1 <= len(to) <= 1000:
        fail("VALIDATION_005", "'to' takes 1 to 1000 phone numbers.", "to")
    wrong = {f"to[{at}]": ["Not a phone number in E.164 format."] for at, number in enumerate(to)
             if not isinstance(number, str) or not E164.fullmatch(number)}
    if wrong:
        raise Refusal(400, "VALIDATION_002", "Phone numbers must be in E.164 format.", wrong)
    return to


def find_template(identity, name):
    """A known template, or None.  Names are free, except the built-in ones and missing_*."""
    for known in TEMPLATES:
        if known["id"] == identity or known["name"] == name:
            return known
    if name is None or name.startswith("missing_"):
        return None
    return {"id": stable_uuid("template", name), "name": name, "category": "UTILITY", "text": f"[{name}]",
            "variables": []}


def read_template(chosen, config):
    """The template and its text with the parameters filled in."""
    if not isinstance(chosen, dict):
        fail("VALIDATION_001", "'template' must be an object.", "template")
    identity, name, parameters = chosen.get("id"), chosen.get("name"), chosen.get("parameters")
    if (identity is None) == (name is None):
        fail("VALIDATION_001", "Provide exactly one of 'template.id' or 'template.name'.", "template")
    if not isinstance(identity or name, str):
        fail("VALIDATION_001", "'template.id' and 'template.name' are non-empty strings.", "template")
    if identity is not None and not UUID.fullmatch(identity):
        fail("VALIDATION_003", "'template.id' must be a UUID.", "template.id")
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict) or not all(isinstance(value, str) for value in parameters.values()):
        fail("VALIDATION_001", "'template.parameters' must map names to strings.", "template.parameters")
    known = find_template(identity and identity.lower(), name)
    if known is None:
        raise Refusal(404, "RESOURCE_002", "Template not found.")
    check_parameters(known, parameters, config)
    return known, re.sub(r"{{(\w+)}}", lambda found: parameters.get(found.group(1), ""), known["text"])


def check_parameters(known, parameters, config):
    for name, value in parameters.items():
        if UNSENDABLE.search(value) or known["category"] == "AUTHENTICATION" and not SHORT_CODE.fullmatch(value):
            fail("VALIDATION_008", "A parameter must not contain new lines, tabs or more than four spaces in a "
                 "row, and for an AUTHENTICATION template must be a short code.", f"template.parameters.{name}")
    lacking = [name for name in known["variables"] if name not in parameters]
    if lacking and config.strict_parameters:
        fail("VALIDATION_004", f"Parameter '{lacking[0]}' is required.", f"template.parameters.{lacking[0]}")


def read_channels(channels):
    if channels is None:
        return []
    if not isinstance(channels, list) or not channels:
        fail("VALIDATION_001", "'channel' must be a non-empty array.", "channel")
    if any(channel not in CHANNELS for channel in channels):
        fail("VALIDATION_006", "'channel' takes: " + ", ".join(CHANNELS) + ".", "channel")
    if len(channels) > 1 and "sent" in channels:
        fail("VALIDATION_006", "'sent' must not be combined with other channels.", "channel")
    if len(set(channels)) < len(channels):
        fail("VALIDATION_006", "A channel is named twice.", "channel")
    return [] if channels == ["sent"] else channels


def read_schedule(text):
    if text is None:
        return None
    moment = parse_time(text)
    if moment is None:
        fail("VALIDATION_001", "'scheduled_at' must be an ISO 8601 time with an offset.", "scheduled_at")
    if not 60 <= moment - time.time() <= 30 * DAY_S:
        fail("VALIDATION_005", "'scheduled_at' must be 1 minute to 30 days ahead.", "scheduled_at")
    return moment


def read_senders(senders):
    """The channels whose pinned sender is unusable: by rule, a number that ends in 0029."""
    if senders is None:
        return ()
    if not isinstance(senders, dict):
        fail("VALIDATION_001", "'channels' must map a channel to its senders.", "channels")
    blocked = []
    for channel, pins in senders.items():
        if channel not in CHANNELS or channel == "sent":
            fail("VALIDATION_006", "'channels' takes: sms, whatsapp, rcs, mms.", "channels")
        if not isinstance(pins, list) or not all(isinstance(pin, dict) for pin in pins):
            fail("VALIDATION_001", "'channels' must map a channel to an array of objects.", "channels")
        numbers = [number for pin in pins for number in (
            pin["from"] if isinstance(pin.get("from"), list) else [pin.get("from")])]
        if not all(isinstance(number, str) and E164.fullmatch(number) for number in numbers):
            fail("VALIDATION_002", "Senders must be in E.164 format.", f"channels.{channel}")
        if numbers and all(number.endswith("0029") for number in numbers):
            blocked.append(channel)
    return blocked


def read_media(body):
    urls, subject = body.get("media_urls"), body.get("subject")
    if urls is not None and not (isinstance(urls, list) and all(
            isinstance(url, str) and url.startswith("https://") for url in urls)):
        fail("VALIDATION_001", "'media_urls' must be an array of https URLs.", "media_urls")
    if subject is not None and not isinstance(subject, str):
        fail("VALIDATION_001", "'subject' must be a string.", "subject")


# ---------------------------------------------------------------------------------------------
# Messages and their life

class Message:
    """One recipient on one channel (None while the API is to choose)."""
    __slots__ = ("id", "account", "to", "channel", "template", "text", "history", "scheduled_at", "ending", "run",
                 "direction")

    def __init__(self, account, to, channel, template, text, direction="OUTBOUND"):
        self.id = str(uuid.uuid4())
        self.account, self.to, self.channel, self.template, self.text = account, to, channel, template, text
        self.direction, self.scheduled_at, self.run = direction, None, 0
        self.ending = ENDINGS.get(to[-4:], ("DELIVERED", None, None))
        self.history = [("QUEUED" if direction == "OUTBOUND" else "RECEIVED", time.time())]

    @property
    def status(self):
        return self.history[-1][0]

    @property
    def carrier(self):
        return self.channel or "sms"

    @property
    def price(self):
        return PRICES[self.carrier] if any(status == "SENT" for status, _ in self.history) else None

    def next_status(self):
        """The status after the present one; None at the end of its life."""
        final = self.ending[0]
        if self.status in ("QUEUED", "SCHEDULED"):
            return final if final in ("BLOCKED", "FILTERED") else "ROUTED"
        if self.status == "ROUTED":
            return "SENT"
        if self.status == "SENT" and final != "SENT":
            return final
        return "READ" if self.status == "DELIVERED" and self.carrier in ("whatsapp", "rcs") else None

    def reason(self, status):
        """The keys that a FAILED, FILTERED or BLOCKED status carries wherever it is shown."""
        return {"reason_code": self.ending[1], "reason": self.ending[2]} if (
            status == self.ending[0] and self.ending[1]) else {}

    def schedule(self):
        return {"scheduled_at": iso(self.scheduled_at)} if self.scheduled_at else {}

    def describe(self):
        shown = {
            "id": self.id, "customer_id": stable_uuid("customer", self.account),
            "contact_id": stable_uuid("contact", self.to), "direction": self.direction, "phone": self.to,
            "phone_international": self.to, "region_code": region(self.to), "channel": self.carrier,
            "template_id": self.template and self.template["id"],
            "template_name": self.template and self.template["name"],
            "template_category": self.template and self.template["category"], "status": self.status,
            "created_at": iso_precise(self.history[0][1]), "price": self.price,
            "active_contact_price": self.price and 0.01, "message_body": {"content": self.text},
            "events": [{"status": status, "timestamp": iso_precise(at), "description": f"Message {status.lower()}",
                        **self.reason(status)} for status, at in self.history],
        }
        return {**shown, **self.reason(self.status), **self.schedule()}

    def activities(self):
        price = self.price
        return [{"status": status, "description": f"Message {status.lower()}", "timestamp": iso_precise(at),
                 "from": "+15550009999", "price": price and f"{price:.4f}",
                 "active_contact_price": price and "0.0100", **self.reason(status),
                 **(self.schedule() if status == "SCHEDULED" else {})} for status, at in reversed(self.history)]

    def envelope(self, status, at):
        """The webhook event (third generation) that says that it reached the status."""
        payload = {"account_id": stable_uuid("customer", self.account), "message_id": self.id,
                   "message_status": status, "channel": self.carrier, "outbound_number": self.to,
                   "template_id": self.template and self.template["id"], "updated_at": iso(at),
                   "body": self.text[:3072], **self.reason(status)}
        if self.template:
            payload["template_name"] = self.template["name"]
        if status == "SCHEDULED":
            payload.update(self.schedule(), schedule_reason="Requested by the sender")
        return {"field": "message", "event": event_name(status), "timestamp": iso(at), "payload": payload}


@functools.lru_cache(maxsize=None)
def event_name(status):
    return "message." + status.lower()


def region(number):
    return "US" if number.startswith("+1") else "ZZ"


class Lifecycle:
    """Moves messages along.  One queue and one timer for all of them: every step takes the same
    time, so the queue is in order by itself."""

    def __init__(self, config, webhooks):
        self.config, self.webhooks, self.loop = config, webhooks, asyncio.get_running_loop()
        self.queue, self.timer, self.stopped = collections.deque(), None, False

    def begin(self, message):
        """Announce a queued message and start its way."""
        if self.config.lifecycle == "off":
            return
        self.webhooks.emit_status(message)
        if message.scheduled_at and message.run == 0:
            self.move(message, "SCHEDULED")
            self.loop.call_later(message.scheduled_at - time.time(), self.enqueue, message, message.run)
        else:
            self.enqueue(message, message.run)

    def enqueue(self, message, run):
        # A message that was cancelled or resent meanwhile is in another run of its life.
        if self.stopped or message.run != run:
            return
        self.queue.append((self.loop.time() + self.config.step_ms / 1000, message, run))
        if self.timer is None:
            self.timer = self.loop.call_at(self.queue[0][0], self.tick)

    def move(self, message, status):
        message.history.append((status, time.time()))
        self.webhooks.emit_status(message)

    def tick(self):
        """Move what is due, a few hundred at a time so that requests are answered in between."""
        self.timer = None
        for _ in range(200):
            if not self.queue or self.queue[0][0] > self.loop.time():
                break
            _, message, run = self.queue.popleft()
            status = message.next_status()
            if message.run == run and status:
                self.move(message, status)
                self.enqueue(message, run)
        if self.queue and self.timer is None and not self.stopped:
            self.timer = self.loop.call_at(self.queue[0][0], self.tick)


# ---------------------------------------------------------------------------------------------
# Webhooks

def signing_key(secret):
    if not secret.startswith("whsec_"):
        return secret.encode()
    return base64.b64decode(secret[len("whsec_"):], validate=True)


def sign_v1(secret, webhook_id, timestamp, body):
    """The current scheme: X-Webhook-Signature over id, timestamp and the exact bytes."""
    signed = webhook_id.encode() + b"." + timestamp.encode() + b"." + body
    return "v1," + base64.b64encode(hmac.new(signing_key(secret), signed, hashlib.sha256).digest()).decode()


def sign_hex(secret, body):
    """The older scheme: the secret's text is the key, prefix and all."""
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


class Event:
    """One event for one webhook, and how its delivery went.  The body of a status event is made
    when it is wanted and is always the same bytes: kept for 100,000 messages they would be large."""
    __slots__ = ("id", "hook", "name", "secret", "created", "signed_at", "source", "outcome", "attempts", "status",
                 "response", "error", "started", "completed", "once")

    def __init__(self, hook, name, source):
        self.id, self.hook, self.name, self.source, self.secret = str(uuid.uuid4()), hook, name, source, hook.secret
        self.created = self.signed_at = time.time() if isinstance(source, bytes) else source[2]
        self.outcome, self.attempts, self.once = "PENDING", 0, False
        self.status = self.response = self.error = self.started = self.completed = None

    def body(self):
        return self.source if isinstance(self.source, bytes) else to_json(self.source[0].envelope(*self.source[1:]))

    def headers(self, body):
        timestamp = str(int(self.signed_at))
        return {"Content-Type": "application/json", "X-Webhook-ID": self.hook.id, "X-Webhook-Timestamp": timestamp,
                "X-Webhook-Signature": sign_v1(self.secret, self.hook.id, timestamp, body),
                "X-Webhook-Event-Type": self.name, "X-Webhook-Event-ID": self.id}

    def describe(self):
        return {"id": self.id, "event_type": self.name, "event_data": json.loads(self.body()),
                "delivery_status": self.outcome, "http_status_code": self.status, "response_body": self.response,
                "delivery_attempts": self.attempts, "error_message": self.error, "created_at": moment(self.created),
                "processing_started_at": moment(self.started), "processing_completed_at": moment(self.completed)}


class Hook:
    """A webhook endpoint: one registered through the API, or the one of the settings."""

    def __init__(self, account, identity=None, secret=None):
        self.id, self.account, self.secret = identity or str(uuid.uuid4()), account, secret or self.new_secret()
        self.name = self.url = ""
        self.families, self.filters, self.active, self.retries, self.timeout_s = [], None, True, 3, 30
        self.failures, self.last_attempt, self.last_success = 0, None, None
        self.created = self.updated = time.time()
        self.log, self.queue, self.workers = [], asyncio.Queue(), []

    @staticmethod
    def new_secret():
        return "whsec_" + base64.b64encode(os.urandom(32)).decode()

    def fill(self, body):
        """Take over the fields of a create or update request, which must be complete."""
        for name in ("display_name", "endpoint_url"):
            if not isinstance(body.get(name), str) or not body[name]:
                fail("VALIDATION_004", f"'{name}' is required.", name)
        families, filters = body.get("event_types") or [], body.get("event_filters")
        retries, timeout_s = body.get("retry_count", 3), body.get("timeout_seconds", 30)
        if not re.match(r"https?://[\w.-]+(:[0-9]+)?(/|$)", body["endpoint_url"]):
            fail("VALIDATION_001", "'endpoint_url' must be a URL.", "endpoint_url")
        if not isinstance(families, list) or not all(family in (*FAMILIES, "messages") for family in families):
            fail("VALIDATION_006", "'event_types' takes: " + ", ".join(FAMILIES) + ".", "event_types")
        if filters is not None and not (
                isinstance(filters, dict) and all(isinstance(wanted, list) for wanted in filters.values())):
            fail("VALIDATION_001", "'event_filters' must map an event type to an array.", "event_filters")
        if retries not in range(1, 6) or timeout_s not in range(5, 121):
            fail("VALIDATION_005", "'retry_count' takes 1 to 5 and 'timeout_seconds' 5 to 120.")
        self.name, self.url, self.families, self.filters = body["display_name"], body["endpoint_url"], families, filters
        self.retries, self.timeout_s, self.updated = retries, timeout_s, time.time()

    def takes(self, name, account):
        """Whether it subscribed to the event, such as message.sent, of the account ("": of any)."""
        family, _, suffix = name.partition(".")
        if not self.active or account and self.account not in ("", account, account.partition("/")[0]):
            return False
        if self.families and family not in self.families and family + "s" not in self.families:
            return False
        wanted = (self.filters or {}).get(family)
        return wanted is None or suffix in wanted

    def describe(self, secret=None):
        return {"id": self.id, "customer_id": stable_uuid("customer", self.account), "display_name": self.name,
                "endpoint_url": self.url, "event_types": self.families or list(FAMILIES),
                "event_filters": self.filters, "is_active": self.active, "signing_secret": secret,
                "retry_count": self.retries, "timeout_seconds": self.timeout_s,
                "consecutive_failures": self.failures, "last_delivery_attempt_at": moment(self.last_attempt),
                "last_successful_delivery_at": moment(self.last_success), "created_at": moment(self.created),
                "updated_at": moment(self.updated)}


async def read_answer(reader):
    """Status, text, and whether the connection can be used again."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(lines[0].split(" ", 2)[1])
    pairs = (line.partition(":") for line in lines[1:])
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    keep = lines[0].startswith("HTTP/1.1") and headers.get("connection", "").lower() != "close"
    body = b""
    if "chunked" in headers.get("transfer-encoding", ""):
        size = 1
        while size:
            size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
            body += (await reader.readexactly(size + 2))[:size]
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    elif status not in (204, 304):
        body, keep = await reader.read(), False
    return status, body.decode("utf-8", "replace"), keep


class Poster:
    """A small HTTP client that keeps its connections: it posts the webhooks."""

    def __init__(self):
        self.idle = {}      # place: [(reader, writer)]
        self.unverified = ssl.create_default_context()
        self.unverified.check_hostname, self.unverified.verify_mode = False, ssl.CERT_NONE

    async def post(self, url, headers, body, timeout_s):
        """The status and text of the answer; status 0 and the error's name when there is none."""
        try:
            return await asyncio.wait_for(self.exchange(urlsplit(url), headers, body), timeout_s)
        except (OSError, ValueError, IndexError, EOFError, asyncio.TimeoutError, asyncio.LimitOverrunError) as error:
            return 0, f"{type(error).__name__}: {error}"

    async def exchange(self, url, headers, body):
        place = (url.hostname, url.port or (443 if url.scheme == "https" else 80), url.scheme)
        target = (url.path or "/") + ("?" + url.query if url.query else "")
        lines = [f"POST {target} HTTP/1.1", f"Host: {url.netloc}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        data = ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8") + body
        pool = self.idle.setdefault(place, [])
        while True:
            reused = bool(pool)
            reader, writer = pool.pop() if reused else await asyncio.open_connection(
                place[0], place[1], ssl=self.unverified if url.scheme == "https" else None)
            try:
                writer.write(data)
                status, text, keep = await read_answer(reader)
            except (ConnectionError, asyncio.IncompleteReadError):
                writer.close()
                if reused:      # closed by the other side while it was idle
                    continue
                raise
            except BaseException:
                writer.close()
                raise
            if keep:
                pool.append((reader, writer))
            else:
                writer.close()
            return status, text


class Webhooks:
    """The endpoints, the events made for them, and their delivery in the background."""

    def __init__(self, config, spawn):
        self.config, self.spawn, self.poster = config, spawn, Poster()
        self.hooks, self.events, self.settings = {}, [], Hook("")
        self.configure()

    def configure(self):
        """Give the webhook of the settings its values.  Without a URL it only stands in for the
        others: its events are listed, for a test that has no receiver and hands them on itself."""
        hook, config = self.settings, self.config
        self.hooks.pop(hook.id, None)
        hook.id, hook.secret, hook.url = config.webhook_id, config.webhook_secret, config.webhook_url
        hook.retries, hook.timeout_s = config.webhook_retries, config.webhook_timeout_s
        hook.name, hook.active, hook.failures = "settings", True, 0
        if hook.url:
            self.hooks[hook.id] = hook

    def remove(self, hook):
        self.hooks.pop(hook.id, None)
        hook.active = False
        for worker in hook.workers:
            worker.cancel()

    def stop(self):
        for hook in [*self.hooks.values(), self.settings]:
            self.remove(hook)

    def emit(self, name, source, account):
        """Make an event for every webhook that takes it, and hand it to the deliverers."""
        made = [Event(hook, name, source) for hook in list(self.hooks.values()) or [self.settings]
                if hook.takes(name, account)]
        for event in made:
            self.record(event)
        return made

    def record(self, event):
        event.hook.log.append(event)
        self.events.append(event)
        if event.hook.url:
            self.push(event)

    def emit_status(self, message):
        status, at = message.history[-1]
        self.emit(event_name(status), (message, status, at), message.account)

    def push(self, event):
        hook = event.hook
        if not hook.workers:
            hook.workers = [self.spawn(self.work(hook)) for _ in range(self.config.webhook_workers)]
        hook.queue.put_nowait(event)

    async def work(self, hook):
        while True:
            event = await hook.queue.get()
            if hook.active or event.once:
                await self.deliver(event)
            else:
                event.outcome, event.error = "FAILED", "The webhook is disabled."

    async def deliver(self, event):
        hook, body = event.hook, event.body()
        hook.last_attempt = time.time()
        event.started = event.started or hook.last_attempt
        if event.attempts and self.config.resign_retries:
            event.signed_at = hook.last_attempt
        status, text = await self.poster.post(hook.url, event.headers(body), body, hook.timeout_s)
        event.attempts += 1
        event.status, event.response, event.error = (status, text[:1000], None) if status else (None, None, text)
        if 200 <= status < 300:
            event.outcome, event.completed, hook.failures, hook.last_success = "DELIVERED", time.time(), 0, time.time()
        elif not event.once and event.attempts <= hook.retries:
            delay_s = self.config.webhook_retry_ms / 1000
            asyncio.get_running_loop().call_later(delay_s, hook.queue.put_nowait, event)
        else:
            event.outcome, event.completed = "FAILED", time.time()
            event.error = event.error or f"HTTP {status}"
            hook.failures += not event.once
            hook.active = hook.active and hook.failures < FAILURES_TO_DISABLE


# ---------------------------------------------------------------------------------------------
# The API

class Api:
    """The resources of /v3: authentication, limits, idempotency, and one method for each call."""

    def __init__(self, config, webhooks, lifecycle):
        self.config, self.webhooks, self.lifecycle = config, webhooks, lifecycle
        self.messages, self.contacts = {}, {}       # by id; first use by (account, number)
        self.replies, self.busy = {}, {}            # by (account, key): the answer; who waits for it
        self.windows, self.failures = {}, {}        # by account: arrival times; by key: wrong keys
        one, hook = "/v3/messages/([^/]+)", "/v3/webhooks/([^/]+)"
        self.routes = [(re.compile(pattern), methods) for pattern, methods in (
            ("/v3/messages", {"POST": self.post_messages}),
            (one, {"GET": self.get_message}),
            (one + "/activities", {"GET": self.get_activities}),
            (one + "/cancel", {"POST": self.cancel_message}),
            (one + "/resend", {"POST": self.resend_message}),
            ("/v3/me", {"GET": self.get_me}),
            ("/v3/templates", {"GET": self.get_templates}),
            ("/v3/templates/([^/]+)", {"GET": self.get_template}),
            ("/v3/contacts", {"GET": self.get_contacts}),
            ("/v3/numbers/lookup/([^/]+)", {"GET": self.get_number}),
            ("/v3/webhooks", {"GET": self.get_webhooks, "POST": self.post_webhook}),
            ("/v3/webhooks/event-types", {"GET": self.get_event_types}),
            (hook, {"GET": self.get_webhook, "PUT": self.put_webhook, "DELETE": self.delete_webhook}),
            (hook + "/test", {"POST": self.test_webhook}),
            (hook + "/rotate-secret", {"POST": self.rotate_secret}),
            (hook + "/toggle-status", {"PATCH": self.toggle_webhook}),
            (hook + "/events", {"GET": self.get_webhook_events}),
        )]

    # Every request

    def answer(self, request):
        try:
            call, account = self.admit(request)
            return self.once(request, call, account)
        except Refusal as refusal:
            return refusal.answer(request.id)

    async def answer_late(self, request, delay_s):
        """The same after a delay, during which its idempotency key is taken."""
        slot = self.slot(request)
        try:
            call, account = self.admit(request)
            await self.take_turn(slot)
            try:
                await asyncio.sleep(delay_s)
                return self.once(request, call, account)
            finally:
                if slot:
                    self.busy.pop(slot).set_result(None)
        except Refusal as refusal:
            return refusal.answer(request.id)

    async def take_turn(self, slot):
        """Wait until nobody else processes a request with this key, then take the key."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.inflight_wait
        while slot in self.busy:
            try:
                await asyncio.wait_for(asyncio.shield(self.busy[slot]), deadline - loop.time())
            except asyncio.TimeoutError:
                raise Refusal(409, "CONFLICT_001", "A request with this Idempotency-Key is in progress.") from None
        if slot:
            self.busy[slot] = loop.create_future()

    def account_of(self, request):
        return "" if self.config.one_account else request.headers.get("x-api-key", "")

    def slot(self, request):
        key = request.headers.get("idempotency-key")
        return (self.account_of(request), key) if key and request.method in ("POST", "PUT", "PATCH") else None

    def must_wait(self, request):
        return bool(self.busy) and self.slot(request) in self.busy

    def admit(self, request):
        """The call that the request asks for and the account it acts for, or a Refusal."""
        call = self.route(request)
        self.check_key(request.headers.get("x-api-key", ""))
        account = self.account_of(request)
        if self.config.rate_limit:
            self.check_rate(account)
        if "x-profile-id" in request.headers:
            profile = request.headers["x-profile-id"].lower()
            self.check_profile(profile, request.headers["x-api-key"])
            account += "/" + profile    # what it owns is its own; limits and keys are the organization's
        key = request.headers.get("idempotency-key")
        if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
            fail("VALIDATION_007", "Idempotency-Key takes 1 to 255 letters, digits, '-' and '_'.")
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.body and content_type != "application/json":
            raise Refusal(415, "VALIDATION_001", "Content-Type must be application/json.")
        return call, account

    def route(self, request):
        for pattern, methods in self.routes:
            found = pattern.fullmatch(request.path)
            if found and request.method in methods:
                return functools.partial(methods[request.method], *found.groups())
            if found:
                raise Refusal(405, "METHOD_NOT_ALLOWED", "Method not allowed.", None, [("Allow", ", ".join(methods))])
        raise Refusal(404, "ROUTE_NOT_FOUND", "No such endpoint.")

    def check_key(self, key):
        if not key:
            raise Refusal(401, "AUTH_001", "Header x-api-key is missing.")
        count, locked_until = self.failures.get(key, (0, 0))
        now, limit = time.monotonic(), self.config.lockout_after
        if now < locked_until:
            raise too_many(locked_until - now)
        if not self.config.keys or key in self.config.keys:
            self.failures.pop(key, None)
            return
        count += 1
        locked_until = now + 60 * 2 ** (count // limit - 1) if limit and count % limit == 0 else 0
        self.failures[key] = (count, locked_until)
        raise Refusal(401, "AUTH_002", "The API key is invalid or revoked.")

    def check_rate(self, account):
        window, now = self.windows.setdefault(account, collections.deque()), time.monotonic()
        while window and window[0] <= now - self.config.rate_window_s:
            window.popleft()
        if len(window) >= self.config.rate_limit:
            raise too_many(window[0] + self.config.rate_window_s - now, self.config.rate_limit)
        window.append(now)

    @staticmethod
    def check_profile(profile, key):
        if not UUID.fullmatch(profile):
            fail("VALIDATION_003", "Header x-profile-id must be a UUID.")
        if key.startswith("profile_"):
            raise Refusal(403, "AUTH_004", "A profile's key cannot act for a profile.")
        if profile.startswith("00000000-"):
            raise Refusal(404, "RESOURCE_005", "Profile not found.")

    def once(self, request, call, account):
        """Carry the call out, or repeat the answer that its idempotency key already got."""
        slot = self.slot(request)
        if slot is None:
            return call(request, account)
        asked = hashlib.sha256(f"{request.method} {request.path}\n".encode() + request.body).digest()
        kept = self.replies.get(slot)
        if kept and time.monotonic() < kept[0]:
            return self.replay(request, asked, *kept[1:])
        answer = call(request, account)
        if 200 <= answer.status < 300:
            self.replies[slot] = (time.monotonic() + self.config.idempotency_ttl, asked, answer, request.id)
        return answer

    @staticmethod
    def replay(request, asked, first_asked, first, first_id):
        if asked != first_asked:
            raise Refusal(409, "CONFLICT_005", "Idempotency-Key already used for a different request.")
        headers = [*first.headers, ("Idempotent-Replayed", "true"), ("X-Original-Request-Id", first_id)]
        return Answer(first.status, first.body, headers, "replayed")

    # Messages

    def post_messages(self, request, account):
        order = read_order(request.json(), self.config)
        rows = [self.new_message(order, account, to, channel)
                for to in order.to for channel in order.channels or (None,)]
        data = {"status": "QUEUED", "template_id": order.template and order.template["id"],
                "template_name": order.template and order.template["name"],
                "recipients": [{"message_id": row.id, "to": row.to, "channel": row.channel,
                                "body": row.text if row.channel else None} for row in rows]}
        if order.scheduled_at:
            data["scheduled_at"] = iso(order.scheduled_at)
        body = envelope(request.id, data)
        if order.sandbox:
            return Answer(202, body, [("X-Sandbox", "true")], "sandbox")
        for row in rows:
            self.messages[row.id] = row
            self.contacts.setdefault((account, row.to), row.history[0][1])
            self.lifecycle.begin(row)
        return Answer(202, body, outcome="accepted", rows=rows)

    @staticmethod
    def new_message(order, account, to, channel):
        message = Message(account, to, channel, order.template, order.text)
        message.scheduled_at = order.scheduled_at
        if channel in order.blocked:
            message.ending = ("BLOCKED", "BUSINESS_029", "The sender number is not active")
        return message

    def find_message(self, identity, account):
        if not UUID.fullmatch(identity):
            fail("VALIDATION_003", "The message id must be a UUID.")
        message = self.messages.get(identity.lower())
        if message is None or message.account not in ("", account):
            raise Refusal(404, "RESOURCE_003", "Message not found.")
        return message

    def get_message(self, identity, request, account):
        return ok(request, self.find_message(identity, account).describe())

    def get_activities(self, identity, request, account):
        message = self.find_message(identity, account)
        return ok(request, {"message_id": message.id, **page(request, "activities", message.activities())})

    def cancel_message(self, identity, request, account):
        message = self.find_message(identity, account)
        if not message.scheduled_at or message.status not in ("QUEUED", "SCHEDULED"):
            raise Refusal(422, "BUSINESS_006", "Only a scheduled message can be cancelled.")
        message.run += 1
        self.lifecycle.move(message, "CANCELLED")
        return ok(request, {"message_id": message.id, "status": message.status})

    def resend_message(self, identity, request, account):
        """Run a failed message again on the same id; what stopped it has been put right."""
        message = self.find_message(identity, account)
        if message.status not in ("FAILED", "BLOCKED"):
            raise Refusal(422, "BUSINESS_006", "The message cannot be resent in this state.")
        message.run += 1
        message.ending = ("DELIVERED", None, None)
        message.history.append(("QUEUED", time.time()))
        self.lifecycle.begin(message)
        return ok(request, {"message_id": message.id, "status": message.status}, 202)

    # The account and its lists

    def get_me(self, request, account):
        channels = {"sms": {"configured": True, "phone_number": "+15550009999"},
                    "whatsapp": {"configured": True, "phone_number": "+15550009999", "business_name": "Stand-in"},
                    "rcs": {"configured": True, "phone_number": "+15550009999"}}
        return ok(request, {"type": "organization", "id": stable_uuid("customer", account), "name": "Stand-in Ltd",
                            "email": "owner@example.com", "organization_id": None, "short_name": "standin",
                            "status": "approved", "channels": channels, "profiles": [], "settings": {}})

    def get_templates(self, request, account):
        asked = request.parameters()
        search = asked.get("search", "").lower()
        rows = [self.show_template(known, account) for known in TEMPLATES if search in known["name"]]
        rows = [row for row in rows if all(row[name] == asked.get(name, row[name]) for name in ("category", "status"))]
        return ok(request, page(request, "templates", rows))

    def get_template(self, identity, request, account):
        known = find_template(identity.lower(), None)
        if known is None:
            raise Refusal(404, "RESOURCE_002", "Template not found.")
        return ok(request, self.show_template(known, account))

    @staticmethod
    def show_template(known, account):
        return {"id": known["id"], "name": known["name"], "category": known["category"], "language": "en_US",
                "status": "APPROVED", "channels": ["sms", "whatsapp", "rcs"], "variables": known["variables"],
                "is_published": True, "customer_id": stable_uuid("customer", account),
                "created_at": iso_precise(0), "updated_at": None}

    def get_contacts(self, request, account):
        asked = request.parameters()
        part, phone = asked.get("search", ""), asked.get("phone")
        rows = [(number, at) for (owner, number), at in self.contacts.items()
                if owner == account and part in number and phone in (None, number)]
        return ok(request, page(request, "contacts", rows, lambda row: self.show_contact(*row)))

    @staticmethod
    def show_contact(number, at):
        return {"id": stable_uuid("contact", number), "phone_number": number, "format_e164": number,
                "format_international": number, "format_national": number[2:], "format_rfc": "tel:" + number,
                "country_code": number[1:2], "region_code": region(number), "available_channels": "sms,whatsapp",
                "default_channel": "sms", "opt_out": number.endswith("0003"), "is_inherited": False,
                "created_at": iso_precise(at), "updated_at": None}

    def get_number(self, number, request, account):
        if not E164.fullmatch(number):
            fail("VALIDATION_002", "Phone numbers must be in E.164 format.")
        return ok(request, {"phone_number": number, "is_valid": not number.endswith("0001"),
                            "country_code": region(number), "line_type": "mobile", "carrier_name": "Stand-in Mobile",
                            "is_ported": False, "is_voip": False, "mobile_country_code": "310",
                            "mobile_network_code": "260"})

    # Webhooks

    def find_hook(self, identity, account):
        if not UUID.fullmatch(identity):
            fail("VALIDATION_003", "The webhook id must be a UUID.")
        hook = self.webhooks.hooks.get(identity.lower())
        if hook is None or hook.account not in ("", account):
            raise Refusal(404, "RESOURCE_008", "Webhook not found.")
        return hook

    def get_webhooks(self, request, account):
        hooks = [hook for hook in self.webhooks.hooks.values() if hook.account in ("", account)]
        return ok(request, page(request, "webhooks", hooks, Hook.describe))

    def post_webhook(self, request, account):
        hook = Hook(account)
        hook.fill(request.json())
        if request.json().get("sandbox") is not True:
            self.webhooks.hooks[hook.id] = hook
        return ok(request, hook.describe(hook.secret), 201)

    def get_webhook(self, identity, request, account):
        return ok(request, self.find_hook(identity, account).describe())

    def put_webhook(self, identity, request, account):
        hook = self.find_hook(identity, account)
        hook.fill(request.json())
        return ok(request, hook.describe())

    def delete_webhook(self, identity, request, account):
        self.webhooks.remove(self.find_hook(identity, account))
        return Answer(204)

    def test_webhook(self, identity, request, account):
        """One delivery, no retry."""
        hook, name = self.find_hook(identity, account), request.json().get("event_type")
        if not isinstance(name, str) or name.partition(".")[0] not in FAMILIES:
            fail("VALIDATION_004", "'event_type' is required, such as message.sent.", "event_type")
        event = Event(hook, name, to_json(forged_envelope({"event": name})))
        event.once = True
        self.webhooks.record(event)
        return ok(request, {"success": True, "message": "The test event was queued."})

    def rotate_secret(self, identity, request, account):
        hook = self.find_hook(identity, account)
        hook.secret = hook.new_secret()
        return ok(request, {"signing_secret": hook.secret})

    def toggle_webhook(self, identity, request, account):
        hook, active = self.find_hook(identity, account), request.json().get("is_active")
        if not isinstance(active, bool):
            fail("VALIDATION_004", "'is_active' is required.", "is_active")
        hook.active, hook.failures, hook.updated = active, 0, time.time()
        return ok(request, hook.describe())

    def get_webhook_events(self, identity, request, account):
        search = request.parameters().get("search", "").encode()
        log = self.find_hook(identity, account).log
        rows = [event for event in reversed(log) if search in event.name.encode() or search in event.body()] \
            if search else log[::-1]
        return ok(request, page(request, "events", rows, Event.describe))

    def get_event_types(self, request, account):
        def entry(name, subs=None):
            return {"name": name, "display_name": name.replace(".", " ").replace("_", " ").capitalize(),
                    "description": None, "event_type": name, "is_active": True, "sub_types": subs}
        rows = [entry(family, [entry(f"{family}.{sub}") for sub in subs] or None) for family, subs in FAMILIES.items()]
        return ok(request, page(request, "event_types", rows))


def page(request, name, rows, shown=None):
    """One page of the rows, under their name and with the pagination that says what is left."""
    asked = request.parameters()
    number, size = asked.get("page", "1"), asked.get("page_size", "50")
    if not re.fullmatch("[0-9]{1,9}", number) or int(number) < 1:
        fail("VALIDATION_005", "'page' starts at 1.", "page")
    if not re.fullmatch("[0-9]{1,9}", size) or not 1 <= int(size) <= PAGE_SIZE_MAX:
        fail("VALIDATION_005", f"'page_size' takes 1 to {PAGE_SIZE_MAX}.", "page_size")
    number, size = int(number), int(size)
    some = rows[(number - 1) * size:number * size]
    pages = math.ceil(len(rows) / size)
    return {name: [shown(row) for row in some] if shown else some, "pagination": {
        "page": number, "page_size": size, "total_count": len(rows), "total_pages": pages,
        "has_more": number < pages, "cursors": None}}


# ---------------------------------------------------------------------------------------------
# Webhook requests on demand

def forged_envelope(spec):
    """An event of any generation of payloads, as the specification in a control request says."""
    name, at = spec.get("event", "message.delivered"), spec.get("updated_at") or iso(time.time())
    generation, to, channel = spec.get("generation", "G3"), spec.get("to", "+15550001000"), spec.get("channel", "sms")
    family, _, suffix = name.partition(".")
    identity, status = spec.get("message_id") or str(uuid.uuid4()), spec.get("status") or suffix.upper()
    if generation == "G0":
        data = {"id": identity, "status": status.lower(), **spec.get("payload", {})}
        if suffix == "failed":
            data.setdefault("error", {"message": spec.get("reason", "Delivery failed")})
        return {"type": name, "data": data, "timestamp": at}
    payload = {"account_id": stable_uuid("customer", "")}
    if family == "message":
        payload.update(message_id=identity, channel=channel)
    if suffix == "received":
        payload.update(inbound_number=spec.get("from", to), outbound_number="+15550009999", text=spec.get("text"),
                       received_at=at, updated_at=at)
    elif family == "message" and generation == "G3":
        payload.update(message_status=status, outbound_number=to, template_id=None, body=None, updated_at=at)
    elif family == "message":   # before, the numbers were named from the other side, and nothing told when
        payload.update(message_status=status, inbound_number=to, outbound_number="+15550009999", template_id=None)
    payload.update({key: spec[key] for key in ("reason_code", "reason") if key in spec})
    payload.update(spec.get("payload", {}))
    if generation == "G1":
        return {"field": "messages", "timestamp": at, "payload": payload}
    kind = {"event" if generation == "G3" else "sub_type": name} if suffix else {}
    return {"field": family, **kind, "timestamp": at, "payload": payload}


def forge(spec, settings):
    """The headers and the body of the webhook request that the specification asks for."""
    if "raw_base64" in spec:
        body = base64.b64decode(spec["raw_base64"])
    else:
        body = spec["raw"].encode() if "raw" in spec else to_json(spec.get("envelope") or forged_envelope(spec))
    secret, identity = spec.get("secret", settings.secret), spec.get("id", settings.id)
    timestamp, scheme = str(spec.get("timestamp", int(time.time()))), spec.get("scheme", "B")
    name = spec.get("event") or (spec.get("envelope") or {}).get("event") or "message.delivered"
    headers = {"Content-Type": "application/json", "X-Webhook-ID": identity, "X-Webhook-Timestamp": timestamp,
               "X-Webhook-Event-Type": name, "X-Webhook-Event-ID": spec.get("event_id") or str(uuid.uuid4())}
    if scheme == "B":
        headers["X-Webhook-Signature"] = sign_v1(secret, identity, timestamp, body)
    elif scheme in ("A", "A1"):
        headers = {"Content-Type": "application/json",
                   "X-Webhook-Signature": ("sha256=" if scheme == "A1" else "") + sign_hex(secret, body)}
    elif scheme != "none":
        fail("VALIDATION_001", "'scheme' takes: B, A, A1, none.")
    headers.update(spec.get("headers") or {})
    return {name: value for name, value in headers.items() if value is not None}, body


def show_forged(headers, body):
    return {"headers": headers, "body": body.decode("utf-8", "replace"), "body_base64": base64.b64encode(body).decode()}


# ---------------------------------------------------------------------------------------------
# Control

class Control:
    """What a test asks and tells: /_control/, plain JSON without an envelope or a key."""

    def __init__(self, standin):
        self.standin = standin
        self.calls = {
            "GET ledger": self.get_ledger, "GET ledger/summary": self.get_summary, "GET arrivals": self.get_arrivals,
            "GET requests/last": self.get_last, "POST reset": self.post_reset, "GET faults": self.get_faults,
            "POST faults": self.post_faults, "GET config": self.get_config, "POST config": self.post_config,
            "GET events": self.get_events, "POST events": self.get_events, "POST sign": self.post_sign,
            "POST webhooks": self.post_webhooks, "POST inbound": self.post_inbound,
        }

    def handle(self, request):
        call = self.calls.get(f"{request.method} {request.path[len('/_control/'):]}")
        try:
            if call is None:
                raise Refusal(404, "ROUTE_NOT_FOUND", "Control calls: " + ", ".join(self.calls))
            result = call(request)
            return result if asyncio.iscoroutine(result) else Answer(200, to_json(result))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return Refusal(400, "CONTROL", f"{type(error).__name__}: {error}").answer(request.id)
        except Refusal as refusal:
            return refusal.answer(request.id)

    @staticmethod
    def window(request, rows):
        """The rows after number `after`, at most `limit` of them."""
        asked = request.parameters()
        after = int(asked.get("after", 0))
        return rows[after:after + int(asked["limit"])] if "limit" in asked else rows[after:]

    def get_ledger(self, request):
        entries = self.window(request, self.standin.ledger.entries)
        return {"entries": [entry.describe() for entry in entries],
                "effects": [effect for entry in entries for effect in entry.effects()]}

    def get_summary(self, request):
        standin = self.standin
        return {**standin.ledger.summary(), "connections_opened": standin.opened,
                "connections_open": len(standin.connections), "most_connections": standin.most_open,
                "messages": len(standin.api.messages), "events": len(standin.webhooks.events),
                "statuses": collections.Counter(message.status for message in standin.api.messages.values())}

    def get_arrivals(self, request):
        return [[entry.key, entry.unix_us] for entry in self.window(request, self.standin.ledger.entries)]

    def get_last(self, request):
        last = self.standin.last_post
        return last and {"method": last.method, "path": last.path, "query": last.query, "unix_us": last.unix_us,
                         "connection": last.connection, **show_forged(last.headers, last.body)}

    def post_reset(self, request):
        self.standin.reset()
        return {}

    def get_faults(self, request):
        return self.standin.faults.describe()

    def post_faults(self, request):
        specs = from_json(request.body or b"[]")
        self.standin.faults.replace(specs if isinstance(specs, list) else [specs])
        return self.get_faults(request)

    def get_config(self, request):
        return vars(self.standin.config)

    def post_config(self, request):
        self.standin.configure(request.json())
        return self.get_config(request)

    def get_events(self, request):
        since, rows = float(request.parameters().get("since", 0)), self.standin.webhooks.events
        wanted = self.window(request, rows)
        events = []
        for event in wanted:
            if event.created >= since:
                body = event.body()
                events.append({"headers": event.headers(body), "body": body.decode(), "created": event.created,
                               "delivery_status": event.outcome, "http_status": event.status})
        return {"events": events, "next": int(request.parameters().get("after", 0)) + len(wanted)}

    def post_sign(self, request):
        return show_forged(*forge(request.json(), self.standin.webhooks.settings))

    def post_webhooks(self, request):
        specs = from_json(request.body)
        specs = specs if isinstance(specs, list) else [specs]
        settings = self.standin.webhooks.settings
        forged = [(spec, *forge(spec, settings)) for spec in specs]
        if not all(spec.get("url") or settings.url for spec in specs):
            fail("VALIDATION_001", "Give 'url', or set webhook_url.")
        return self.send_forged(forged)

    async def send_forged(self, forged):
        """Send each specification's request `times` times in a row, the specifications side by side."""
        settings, poster = self.standin.webhooks.settings, self.standin.webhooks.poster
        gate = asyncio.Semaphore(32)

        async def send(spec, headers, body):
            async with gate:
                return [await poster.post(spec.get("url") or settings.url, headers, body, settings.timeout_s)
                        for _ in range(spec.get("times", 1))]
        answers = [answer for some in await asyncio.gather(*(send(*each) for each in forged)) for answer in some]
        return Answer(200, to_json({"status_codes": [status for status, _ in answers],
                                    "responses": [text for _, text in answers],
                                    "requests": [show_forged(headers, body) for _, headers, body in forged]}))

    def post_inbound(self, request):
        """A message from a contact to us."""
        spec, standin = request.json(), self.standin
        message = Message(spec.get("account", ""), spec["from"], spec.get("channel", "sms"), None,
                          spec.get("text") or "", "INBOUND")
        standin.api.messages[message.id] = message
        payload = {"outbound_number": spec.get("to", "+15550009999")}
        body = to_json(forged_envelope({"event": "message.received", "message_id": message.id, "from": spec["from"],
                                        "channel": message.channel, "text": spec.get("text"), "payload": payload}))
        events = standin.webhooks.emit("message.received", body, message.account)
        return {"message_id": message.id, "events": [show_forged(event.headers(body), body) for event in events]}


# ---------------------------------------------------------------------------------------------
# The whole

class Standin:
    """All the state, and the way of a request through it."""

    def __init__(self, startup):
        self.startup, self.stopping = startup, asyncio.Event()
        self.tasks, self.connections, self.opened, self.most_open = set(), set(), 0, 0
        self.control, self.webhooks = Control(self), None
        self.reset()

    def reset(self):
        """Back to the start, settings included; open connections stay.  Requests in progress end
        in the state they began in, which is thrown away."""
        if self.webhooks:
            self.webhooks.stop()
            self.lifecycle.stopped = True
        self.config = types.SimpleNamespace(**{**DEFAULTS, **self.startup})
        self.ledger, self.faults, self.last_post = Ledger(), Faults(), None
        self.webhooks = Webhooks(self.config, self.spawn)
        self.lifecycle = Lifecycle(self.config, self.webhooks)
        self.api = Api(self.config, self.webhooks, self.lifecycle)
        self.opened = self.most_open = len(self.connections)
        gc.collect()    # main() makes full passes rare, and events and their webhooks refer to each other

    def configure(self, changes):
        for name, value in changes.items():
            default = DEFAULTS.get(name)
            number = isinstance(default, (int, float)) and not isinstance(default, bool)
            if name not in DEFAULTS or not isinstance(value, (int, float) if number else type(default)):
                fail("VALIDATION_001", f"{name}: unknown, or not a value of its type.", name)
        vars(self.config).update(changes)
        if any(name in changes for name in ("webhook_url", "webhook_secret", "webhook_id", "webhook_retries",
                                            "webhook_timeout_s")):
            self.webhooks.configure()

    def spawn(self, coroutine):
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)        # or it might be collected while it waits
        task.add_done_callback(self.tasks.discard)
        return task

    def connected(self, connection):
        self.connections.add(connection)
        self.opened += 1
        self.most_open = max(self.most_open, len(self.connections))
        return self.opened

    def handle(self, request, connection):
        """The answer, or a coroutine when it has to wait."""
        if request.path.startswith("/_control/"):
            return self.control.handle(request)
        if request.method == "POST":
            self.last_post = request
        entry = None
        if request.path == "/v3/messages" and request.method == "POST":
            entry = self.ledger.arrive(request)
        fault = self.faults.pick(request, entry.attempt if entry else 1)
        if fault or self.config.latency_ms or self.api.must_wait(request):
            return self.handle_slowly(request, connection, entry, fault)
        answer = self.api.answer(request)
        if entry:
            self.ledger.settle(entry, answer)
        return answer

    async def handle_slowly(self, request, connection, entry, fault):
        """Anything but the plain case: with a delay, a key in use, or a fault."""
        ledger, answer = self.ledger, None
        delay_ms = self.config.latency_ms + (fault.spec.get("ms", 1000) if fault and fault.action == "latency" else 0)
        ledger.processing += 1
        ledger.most_processing = max(ledger.most_processing, ledger.processing)
        try:
            if fault is None or fault.accepts:
                answer = await self.api.answer_late(request, delay_ms / 1000)
                if entry:
                    ledger.settle(entry, answer)
            if fault and entry:
                ledger.spoil(entry, fault)
        finally:
            ledger.processing -= 1
        if fault is None or fault.spoil is None:
            return answer
        await fault.spoil(fault, connection, request, answer)
        return None


def tls_context(options):
    if not options.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(options.tls_cert, options.tls_key)
    return context


def write_file(path, text):
    """Whole or not at all, for whoever waits for the file to appear."""
    with open(path + ".new", "w", encoding="ascii") as file:
        file.write(text)
    os.replace(path + ".new", path)


def forgive(loop, context):
    """Clients that break off a handshake or a connection are what a test does, not a failure here."""
    if not isinstance(context.get("exception"), (OSError, ssl.SSLError)):
        loop.default_exception_handler(context)


async def serve(options, startup):
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(forgive)
    standin = Standin(startup)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, standin.stopping.set)
    server = await loop.create_server(lambda: Connection(standin), options.host, options.port,
                                      ssl=tls_context(options), backlog=1024)
    port = server.sockets[0].getsockname()[1]
    written = [(options.pid_file, os.getpid()), (options.ready_file, port)]
    for path, number in written:
        if path:
            write_file(path, f"{number}\n")
    print(f"listening on {port}", flush=True)
    await standin.stopping.wait()
    server.close()
    for connection in list(standin.connections):
        connection.transport.abort()
    for path, _ in written:
        if path:
            os.unlink(path)
    if not options.quiet:
        print(json.dumps(standin.ledger.summary()), file=sys.stderr)
    # At once: the loop would wait for tasks whose peers may never answer, and to free a long
    # ledger object by object would take seconds.
    sys.stderr.flush()
    os._exit(0)


def read_options():
    parser = argparse.ArgumentParser(description="A stand-in for the Sent API v3.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any; printed when ready")
    parser.add_argument("--key", action="append", help="an API key to accept; repeatable; default: any")
    parser.add_argument("--rate-limit", type=int, metavar="N", help="requests a minute; default: no limit")
    parser.add_argument("--tls-cert", metavar="FILE")
    parser.add_argument("--tls-key", metavar="FILE")
    parser.add_argument("--webhook-url", metavar="URL", help="where status events are posted")
    parser.add_argument("--webhook-secret", metavar="whsec_...")
    parser.add_argument("--webhook-id", metavar="UUID")
    parser.add_argument("--lifecycle", choices=("auto", "off"), help="auto (the default): accepted messages move on")
    parser.add_argument("--step-ms", type=int, metavar="MS", help="time between two statuses; default 50")
    parser.add_argument("--ready-file", metavar="PATH", help="holds the port once it listens")
    parser.add_argument("--pid-file", metavar="PATH")
    parser.add_argument("--quiet", action="store_true", help="no summary on stderr at the end")
    return parser.parse_args()


def main():
    options = read_options()
    given = {"keys": options.key, **{name: getattr(options, name) for name in (
        "rate_limit", "webhook_url", "webhook_secret", "webhook_id", "lifecycle", "step_ms")}}
    # The ledger only grows: the collector's full passes would find nothing, ever more slowly.
    gc.set_threshold(50_000, 20, 1000)
    asyncio.run(serve(options, {name: value for name, value in given.items() if value is not None}))


if __name__ == "__main__":
    main()
