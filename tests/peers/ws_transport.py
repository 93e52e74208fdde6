"""Ways to a WebSocket server, as bytes: an upgrade of HTTP/1.1, and an extended CONNECT of HTTP/2."""

import base64
import hashlib
import os
import socket

import h2.config
import h2.connection
import h2.events
import h2.settings

TIMEOUT = 20
GOAWAY = 7


class Http1:
    def __init__(self, address, path, fields=()):
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), TIMEOUT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key = base64.b64encode(os.urandom(16)).decode()
        head = [
            f"GET {path} HTTP/1.1",
            f"Host: {address}",
            "Connection: Upgrade",
            "Upgrade: websocket",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
            *(f"{name}: {value}" for name, value in fields),
        ]
        self.socket.sendall("\r\n".join([*head, "", ""]).encode())
        reply = b""
        while b"\r\n\r\n" not in reply:
            part = self.socket.recv(65536)
            if not part:
                break
            reply += part
        head, _, self.ahead = reply.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        self.status = int(status.split()[1])
        self.fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        if self.status == 101:
            digest = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
            assert self.fields["sec-websocket-accept"] == base64.b64encode(digest).decode()
            self.status = 200

    def send(self, data):
        self.socket.sendall(data)

    def recv(self):
        """Empty at the end, be it an orderly one or not."""
        if self.ahead:
            data, self.ahead = self.ahead, b""
            return data
        try:
            return self.socket.recv(65536)
        except ConnectionError:
            return b""

    def close(self):
        self.socket.close()


class Http2:
    def __init__(self, address, path, fields=(), protocol="websocket"):
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), TIMEOUT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.connection.initiate_connection()
        self.flush()
        self.raw = b""
        self.ahead, self.ended, self.status, self.fields = bytearray(), False, None, {}
        settings = self.connection.remote_settings
        while not settings.get(h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL):
            self.turn()
        self.stream = self.connection.get_next_available_stream_id()
        head = [
            (":method", "CONNECT"),
            (":protocol", protocol),
            (":scheme", "http"),
            (":path", path),
            (":authority", address),
            ("sec-websocket-version", "13"),
            *((name.lower(), value) for name, value in fields),
        ]
        self.connection.send_headers(self.stream, head)
        self.flush()
        while self.status is None and not self.ended:
            self.turn()

    def flush(self):
        self.socket.sendall(self.connection.data_to_send())

    def without_goaway(self, data):
        """Whole frames, but for GOAWAY: `h2` ends at one, though streams go on (RFC 9113 section 6.8)."""
        self.raw += data
        frames = b""
        while len(self.raw) >= 9 and len(self.raw) >= (end := 9 + int.from_bytes(self.raw[:3], "big")):
            frames += self.raw[:end] if self.raw[3] != GOAWAY else b""
            self.raw = self.raw[end:]
        return frames

    def turn(self):
        """Takes what has come."""
        try:
            data = self.socket.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            self.ended = True
        for event in self.connection.receive_data(self.without_goaway(data)):
            if isinstance(event, h2.events.ResponseReceived):
                self.fields = {name.decode(): value.decode() for name, value in event.headers}
                self.status = int(self.fields[":status"])
            elif isinstance(event, h2.events.DataReceived):
                self.ahead += event.data
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset, h2.events.ConnectionTerminated)):
                self.ended |= getattr(event, "stream_id", None) == self.stream
        self.flush()

    def send(self, data):
        view = memoryview(data)
        while view:
            room = min(
                self.connection.local_flow_control_window(self.stream), self.connection.max_outbound_frame_size
            )
            if room == 0:
                self.turn()
                continue
            self.connection.send_data(self.stream, bytes(view[:room]))
            self.flush()
            view = view[room:]

    def recv(self):
        while not self.ahead and not self.ended:
            self.turn()
        data, self.ahead = bytes(self.ahead), bytearray()
        return data

    def close(self):
        self.socket.close()
