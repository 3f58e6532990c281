"""The two calls to containerd that ctr lacks: a task from a checkpoint in a folder, and its start, each timed by itself.
gRPC over HTTP/2 with the standard library alone, one connection a call.
"""
import socket
import struct

# Lengths of HPACK's codes (RFC 7541, appendix B) of the 256 bytes: a for 5 bits, b for 6, ... The codes follow from that.
LENGTHS = (
    "isxxxxxxxtzxxzxxxxxxxxzxxxxxxxxxbffhibdgffdgdbbbaaabbbbbbbcdkbhfibccccccccccccccccccccccdcdioijbkabababbbaccbbbabcbaabccccckgjix"
    "prpprrrsrssssststtrstssssqrsrsstrqprrssqsrrtqrssqqrqsrssprrrsrrsvvporsruvvvwwvtuoqvwwvwtqqvvxwwwptpqrqqsrruuttvsvwvvwwwwwxwwwwwv"
)
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS, ACK = 1, 4, 1
NO_TABLE = struct.pack(">HI", 1, 0)  # SETTINGS_HEADER_TABLE_SIZE: answers name no headers of earlier ones


class Refused(Exception):
    """containerd's answer is an error."""


def _codes():
    code, length, codes = 0, 5, {}
    for value in sorted(range(256), key=lambda value: (LENGTHS[value], value)):
        code <<= ord(LENGTHS[value]) - 92 - length
        length = ord(LENGTHS[value]) - 92
        codes[length, code] = value
        code += 1
    return codes


CODES = _codes()


def _unpacked(packed):
    code = length = 0
    text = bytearray()
    for byte in packed:
        for shift in range(7, -1, -1):
            code, length = code << 1 | byte >> shift & 1, length + 1
            if (length, code) in CODES:
                text.append(CODES[length, code])
                code = length = 0
    return bytes(text)


def _integer(block, at, bits):
    value = block[at] & (1 << bits) - 1
    at += 1
    if value == (1 << bits) - 1:
        shift = 0
        while True:
            value += (block[at] & 127) << shift
            shift += 7
            at += 1
            if not block[at - 1] & 128:
                break
    return value, at


def _string(block, at):
    packed = block[at] & 128
    length, at = _integer(block, at, 7)
    text = block[at : at + length]
    return (_unpacked(text) if packed else text).decode(errors="replace"), at + length


def _headers(block):
    """Headers with a spelt-out name: grpc-status and grpc-message are not in HPACK's own table."""
    headers, at = {}, 0
    while at < len(block):
        if block[at] & 128:
            _, at = _integer(block, at, 7)
        elif block[at] & 224 == 32:
            _, at = _integer(block, at, 5)
        else:
            index, at = _integer(block, at, 6 if block[at] & 64 else 4)
            name = ""
            if index == 0:
                name, at = _string(block, at)
            headers[name], at = _string(block, at)
    return headers


def _frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number, value):
    """A protobuf field of bytes or text."""
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def call(address, method, message, timeout, namespace="default"):
    """Calls containerd.services.tasks.v1.Tasks/METHOD; gives the answer's bytes."""
    request = b""
    for name, value in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", f"/containerd.services.tasks.v1.Tasks/{method}"),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("containerd-namespace", namespace),
    ]:
        request += b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        connection.connect(address)
        connection.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(SETTINGS, 0, 0, NO_TABLE)
            + _frame(HEADERS, END_HEADERS, 1, request)
            + _frame(DATA, END_STREAM, 1, struct.pack(">BI", 0, len(message)) + message)
        )
        stream = connection.makefile("rb")
        headers, body = {}, b""
        while True:
            head = stream.read(9)
            if len(head) < 9:
                raise Refused(f"{method}: containerd hung up")
            length = int.from_bytes(head[:3], "big")
            kind, flags, number = struct.unpack(">BBI", head[3:])
            payload = stream.read(length)
            if kind == SETTINGS and not flags & ACK:
                connection.sendall(_frame(SETTINGS, ACK, 0))
            elif kind == PING and not flags & ACK:
                connection.sendall(_frame(PING, ACK, 0, payload))
            elif kind in (GOAWAY, RST_STREAM):
                raise Refused(f"{method}: {payload!r}")
            elif kind == HEADERS:
                headers |= _headers(payload)
            elif kind == DATA:
                body += payload
            if number == 1 and flags & END_STREAM and kind in (HEADERS, DATA):
                break
    if headers.get("grpc-status") != "0":
        raise Refused(headers.get("grpc-message", repr(headers)))
    return body[5:]


def create(address, container, mounts, checkpoint, binary, timeout):
    """A task of a container from the checkpoint in a folder. `mounts`: type, source, options of its root.
    `binary`: the runtime, with a runc-like one."""
    options = (field(6, binary) if binary else b"") + field(10, checkpoint)
    message = field(1, container)
    for kind, source, flags in mounts:
        message += field(3, field(1, kind) + field(2, source) + b"".join(field(4, flag) for flag in flags))
    message += field(9, field(1, "containerd.runc.v1.Options") + field(2, options))
    call(address, "Create", message, timeout)


def start(address, container, timeout):
    call(address, "Start", field(1, container), timeout)
