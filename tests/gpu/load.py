#!/usr/bin/env python3
"""Asks a server on 127.0.0.1 by eight threads without pause until standard input ends, then says in JSON how it went.

    load.py PORT [ANSWER,...]
"""
import http.client
import json
import sys
import threading
import time

port, reference = int(sys.argv[1]), json.loads(sys.argv[2])
ending, lock = threading.Event(), threading.Lock()
told = {"right": 0, "wrong": 0, "errors": 0, "longest": 0.0, "error": ""}


def ask(seed):
    begin = time.monotonic()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", f"/{seed}")
        found = float(connection.getresponse().read())
        connection.close()
        result = "right" if abs(found - reference[seed]) <= 0.02 + 1e-3 * abs(reference[seed]) else "wrong"
    except (OSError, http.client.HTTPException, ValueError) as error:
        result, told["error"] = "errors", repr(error)
        time.sleep(0.05)
    with lock:
        told[result] += 1
        told["longest"] = max(told["longest"], round(time.monotonic() - begin, 3))


def client(number):
    seed = number
    while not ending.is_set():
        ask(seed % len(reference))
        seed += 1


threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
sys.stdin.read()
ending.set()
for thread in threads:
    thread.join()
print(json.dumps(told))
