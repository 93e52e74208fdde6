"""A gRPC client of grpcio. Each line of its input is a call as JSON; each line that it says is how one went.

A call: method; requests, each a text or a number of bytes; metadata, as pairs; timeout; pause, in seconds before each request;
read_pause, before the first response is read; cancel_after, a number of responses; open, to never end the requests;
say, to say "begun" once the first response is there.
"""

import base64
import json
import sys
import threading
import time

import grpc

UNARY_IN = {"Unary", "Metadata", "Download", "Fail", "FailLate", "Hang", "HangLate", "Cancelled"}
UNARY_OUT = {"Unary", "Metadata", "Upload", "Fail", "Hang", "Cancelled"}

channel = grpc.insecure_channel(
    sys.argv[1],
    options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
)


def told(metadata):
    """As pairs of texts; binary values as base64."""
    pairs = []
    for key, value in metadata or ():
        pairs.append([key, base64.b64encode(value).decode() if key.endswith("-bin") else value])
    return pairs


def given(pairs):
    return [(key, base64.b64decode(value) if key.endswith("-bin") else value) for key, value in pairs]


def message(request):
    return bytes(request) if isinstance(request, int) else request.encode()


def requests_of(call, ended):
    for request in call["requests"]:
        time.sleep(call.get("pause", 0))
        yield message(request)
    if call.get("open"):
        ended.wait()


def run(call):
    method = call["method"]
    kind = ("unary" if method in UNARY_IN else "stream") + "_" + ("unary" if method in UNARY_OUT else "stream")
    ended = threading.Event()
    argument = message(call["requests"][0]) if method in UNARY_IN else requests_of(call, ended)
    began = time.monotonic()
    stub = getattr(channel, kind)("/test.Peer/" + method)
    options = {"timeout": call.get("timeout"), "metadata": given(call.get("metadata", []))}
    made = stub.future(argument, **options) if method in UNARY_OUT else stub(argument, **options)
    messages, sizes = [], 0
    try:
        if call.get("cancel_after") == 0:
            time.sleep(1)  # the server has it by then, on a busy machine too
            made.cancel()
        if method in UNARY_OUT:
            answers = [made.result()]
        else:
            time.sleep(call.get("read_pause", 0))
            answers = made
        for answer in answers:
            sizes += len(answer)
            messages.append(answer.decode() if len(answer) < 4096 else len(answer))
            if call.get("say") and len(messages) == 1:
                print("begun", flush=True)
            if len(messages) == call.get("cancel_after"):
                made.cancel()
    except (grpc.RpcError, grpc.FutureCancelledError):
        pass
    ended.set()
    return {
        "code": made.code().name,
        "details": made.details(),
        "messages": messages if len(messages) < 20 else len(messages),
        "bytes": sizes,
        "initial": told(made.initial_metadata()),
        "trailing": told(made.trailing_metadata()),
        "took": time.monotonic() - began,
    }


for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), flush=True)
