"""A gRPC server of grpcio, without protoc: bytes in, bytes out. Says its port on the first line, and ends with its input."""

import sys
import threading
import time
from concurrent import futures

import grpc

cancelled = 0
lock = threading.Lock()


def metadata(context):
    """What of the call's own metadata goes back, in front and behind."""
    asked = [(key, value) for key, value in context.invocation_metadata() if key.startswith("my-")]
    context.send_initial_metadata([("i" + key, value) for key, value in asked])
    context.set_trailing_metadata([("t" + key, value) for key, value in asked])


def unary(request, context):
    metadata(context)
    return request


def metadata_of(_, context):
    """The keys and values that came, a line each."""
    came = sorted((key, value) for key, value in context.invocation_metadata())
    return "\n".join(f"{key}: {value}" for key, value in came).encode()


def upload(requests, context):
    count = size = 0
    for request in requests:
        count += 1
        size += len(request)
    metadata(context)
    return f"{count} {size}".encode()


def download(request, context):
    """"COUNT SIZE [PAUSE]": so many messages of so many bytes, with so many seconds before each."""
    count, size, *pause = request.split()
    message = bytes(int(size))
    for _ in range(int(count)):
        if pause:
            time.sleep(float(pause[0]))
        yield message


def talk(requests, context):
    metadata(context)
    yield from requests


def hears_late(requests, context):
    """Begins to answer at once, and takes its messages only then."""
    context.send_initial_metadata(())
    yield upload_text(requests)


def upload_text(requests):
    return str(sum(len(request) for request in requests)).encode()


def speaks_first(requests, context):
    """Six messages while nothing is heard, then how much is."""
    for _ in range(6):
        time.sleep(0.5)
        yield b"."
    yield upload_text(requests)


def fail(request, context):
    """"CODE TEXT": ends so, with a detail behind it."""
    code, text = request.decode().split(" ", 1)
    context.set_trailing_metadata([("why-bin", b"\x00\xff\n"), ("why", "asked")])
    context.abort(grpc.StatusCode[code], text)


def fail_late(request, context):
    yield b"first"
    fail(request, context)


def until_cancelled(context):
    global cancelled
    ended = threading.Event()
    if context.add_callback(ended.set):
        ended.wait(60)
    with lock:
        cancelled += 1


def hang(request, context):
    until_cancelled(context)
    return b""


def hang_late(request, context):
    yield b"first"
    until_cancelled(context)


def hang_hearing(requests, context):
    """Neither answers nor ends, whatever is said."""
    threading.Thread(target=lambda: [None for _ in iterate(requests)], daemon=True).start()
    until_cancelled(context)
    yield b""


def iterate(requests):
    try:
        yield from requests
    except Exception:  # The call was cancelled.
        return


def cancelled_count(request, context):
    with lock:
        return str(cancelled).encode()


KINDS = {
    "Unary": (grpc.unary_unary_rpc_method_handler, unary),
    "Metadata": (grpc.unary_unary_rpc_method_handler, metadata_of),
    "Upload": (grpc.stream_unary_rpc_method_handler, upload),
    "Download": (grpc.unary_stream_rpc_method_handler, download),
    "Talk": (grpc.stream_stream_rpc_method_handler, talk),
    "HearsLate": (grpc.stream_stream_rpc_method_handler, hears_late),
    "SpeaksFirst": (grpc.stream_stream_rpc_method_handler, speaks_first),
    "Fail": (grpc.unary_unary_rpc_method_handler, fail),
    "FailLate": (grpc.unary_stream_rpc_method_handler, fail_late),
    "Hang": (grpc.unary_unary_rpc_method_handler, hang),
    "HangLate": (grpc.unary_stream_rpc_method_handler, hang_late),
    "HangHearing": (grpc.stream_stream_rpc_method_handler, hang_hearing),
    "Cancelled": (grpc.unary_unary_rpc_method_handler, cancelled_count),
}

handlers = {name: kind(method) for name, (kind, method) in KINDS.items()}
server = grpc.server(
    futures.ThreadPoolExecutor(max_workers=32),
    options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
)
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Peer", handlers)])
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
sys.stdin.read()
server.stop(0)
