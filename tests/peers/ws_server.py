"""A WebSocket server of `websockets` that sends back what it is sent. Says its port on the first line, and ends with its input.

On paths under /watched it says how each connection ended: the code of the Close frame that came, or null. /refused is refused
with 403, and /plain answered as a page is.
"""

import asyncio
import json
import logging
import sys

from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

# What broken clients do is not worth a word.
logging.getLogger("websockets").setLevel(logging.CRITICAL)


async def echo(connection):
    try:
        async for message in connection:
            await connection.send(message)
        await connection.recv()
    except ConnectionClosed as closed:
        if connection.request.path.startswith("/watched"):
            code = closed.rcvd.code if closed.rcvd else None
            print(json.dumps(code), flush=True)


def answer(connection, request):
    if request.path == "/refused":
        return connection.respond(403, "not you\n")
    if request.path == "/plain":
        return connection.respond(200, "a page\n")
    return None


async def main():
    server = await serve(
        echo,
        "127.0.0.1",
        0,
        process_request=answer,
        select_subprotocol=lambda _, offered: "chat" if "chat" in offered else None,
        max_size=None,
        ping_interval=None,
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    # Connections that still live are no one's any more.
    server.close(close_connections=False)


asyncio.run(main())
