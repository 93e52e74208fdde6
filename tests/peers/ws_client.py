"""A WebSocket client. Each line of its input is a task as JSON, and each line that it says is the outcome.

{"do": "cases", "address", "by"}: all cases, each with what the server sent.
{"do": "open", "address", "by", "path", "fields", "protocol"}: opens a connection; says its status, fields and, where it is
refused, what is behind them.
{"do": "send", "hex"}: sends bytes on it, as they are. {"do": "echo", "text", "after", "then"}: sends a message after so many seconds,
and says what comes back; by then whoever passed it on has also read the bytes that were sent with it, in hex.
{"do": "rest", "answer"}: what frames come until the end, and how long after a Close frame that is, which is answered, if so told.
"""

import hashlib
import json
import struct
import sys
import threading
import time

from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.headers import parse_extension

from ws_transport import Http1, Http2

WAYS = {"http1": Http1, "http2": Http2}
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def frame(opcode, payload=b"", fin=True, rsv=0, form=None):
    """As a client sends it. `form`: the length in more bytes than it needs."""
    mask = b"\x01\x82\x33\xf4"
    length = len(payload)
    head = bytearray([(0x80 if fin else 0) | rsv << 4 | opcode])
    if length < 126 and form is None:
        head.append(0x80 | length)
    elif length < 65536 and form in (None, 16):
        head.append(0x80 | 126)
        head += struct.pack("!H", length)
    else:
        head.append(0x80 | 127)
        head += struct.pack("!Q", length)
    repeated = int.from_bytes((mask * (length // 4 + 1))[:length], "big")
    masked = (int.from_bytes(payload, "big") ^ repeated).to_bytes(length, "big")
    return bytes(head) + mask + masked


def close(code=1000, reason=b""):
    return frame(CLOSE, struct.pack("!H", code) + reason)


class Frames:
    """The frames that come over a way, until its end."""

    def __init__(self, way):
        self.way, self.buffer = way, b""

    def take(self, count):
        parts = [self.buffer]
        have = len(self.buffer)
        while have < count:
            part = self.way.recv()
            if not part:
                return None
            parts.append(part)
            have += len(part)
        whole = b"".join(parts)
        self.buffer = whole[count:]
        return whole[:count]

    def next(self):
        """First byte and payload, or None at the end."""
        head = self.take(2)
        if head is None:
            return None
        length = head[1]
        if length == 126:
            (length,) = struct.unpack("!H", self.take(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", self.take(8))
        payload = self.take(length)
        return None if payload is None else (head[0], payload)


def told(first, payload):
    if first & 0x0F == CLOSE:
        return f"{first:02x} {payload.hex()}"
    return f"{first:02x} {len(payload)} {hashlib.sha256(payload).hexdigest()[:16]}"


def cases():
    """By name: steps, which are bytes to send and numbers of frames to wait for, and how the bytes are chopped. Waits end at a
    Close frame, too. The groups are those of the Autobahn Testsuite."""
    text = lambda length: b"*" * length
    binary = lambda length: bytes(range(256)) * (length // 256) + bytes(length % 256)
    made = {}

    def case(name, *steps, chop=None):
        """Ends with a Close frame, unless told otherwise by a None."""
        ends = [step for step in steps if step is not None] + ([] if None in steps else [close()])
        made[name] = (ends, chop)

    # 1: sizes of frames.
    for length in (0, 125, 126, 127, 128, 65535, 65536):
        case(f"1.1 text {length}", frame(TEXT, text(length)), 1)
        case(f"1.2 binary {length}", frame(BINARY, binary(length)), 1)
    case("1.1 text 65536 by 997", frame(TEXT, text(65536)), 1, chop=997)
    case("1.2 binary 65536 by 997", frame(BINARY, binary(65536)), 1, chop=997)
    case("1.3 longer form 16", frame(TEXT, text(5), form=16), 1)
    case("1.3 longer form 64", frame(TEXT, text(5), form=64), 1)

    # 2: pings and pongs.
    for name, payload in [("empty", b""), ("text", b"Hello"), ("binary", b"\x00\xff\xfe\xfd\xfc"), ("125", binary(125))]:
        case(f"2 ping {name}", frame(PING, payload), 1)
    case("2 ping 126", frame(PING, binary(126)), 1, None)
    case("2 ping 125 by 1", frame(PING, binary(125)), 1, chop=1)
    case("2 pong unasked", frame(PONG))
    case("2 pong unasked, ping", frame(PONG, b"unasked"), frame(PING, b"asked"), 1)
    pings = b"".join(frame(PING, b"payload-%d" % n) for n in range(10))
    case("2 ten pings", pings, 10)
    case("2 ten pings by 1", pings, 10, chop=1)

    # 3: reserved bits.
    for rsv in range(1, 8):
        case(f"3 rsv {rsv}", frame(TEXT, b"Hello"), 1, frame(TEXT, b"Hello", rsv=rsv) + frame(PING), None)
    case("3 rsv 4 on ping", frame(PING, b"Hello", rsv=4), None)
    case("3 rsv 7 on close", frame(CLOSE, b"\x03\xe8", rsv=7), None)

    # 4: opcodes.
    for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        case(f"4 opcode {opcode}", frame(TEXT, b"Hello"), 1, frame(opcode, b"Hello") + frame(PING), None)

    # 5: fragments.
    case("5 ping in fragments", frame(PING, b"a", fin=False) + frame(0, b"b"), None)
    case("5 pong in fragments", frame(PONG, b"a", fin=False) + frame(0, b"b"), None)
    first, second = frame(TEXT, b"fragment1", fin=False), frame(0, b"fragment2")
    case("5 text in two", first + second, 1)
    case("5 text in two by 1", first + second, 1, chop=1)
    case("5 ping between", first, frame(PING, b"ping"), 1, second, 1)
    case("5 ping between by 1", first, frame(PING, b"ping"), 1, second, 1, chop=1)
    case("5 continues nothing, fin", frame(0, b"nothing") + frame(TEXT, b"Hello"), None)
    case("5 continues nothing", frame(0, b"nothing", fin=False) + frame(TEXT, b"Hello"), None)
    case("5 text within text", first + frame(TEXT, b"other"), None)
    steps = []
    for n in range(1, 6):
        steps += [frame(0 if n > 1 else TEXT, b"fragment%d" % n, fin=n == 5), int(n == 5), frame(PING, b"ping %d" % n), 1]
    case("5 five fragments, pings", *steps)
    case("5 continues a whole one", frame(TEXT, b"whole"), 1, frame(0, b"more") + frame(TEXT, b"next"), None)
    case("5 empty fragments", frame(TEXT, fin=False) + frame(0, fin=False) + frame(0), 1)

    # 6: UTF-8.
    greek = "κόσμε".encode()
    case("6 two messages", frame(TEXT, "Hello-µ@ßöäüàá-UTF-8!!".encode()) + frame(TEXT, greek), 2)
    pieces = [frame(0 if n else TEXT, greek[n : n + 1], fin=n == len(greek) - 1) for n in range(len(greek))]
    case("6 each byte a fragment", b"".join(pieces), 1)
    for name, bytes_ in {
        "surrogate": greek + b"\xed\xa0\x80edited",
        "surrogates": b"\xed\xa0\x80\xed\xb0\x80",
        "too high": greek + b"\xf4\x90\x80\x80edited",
        "highest": b"\xf4\x8f\xbf\xbf",
        "noncharacter": b"\xef\xbf\xbe",
        "overlong 2": b"\xc0\xaf",
        "overlong 3": b"\xe0\x80\xaf",
        "overlong 4": b"\xf0\x80\x80\xaf",
        "five bytes": b"\xf8\x88\x80\x80\x80",
        "lonely": b"\x80",
        "cut": b"\xce\xba\xe1\xbd",
        "impossible": b"\xfe\xfe\xff\xff",
        "first of 3": b"\xe0\xa0\x80",
        "last of 2": b"\xdf\xbf",
    }.items():
        case(f"6 utf-8 {name}", frame(TEXT, bytes_), 1)
        case(f"6 utf-8 {name} in two", frame(TEXT, bytes_[:1], fin=False) + frame(0, bytes_[1:]), 1)
    case("6 binary is not utf-8", frame(BINARY, b"\xff\xfe"), 1)

    # 7: closes.
    case("7 close empty", frame(CLOSE), None)
    case("7 close of one byte", frame(CLOSE, b"\x03"), None)
    case("7 close, close", close() + close(), None)
    case("7 close, text", close() + frame(TEXT, b"late"), None)
    case("7 close, ping", close() + frame(PING), None)
    case("7 text, close, text", frame(TEXT, b"a"), 1, close() + frame(TEXT, b"b"), None)
    case("7 half a message, close", first + close(), None)
    case("7 reason 123", close(reason=text(123)), None)
    case("7 reason 124", close(reason=text(124)), None)
    case("7 reason not utf-8", close(reason=b"\xce\xba\xe1\xbd\xb9\xcf\x83\xed\xa0\x80"), None)
    for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999):
        case(f"7 code {code}", close(code), None)
    for code in (0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999, 5000, 65535):
        case(f"7 bad code {code}", close(code), None)

    # 9: much.
    kib, mib = 1 << 10, 1 << 20
    for length in (64 * kib, 256 * kib, mib, 4 * mib, 8 * mib, 16 * mib):
        case(f"9 text {length}", frame(TEXT, text(length)), 1)
        case(f"9 binary {length}", frame(BINARY, binary(length)), 1)
    for size in (256, 4 * kib, 64 * kib, mib):
        whole = binary(mib)
        pieces = [whole[at : at + size] for at in range(0, mib, size)]
        last = len(pieces) - 1
        fragments = [frame(0 if n else BINARY, piece, fin=n == last) for n, piece in enumerate(pieces)]
        case(f"9 fragments of {size}", b"".join(fragments), 1)
    for chop in (64, 1024):
        case(f"9 text by {chop}", frame(TEXT, text(256 * kib)), 1, chop=chop)
    for length in (0, 16, 64, 256, 1024, 4096):
        case(f"9 thousand of {length}", frame(TEXT, text(length)) * 1000, 1000)
    return made


def run(way, steps, chop):
    """What the server sends until its Close frame, or its end."""
    frames, came, closed = Frames(way), [], False

    def send(data):
        try:
            for at in range(0, len(data), chop or len(data)):
                way.send(data[at : at + chop] if chop else data)
        except OSError:
            pass

    sending = None
    for step in [*steps, sys.maxsize]:
        if isinstance(step, bytes):
            if sending:
                sending.join()
            # Beside what is read, or neither side would read. Of HTTP/2 it reads by itself while it cannot send.
            sending = threading.Thread(target=send, args=[step])
            sending.start()
            if isinstance(way, Http2):
                sending.join()
            continue
        before = len(came)
        while not closed and len(came) < before + step:
            next_frame = frames.next()
            closed = next_frame is None or next_frame[0] & 0x0F == CLOSE
            came.append(told(*next_frame) if next_frame else "the end")
    sending.join()
    way.close()
    if len(came) > 20:
        came = [len(came), hashlib.sha256("\n".join(came).encode()).hexdigest()]
    return came


def compressed(way, extension, messages):
    """Messages there and back by permessage-deflate; what the extension came to be, and whether they came back whole."""
    answer = way.fields.get("sec-websocket-extensions")
    if answer is None:
        way.close()
        return ["declined"]
    ((_, agreed),) = parse_extension(answer)
    deflate = extension.process_response_params(agreed, [])
    frames, same = Frames(way), 0
    for message in messages:
        sent = deflate.encode(Frame(Opcode.TEXT, message))
        way.send(frame(TEXT, bytes(sent.data), rsv=4 if sent.rsv1 else 0))
        first, payload = frames.next()
        came = deflate.decode(Frame(Opcode.TEXT, payload, rsv1=bool(first & 0x40)))
        same += bytes(came.data) == message
    way.close()
    return [sorted(map(str, agreed)), len(messages), same]


def all_cases(by, address):
    results = {}
    for name, (steps, chop) in cases().items():
        way = by(address, "/echo")
        results[name] = [way.status, *run(way, steps, chop)]
    message = b"".join(b"%d " % n for n in range(40_000))
    for offered in (
        {},
        {"client_no_context_takeover": True, "server_no_context_takeover": True},
        {"client_max_window_bits": 9, "server_max_window_bits": 9},
        {"client_max_window_bits": 15, "server_max_window_bits": 10},
    ):
        extension = ClientPerMessageDeflateFactory(**offered)
        parameters = "; ".join(
            name if value in (None, True) else f"{name}={value}" for name, value in extension.get_request_params()
        )
        value = "permessage-deflate" + ("; " + parameters if parameters else "")
        for length in (16, 64, 256, 1024, 4096, 8192, 16384, 32768, 65536, 131072):
            way = by(address, "/echo", [("Sec-WebSocket-Extensions", value)])
            results[f"12 {value} {length}"] = compressed(way, extension, [message[:length]] * 20)
    return results


opened = frames = None


def do(task):
    global opened, frames
    if task["do"] == "cases":
        return all_cases(WAYS[task["by"]], task["address"])
    if task["do"] == "open":
        options = {"protocol": task["protocol"]} if "protocol" in task else {}
        opened = WAYS[task["by"]](task["address"], task["path"], task.get("fields", ()), **options)
        frames = Frames(opened)
        refusal = None
        if opened.status != 200:
            refusal = opened.recv().decode()
        return {"status": opened.status, "fields": opened.fields, "refusal": refusal}
    if task["do"] == "send":
        opened.send(bytes.fromhex(task["hex"]))
        return None
    if task["do"] == "echo":
        time.sleep(task.get("after", 0))
        opened.send(frame(TEXT, task["text"].encode()) + bytes.fromhex(task.get("then", "")))
        return frames.next()[1].decode()
    closed, came = None, []
    while (next_frame := frames.next()) is not None:
        came.append(told(*next_frame))
        if next_frame[0] & 0x0F == CLOSE:
            closed = time.monotonic()
            if task.get("answer", True):
                opened.send(frame(CLOSE, next_frame[1]))
    return {"frames": came, "took": closed and time.monotonic() - closed}


for line in sys.stdin:
    print(json.dumps(do(json.loads(line))), flush=True)
