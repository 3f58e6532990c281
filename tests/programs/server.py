"""A threaded HTTP server on 127.0.0.1 that answers from the GPU: GET /SEED gives a number that only SEED decides.

    server.py PORT
"""
import http.server
import sys
import threading

import asked
import torch

torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(256, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 256)).eval().to("cuda")
served, lock = 0, threading.Lock()


def infer(seed):
    with torch.no_grad():
        x = torch.arange(256, device="cuda", dtype=torch.float32).mul(seed + 1).sin()
        return round(float(model(x).double().abs().sum()), 2)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global served
        body = str(infer(int(self.path[1:]))).encode()
        with lock:
            served += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


reference = [infer(seed) for seed in range(16)]


def answer():
    found = [infer(seed) for seed in range(16)]
    near = all(abs(a - b) <= 0.02 + 1e-3 * abs(b) for a, b in zip(found, reference))
    return {"ok": near, "exact": found == reference, "same": asked.digest(reference)}


def go():
    return {"ok": True, "served": served}


server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
asked.serve({"answer": answer, "go": go, "reference": lambda: {"ok": True, "values": reference}})
