#!/usr/bin/python3
"""A Modbus TCP slave (pymodbus 3.0.0, Debian's python3-pymodbus) for tests.

    /usr/bin/python3 slave.py [--port 0] [--size 1000]

It prints "listening <host> <port>" and then takes commands on stdin, one a
line, and answers each with one line, "ok ..." or "error ...":

    get holding 0 [count]      the registers or bits, space separated
    set holding 0 123 [124..]  as the device itself would change them
    writes holding 0           how often a client wrote the address
    when holding 0             when it last did: nanoseconds since 1970, or 0
    reads holding 0            how many requests have read the address
    refuse holding 5           answer "illegal data address" to what touches it
    allow holding 5
    pause                      swallow requests without an answer
    resume
    quit

Tables: coil, discrete, input, holding. It ends with its stdin, so that it
cannot outlive its test.
"""
import argparse
import asyncio
import sys
import time

from pymodbus.datastore import (
    ModbusSequentialDataBlock,
    ModbusServerContext,
    ModbusSlaveContext,
)
from pymodbus.server.async_io import ModbusConnectedRequestHandler, ModbusTcpServer

WRITES = {"coil": (5, 15), "holding": (6, 16, 22, 23)}


class Table(ModbusSequentialDataBlock):
    """A table that counts what clients do and can refuse addresses."""

    def __init__(self, size):
        super().__init__(0, [0] * size)
        self.refused = set()
        self.writes = {}
        self.when = {}
        self.reads = {}

    def validate(self, address, count=1):
        if any(address <= r < address + count for r in self.refused):
            return False
        return super().validate(address, count)

    def put(self, address, values):
        super().setValues(address, values)


class Context(ModbusSlaveContext):
    """Tells a client's writes and reads from those of the control channel."""

    def table(self, code):
        return self.store[self.decode(code)]

    def getValues(self, fc_as_hex, address, count=1):
        if fc_as_hex <= 4:
            table = self.table(fc_as_hex)
            for i in range(address, address + count):
                table.reads[i] = table.reads.get(i, 0) + 1
        return super().getValues(fc_as_hex, address, count)

    def setValues(self, fc_as_hex, address, values):
        super().setValues(fc_as_hex, address, values)
        table, now = self.table(fc_as_hex), time.time_ns()
        for i in range(address, address + len(values)):
            table.writes[i] = table.writes.get(i, 0) + 1
            table.when[i] = now


class Handler(ModbusConnectedRequestHandler):
    """Drops what arrives while the slave is paused."""

    paused = False

    def data_received(self, data):
        if not Handler.paused:
            super().data_received(data)


def command(tables, line):
    """Carry out one line of the control channel."""
    words = line.split()
    verb = words[0]
    if verb in ("pause", "resume"):
        Handler.paused = verb == "pause"
        return "ok"
    table, address = tables[words[1]], int(words[2])
    if verb == "get":
        count = int(words[3]) if len(words) > 3 else 1
        return " ".join(["ok"] + [str(int(v)) for v in table.getValues(address, count)])
    if verb == "set":
        values = [int(v) for v in words[3:]]
        if not values or address + len(values) > len(table.values):
            return f"error no room for {len(values)} values at {address}"
        table.put(address, values)
        return "ok"
    if verb in ("writes", "when", "reads"):
        return f"ok {getattr(table, verb).get(address, 0)}"
    if verb == "refuse":
        table.refused.add(address)
        return "ok"
    if verb == "allow":
        table.refused.discard(address)
        return "ok"
    return f"error no command {verb}"


async def main():
    args = argparse.ArgumentParser()
    args.add_argument("--port", type=int, default=0)
    args.add_argument("--size", type=int, default=1000)
    args = args.parse_args()
    tables = {name: Table(args.size) for name in ("coil", "discrete", "input", "holding")}
    slave = Context(
        co=tables["coil"],
        di=tables["discrete"],
        ir=tables["input"],
        hr=tables["holding"],
        zero_mode=True,
    )
    server = ModbusTcpServer(
        ModbusServerContext(slaves=slave, single=True),
        address=("127.0.0.1", args.port),
        handler=Handler,
        allow_reuse_address=True,
    )
    serving = asyncio.ensure_future(server.serve_forever())
    await asyncio.wait({serving, server.serving}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()  # raises what went wrong
    host, port = server.server.sockets[0].getsockname()[:2]
    print("listening", host, port, flush=True)

    stdin = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin
    )
    while True:
        line = (await stdin.readline()).decode().strip()
        if line in ("", "quit"):
            return
        try:
            answer = command(tables, line)
        except (KeyError, ValueError, IndexError) as exc:
            answer = f"error {line!r}: {exc!r}"
        print(answer, flush=True)


if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)
    asyncio.run(main())
